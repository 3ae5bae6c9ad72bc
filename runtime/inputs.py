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
        _check_vocabulary(prompt, spec)


def check_tokens(tokens: np.ndarray, lengths: np.ndarray, spec: ModelSpec) -> None:
    """Refuse tokens a session cannot append to sequences of the given lengths.

    Raises:
        UserError: a wrong shape or type, nothing prefilled, no position left, or a token outside
            the vocabulary.
    """
    # On plain integers: between two steps the caches are cold, and each NumPy call costs microseconds.
    if tokens.shape != lengths.shape or tokens.dtype.kind not in "iu":
        raise UserError(
            f"decode takes integers of shape {lengths.shape}, got {tokens.dtype} {tokens.shape}",
            "give one token id per sequence",
        )
    used = lengths.tolist()
    if min(used) == 0:
        raise UserError("nothing to continue", "call prefill first")
    if max(used) >= spec.max_seqlen:
        raise UserError(f"all {spec.max_seqlen} positions of the model are used", "reset the session")
    _check_vocabulary(tokens.tolist(), spec)


def check_steps(steps: int, lengths: np.ndarray, spec: ModelSpec) -> int:
    """Length of the longest sequence after so many more steps.

    Raises:
        UserError: the model has fewer positions.
    """
    end = int(lengths.max()) + steps
    if end > spec.max_seqlen:
        raise UserError(f"{steps} more steps exceed the model's {spec.max_seqlen} positions", "ask for fewer tokens")
    return end


def _check_vocabulary(tokens: Sequence[int], spec: ModelSpec) -> None:
    if min(tokens) < 0 or max(tokens) >= spec.vocab_size:
        bad = next(token for token in tokens if not 0 <= token < spec.vocab_size)
        raise UserError(f"token {bad} is outside the vocabulary of {spec.vocab_size}", "use the bundle's own tokenizer")
