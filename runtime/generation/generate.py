"""The generation loop, which works with any `Session`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, zip_longest
from weakref import WeakKeyDictionary

import numpy as np

from shadowllm.errors import UserError
from shadowllm.runtime.generation.chooser import Chooser
from shadowllm.runtime.generation.draft_length import DraftLength
from shadowllm.runtime.generation.sampling import Sampling
from shadowllm.runtime.generation.speculative import rounds
from shadowllm.runtime.session import SamplingSession, Session, VerifyingSession

Taken = list[list[int]]  # new tokens of each sequence

# What writes text with each session at present.
_writers: WeakKeyDictionary[Session, object] = WeakKeyDictionary()


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    stops_at: Callable[[int, int], bool] | None = None,
    draft_length: DraftLength | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts token by token.

    The session is reset first. A sequence ends at a stop id, which is not yielded, or after a token at which
    ``stops_at`` is true, which is yielded. All sequences end when the longest could have used all positions of the
    model.

    Args:
        stops_at: says whether a sequence ends after a token; called with the sequence's row and each of its new tokens
            in order.
        draft_length: decode losslessly with drafts of this length, see `speculative`. If the session decodes dense,
            there is nothing to draft. None decodes with the session's own steps.

    Yields:
        The new token of each sequence; None for those that have ended, or that have fewer new tokens in this round.

    Raises:
        UserError: as `Session.prefill`, logits that are NaN or infinite, no token left to choose, a session that
            cannot verify drafts, or another generation that began with the session.
    """
    own = object()
    verifying = _verifying(session) if draft_length is not None and session.decodes == "sparse" else None
    chooser = Chooser(prompts, sampling or Sampling(), stop_ids, type(session).__name__)
    _writers[session] = own
    session.reset(len(prompts))
    first = chooser.choose(session.prefill(prompts))
    limit = min(max_new_tokens, session.spec.max_seqlen - max(map(len, prompts)) + 1)
    ends = np.array([len(prompt) + limit for prompt in prompts])
    following = (
        _following(session, first, limit - 1, chooser)
        if verifying is None or draft_length is None
        else rounds(verifying, chooser, ends, draft_length)
    )
    for taken in chain([_one_each(first)], following):
        kept = [
            kept_tokens(chooser, row, tokens, int(ends[row]), stop_ids, stops_at and partial(stops_at, row))
            if chooser.running[row]
            else []
            for row, tokens in enumerate(taken)
        ]
        yield from map(list, zip_longest(*kept))
        if not chooser.running.any():
            return
        if _writers.get(session) is not own:
            raise UserError("another text was begun with this model", "finish a text first, or load the model twice")


def _verifying(session: Session) -> VerifyingSession:
    """Return the session if it can verify drafts.

    Raises:
        UserError: it cannot.
    """
    if not isinstance(session, VerifyingSession):
        raise UserError(f"{type(session).__name__} cannot verify drafts", "decode without drafts")
    if not session.longest_draft:
        raise UserError(
            "this session cannot verify drafts",
            "prefill with the dense graph, or build the engines again with --max-draft 8",
        )
    return session


def _following(session: Session, tokens: np.ndarray, steps: int, chooser: Chooser) -> Iterator[Taken]:
    """The tokens after ``tokens``, one per sequence and step."""
    alone = None
    if steps > 0 and chooser.plain:
        alone = session.decode_greedy(tokens, steps)
    elif steps > 0 and chooser.only_sampled and isinstance(session, SamplingSession):
        alone = session.decode_sampled(tokens, steps, chooser.sampling, chooser.uniforms(steps))
    if alone is not None:
        for tokens in alone:
            for row in chooser.rows:
                chooser.append(row, int(tokens[row]))
            yield _one_each(tokens)
        return
    for _ in range(steps):
        tokens = chooser.choose(session.decode(tokens))
        yield _one_each(tokens)


def _one_each(tokens: np.ndarray) -> Taken:
    return [[token] for token in tokens.tolist()]


def kept_tokens(
    chooser: Chooser,
    row: int,
    tokens: list[int],
    end: int,
    stop_ids: Sequence[int],
    stops_at: Callable[[int], bool] | None,
) -> list[int]:
    """The new tokens of a sequence up to its end; if that is among them, the sequence is not running any more.

    Args:
        tokens: the last tokens of its text.
        end: length of the text at which it ends.
        stops_at: as for `generate`, of this sequence.
    """
    text = chooser.texts[row]
    before = len(text) - len(tokens)
    for index, token in enumerate(tokens):
        if token in stop_ids or before + index >= end:
            chooser.running[row] = False
            return tokens[:index]
        if stops_at is not None and stops_at(token):
            chooser.running[row] = False
            return tokens[: index + 1]
    chooser.running[row] = len(text) < end
    return tokens
