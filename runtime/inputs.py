"""Tokens and budgets that sessions are given: checks, and the form in which graphs read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from shadowllm.bundle.selection_names import CERTIFY, REST, SHORTLIST
from shadowllm.errors import UserError
from shadowllm.limits import MOST_SEQUENCES, check_whole
from shadowllm.models.sparsity import Budget, Rest
from shadowllm.models.spec import ModelSpec


def pad_prompts(
    prompts: Sequence[Sequence[int]], batch: int, spec: ModelSpec, width: Callable[[int], int] = int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Check prompts and pad them at the end to one length.

    Padding tokens write to the KV cache after the last position of their row. These entries are never visible, and
    later tokens overwrite them.

    Args:
        width: gives the length to pad to, from the length of the longest prompt.

    Returns:
        Token ids and positions, int64 ``(batch, seqlen)``, and the lengths of the prompts, int64 ``(batch,)``.

    Raises:
        UserError: there are no prompts, their number is not ``batch``, a prompt is empty or too long, or a token is
            outside the vocabulary.
    """
    if not hasattr(prompts, "__len__"):
        raise UserError(f"the prompts are {prompts!r:.60}", "give a list of token ids for each prompt")
    if len(prompts) != batch:
        raise UserError(f"{len(prompts)} prompts for {batch} sequences", "reset the session with the number of prompts")
    for prompt in prompts:
        check_appended(check_prompt(prompt), 0, spec)
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    ids = np.zeros((batch, width(int(lengths.max()))), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    return ids, np.tile(np.arange(ids.shape[1], dtype=np.int64), (batch, 1)), lengths


def check_prompt(prompt: Sequence[int]) -> Sequence[int]:
    """Return the tokens of a prompt after checking that they are integers.

    Raises:
        UserError: they are something else. Whether they can be appended is checked by `check_appended`.
    """
    try:
        tokens = np.asarray(prompt)
    except (TypeError, ValueError):  # lists of different lengths, a tensor on a GPU
        tokens = np.asarray(None)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise UserError("the tokens of a prompt are not integers", "give a list of token ids for each prompt")
    return prompt


def check_batch(batch: int) -> int:
    """Return the number of sequences of a batch after checking it.

    Raises:
        UserError: it is no number of sequences that a session can hold.
    """
    return check_whole("the number of sequences", batch, 1, MOST_SEQUENCES)


def check_appended(tokens: Sequence[int], length: int, spec: ModelSpec) -> int:
    """Refuse tokens that cannot be appended to a sequence of ``length`` tokens, and return its length after them.

    Raises:
        UserError: no tokens, a token outside the vocabulary, or more tokens than the model has positions.
    """
    if len(tokens) == 0:
        raise UserError("the prompt is empty", "give at least one token")
    end = length + len(tokens)
    if end > spec.max_seqlen:
        raise UserError(f"the text has {end} tokens, the model has {spec.max_seqlen} positions", "shorten it")
    _check_vocabulary(tokens, spec)
    return end


def check_tokens(tokens: np.ndarray, lengths: np.ndarray, spec: ModelSpec, steps: int = 1) -> int:
    """Refuse tokens that a session cannot append to sequences of the given lengths.

    Args:
        steps: number of decode steps, the one that appends ``tokens`` included.

    Returns:
        Length of the longest sequence after these steps.

    Raises:
        UserError: a wrong shape or type, nothing prefilled, too few positions left, or a token outside
            the vocabulary.
    """
    # Plain integers, because CPU caches are cold between two steps and each NumPy call costs microseconds.
    if not isinstance(tokens, np.ndarray) or tokens.shape != lengths.shape or tokens.dtype.kind not in "iu":
        raise UserError(
            f"decode takes a NumPy array of integers of shape {lengths.shape}, got {_kind(tokens)}",
            "give one token id per sequence",
        )
    used = lengths.tolist()
    if min(used) == 0:
        raise UserError("nothing to continue", "call prefill first")
    longest, positions = max(used), spec.max_seqlen
    if longest >= positions:
        raise UserError(f"all {positions} positions of the model are used", "reset the session")
    if longest + steps > positions:
        raise UserError(f"{steps} more steps exceed the model's {positions} positions", "ask for fewer tokens")
    _check_vocabulary(tokens.tolist(), spec)
    return int(longest + steps)


def check_verified(tokens: np.ndarray, lengths: np.ndarray, spec: ModelSpec) -> int:
    """Refuse tokens, int64 ``(batch, seqlen)``, that a session cannot append to sequences of the given lengths.

    Returns:
        Length of the longest sequence after this step.

    Raises:
        UserError: as `check_tokens`.
    """
    batch = len(lengths)
    if (
        not isinstance(tokens, np.ndarray)
        or tokens.ndim != 2
        or len(tokens) != batch
        or not tokens.shape[1]
        or tokens.dtype.kind not in "iu"
    ):
        raise UserError(
            f"verify takes a NumPy array of integers of shape ({batch}, seqlen), got {_kind(tokens)}",
            "give at least one token id per sequence",
        )
    longest = check_tokens(tokens[:, 0], lengths, spec, tokens.shape[1])
    _check_vocabulary(tokens.ravel().tolist(), spec)
    return longest


def check_rewind(lengths: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Return the lengths to which sequences of ``used`` tokens are set back, as int64 ``(batch,)``.

    Raises:
        UserError: a length is below 1, or above the number of tokens of its sequence; or they are no such array.
    """
    if not isinstance(lengths, np.ndarray):
        raise UserError(f"rewind takes a NumPy array, got {_kind(lengths)}", "give one length per sequence")
    if lengths.shape != used.shape or lengths.dtype.kind not in "iu" or (lengths < 1).any() or (lengths > used).any():
        raise UserError(
            f"sequences of {used.tolist()} tokens cannot be set back to {lengths.tolist()}",
            "give a length from 1 to the present one for each sequence",
        )
    return lengths.astype(np.int64)


def budget_scalars(spec: ModelSpec, budget: Budget, rest: Rest) -> dict[str, int]:
    """The scalars of a budget, by the names of their inputs.

    Args:
        rest: "shadow" for a bundle with a low-bit copy of all matrices.

    Raises:
        UserError: the budget needs this copy, and there is none.
    """
    computed = budget.rest_with(rest == "shadow") == "shadow"
    return {REST: int(computed), SHORTLIST: budget.shortlist or spec.vocab_size, CERTIFY: int(budget.certify)}


def _kind(given: object) -> str:
    return f"{given.dtype} {given.shape}" if isinstance(given, np.ndarray) else type(given).__name__


def _check_vocabulary(tokens: Sequence[int], spec: ModelSpec) -> None:
    if min(tokens) < 0 or max(tokens) >= spec.vocab_size:
        bad = next(token for token in tokens if not 0 <= token < spec.vocab_size)
        raise UserError(f"token {bad} is outside the vocabulary of {spec.vocab_size}", "use the bundle's own tokenizer")
