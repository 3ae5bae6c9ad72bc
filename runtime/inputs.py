"""Checks at the door of every session."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from shadowllm.errors import UserError
from shadowllm.models.spec import ModelSpec


def check_prompts(prompts: Sequence[Sequence[int]], batch: int, spec: ModelSpec) -> None:
    """Refuse prompts a session cannot prefill.

    Raises:
        UserError: another number of prompts than sequences, an empty or too long prompt, or a
            token outside the vocabulary.
    """
    if len(prompts) != batch:
        raise UserError(f"{len(prompts)} prompts for {batch} sequences", "reset the session with the number of prompts")
    for prompt in prompts:
        if len(prompt) == 0:
            raise UserError("the prompt is empty", "give at least one token")
        if len(prompt) > spec.max_seqlen:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the model has {spec.max_seqlen} positions", "shorten it"
            )
        _check_vocabulary(np.asarray(prompt), spec)


def check_tokens(tokens: np.ndarray, lengths: np.ndarray, spec: ModelSpec) -> None:
    """Refuse tokens a session cannot append to sequences of the given lengths.

    Raises:
        UserError: a wrong shape or type, nothing prefilled, no position left, or a token outside
            the vocabulary.
    """
    if tokens.shape != lengths.shape or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(
            f"decode takes integers of shape {lengths.shape}, got {tokens.dtype} {tokens.shape}",
            "give one token id per sequence",
        )
    if lengths.min() == 0:
        raise UserError("nothing to continue", "call prefill first")
    if lengths.max() >= spec.max_seqlen:
        raise UserError(f"all {spec.max_seqlen} positions of the model are used", "reset the session")
    _check_vocabulary(tokens, spec)


def _check_vocabulary(tokens: np.ndarray, spec: ModelSpec) -> None:
    if tokens.min() < 0 or tokens.max() >= spec.vocab_size:
        bad = tokens[(tokens < 0) | (tokens >= spec.vocab_size)][0]
        raise UserError(f"token {bad} is outside the vocabulary of {spec.vocab_size}", "use the bundle's own tokenizer")
