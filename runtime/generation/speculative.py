"""Lossless decoding: sparse steps draft tokens, and one dense step verifies them.

A round drafts k tokens with the sparse model, and runs the dense model over k + 1 positions. Its logits decide how many
drafted tokens are accepted, and give one more token. So a round gives 1 to k + 1 tokens, which are distributed as those
of the dense model: "speculative sampling" (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from shadowllm.runtime.generation.chooser import Chooser
from shadowllm.runtime.generation.draft_length import DraftLength, Round
from shadowllm.runtime.session import VerifyingSession


@dataclass(frozen=True)
class Draft:
    """The drafted tokens of a round.

    Attributes:
        tokens: int64 ``(batch, length)``.
        probabilities: by sequence, for each token the distribution it was drawn from, float32 ``(vocab_size,)``. Empty
            if tokens are chosen by their unchanged logits.
    """

    tokens: np.ndarray
    probabilities: Sequence[Sequence[np.ndarray]]


def rounds(
    session: VerifyingSession, chooser: Chooser, ends: np.ndarray, draft_length: DraftLength
) -> Iterator[list[list[int]]]:
    """Continue the texts of ``chooser`` in rounds; the session has all tokens of each text but the last.

    Args:
        chooser: new tokens are appended to its texts. Its ``running`` may change between two rounds.
        ends: int64 ``(batch,)``, length of each text at which it ends. No text becomes longer.
        draft_length: decides how many tokens a round drafts.

    Yields:
        The new tokens of each sequence: at least one if it is running, else none.

    Raises:
        UserError: as `VerifyingSession.verify`, or as `Chooser.choose`.
    """
    while True:
        used = np.array([len(text) for text in chooser.texts])
        # Sequences that have ended stay in the batch. They are set back, so that they do not need free positions.
        lengths = np.where(chooser.running, used - 1, 1)
        left = int((ends - used)[chooser.running].min())
        length = min(draft_length.choose(), session.longest_draft, left - 1)
        last = np.array([text[-1] for text in chooser.texts])
        start = perf_counter()
        drafted = draft(session, chooser, lengths, last, length)
        middle = perf_counter()
        taken = accept(chooser, drafted, verify(session, lengths, last, drafted))
        end = perf_counter()
        accepted = [len(taken[row]) - 1 for row in chooser.rows]
        draft_length.observe(Round(length, accepted, middle - start, end - middle))
        yield taken


def draft(session: VerifyingSession, chooser: Chooser, lengths: np.ndarray, last: np.ndarray, length: int) -> Draft:
    """Draft tokens with sparse steps.

    Args:
        lengths: int64 ``(batch,)``, tokens of each sequence that are in the cache.
        last: int64 ``(batch,)``, the token after them.
        length: number of tokens to draft per sequence.
    """
    session.rewind(lengths)
    found: list[np.ndarray] = []
    probabilities: list[list[np.ndarray]] = [[] for _ in last]
    ahead = session.decode_greedy(last, length) if chooser.plain and length else None
    if ahead is not None:
        found.extend(ahead)
    while len(found) < length:
        logits = session.decode(found[-1] if found else last)
        tokens = logits.argmax(axis=-1)
        for row in [] if chooser.plain else chooser.rows:
            own = chooser.probabilities(row, logits[row], [int(before[row]) for before in found])
            probabilities[row].append(own)
            tokens[row] = chooser.draw(own)
        found.append(tokens)
    return Draft(np.stack(found, axis=1) if found else np.zeros((len(last), 0), dtype=np.int64), probabilities)


def verify(session: VerifyingSession, lengths: np.ndarray, last: np.ndarray, drafted: Draft) -> np.ndarray:
    """Return the dense model's logits after the last token and after each drafted one.

    They are float32 ``(batch, length + 1, vocab_size)``. The step replaces the draft's cache entries.
    """
    session.rewind(lengths)
    return session.verify(np.concatenate((last[:, None], drafted.tokens), axis=1))


def accept(chooser: Chooser, drafted: Draft, logits: np.ndarray) -> list[list[int]]:
    """Append the accepted tokens and one more to each running text, and return them.

    Args:
        logits: from `verify`.

    Raises:
        UserError: as `Chooser.choose`, for the logits that are used.
    """
    best = logits.argmax(axis=-1) if chooser.plain else None
    taken: list[list[int]] = [[] for _ in chooser.texts]
    for row in chooser.rows:
        tokens = drafted.tokens[row].tolist()
        if best is not None:
            taken[row] = best[row, : count_agreeing(tokens, best[row]) + 1].tolist()
            for ahead in range(len(taken[row])):
                chooser.check(row, logits[row, ahead], ahead)
        else:
            taken[row] = _sample(chooser, row, tokens, drafted.probabilities[row], logits[row])
        chooser.texts[row].extend(taken[row])
    return taken


def _sample(
    chooser: Chooser, row: int, tokens: list[int], drafted: Sequence[np.ndarray], logits: np.ndarray
) -> list[int]:
    """Accept drafted tokens of one sequence by speculative sampling, and draw the token after them."""
    for ahead, (token, own) in enumerate(zip(tokens, drafted, strict=True)):
        dense = chooser.probabilities(row, logits[ahead], tokens[:ahead])
        if not accepts(dense[token], own[token], chooser.uniform()):
            return [*tokens[:ahead], chooser.draw(residual(dense, own))]
    return [*tokens, chooser.draw(chooser.probabilities(row, logits[-1], tokens))]


def count_agreeing(tokens: Sequence[int], best: Sequence[int] | np.ndarray) -> int:
    """Return how many drafted tokens are the dense model's, up to the first other one.

    Args:
        tokens: drafted tokens.
        best: the most probable tokens of the dense model at their positions; there may be more.
    """
    return next((index for index, token in enumerate(tokens) if token != best[index]), len(tokens))


def accepts(dense: float, drafted: float, uniform: float) -> bool:
    """Whether a drafted token is accepted, which has the probability min(1, dense / drafted).

    Args:
        dense, drafted: probabilities of the token in the dense model and in the distribution it was drawn from.
        uniform: a random number in [0, 1).
    """
    return uniform * drafted < dense


def residual(dense: np.ndarray, drafted: np.ndarray) -> np.ndarray:
    """The distribution of the token after a rejection: max(0, dense - drafted), normalised; ``(vocab_size,)``.

    Then accepted and rejected tokens together have the distribution ``dense``.
    """
    rest = np.maximum(dense - drafted, 0)
    total = rest.sum()
    return rest / total if total > 0 else dense  # they differ by rounding alone
