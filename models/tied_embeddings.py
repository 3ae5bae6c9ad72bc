"""Decide from the stored tensors, as ``transformers`` 5 does, whether embeddings and output projection are tied."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from shadowllm.models.spec import ModelSpec
from shadowllm.models.weights import Source, TensorFile

HEAD, TABLE = "lm_head.weight", "embed_tokens.weight"
Sources = dict[str, Source]


def resolve_tied_embeddings(
    spec: ModelSpec, tensors: TensorFile, sources_of: Callable[[ModelSpec], Sources]
) -> tuple[ModelSpec, Sources]:
    """Correct a spec with tied embeddings if the checkpoint stores two different matrices.

    If only one of the two matrices is stored, it serves as both.

    Args:
        sources_of: the family's function that maps canonical names to checkpoint names.

    Returns:
        The spec with the actual ``tied_embeddings``, and the source of each of its tensors.
    """
    sources = sources_of(spec)
    if HEAD not in tensors.names():
        return spec, sources
    if not spec.tied_embeddings:
        return spec, _with_stored_head(sources, tensors)
    table = sources[TABLE].name
    if table not in tensors.names():
        return spec, sources | {TABLE: Source(HEAD)}
    if torch.equal(tensors.read(table), tensors.read(HEAD)):
        return spec, sources
    _warn(stacklevel=4)
    untied = replace(spec, tied_embeddings=False)
    return untied, sources_of(untied)


def _with_stored_head(sources: Sources, tensors: TensorFile) -> Sources:
    """Return sources in which the output projection is the stored one, also if it would be made from the embeddings.

    OPT-350m's two tables differ even if its embeddings are tied, because each is multiplied by a projection.
    """
    table = sources[HEAD].name
    if table == HEAD or (table in tensors.names() and torch.equal(tensors.read(table), tensors.read(HEAD))):
        return sources
    if table not in tensors.names():
        return sources | {name: replace(sources[name], name=HEAD) for name in (HEAD, TABLE)}
    _warn(stacklevel=5)
    return sources | {HEAD: replace(sources[HEAD], name=HEAD)}


def _warn(stacklevel: int) -> None:
    warnings.warn(
        f"config.json says that {HEAD} is the embedding table, but the checkpoint holds another: both are used",
        stacklevel=stacklevel,
    )
