"""Whether a session writes the same text as the dense model, over a few hundred greedy tokens.

Perplexity is a mean over tokens. It hides what a long text shows: one other token changes all that follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shadowllm.errors import UserError
from shadowllm.progress import Advance, no_progress
from shadowllm.runtime.generation.chooser import Chooser
from shadowllm.runtime.generation.sampling import Sampling
from shadowllm.runtime.recomputed_rows import RecomputedRows
from shadowllm.runtime.session import Session


@dataclass(frozen=True)
class Agreement:
    """How far a session's greedy texts agree with the dense model's.

    Attributes:
        divergences: of each text, the number of new tokens before the first different one; None if all are the same.
        lengths: of each text, the number of new tokens of the dense model.
        agreement: share of decode steps whose most probable token is the dense model's, after the dense model's own
            tokens. The first new token of a text is not counted, because the prefill chooses it.
    """

    divergences: Sequence[int | None]
    lengths: Sequence[int]
    agreement: float

    @property
    def identical(self) -> float:
        """The share of texts without a difference."""
        return sum(found is None for found in self.divergences) / len(self.divergences)

    @property
    def mean_divergence(self) -> float:
        """The mean number of new tokens before the first different one; a text without one counts its length."""
        return float(np.mean(self._same))

    @property
    def median_divergence(self) -> float:
        """The median of the same numbers."""
        return float(np.median(self._same))

    @property
    def _same(self) -> list[int]:
        pairs = zip(self.divergences, self.lengths, strict=True)
        return [length if found is None else found for found, length in pairs]


class Feed:
    """A session with one sequence, which is fed token by token.

    Args:
        prompt: token ids.
        prefilled: number of leading tokens to prefill; the others go through decode steps. None prefills all.

    Raises:
        UserError: as `Session.prefill` and `Session.decode`, or logits that are NaN or infinite.
    """

    def __init__(self, session: Session, prompt: Sequence[int], prefilled: int | None = None) -> None:
        self._session = session
        self._chooser = Chooser([prompt], Sampling(), backend=type(session).__name__)
        first = len(prompt) if prefilled is None else prefilled
        session.reset()
        self._logits = session.prefill([prompt[:first]])
        for token in prompt[first:]:
            self.append(token)

    @property
    def likeliest(self) -> int:
        """The most probable next token."""
        return int(self._chooser.choose(self._logits)[0])

    def append(self, token: int) -> None:
        """Run one decode step."""
        self._logits = self._session.decode(np.array([token], dtype=np.int64))

    def greedy(self, most: int) -> Iterator[int]:
        """Yield up to ``most`` greedy tokens. The last one may be an end-of-sequence token, and is not appended."""
        for left in range(most, 0, -1):
            token = self.likeliest
            yield token
            if left == 1 or token in self._session.spec.eos_token_ids:
                return
            self.append(token)


def greedy_texts(
    session: Session, prompts: Sequence[Sequence[int]], new_tokens: int, advance: Advance = no_progress
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, up to and with an end-of-sequence token.

    Args:
        session: an open session; it is reset for each prompt.
        prompts: token ids.
        new_tokens: the largest number of new tokens.
        advance: called with 1 after each prompt.

    Raises:
        UserError: as `check_positions`, or as `Feed`.
    """
    check_positions(prompts, new_tokens, session.spec.max_seqlen)
    found = []
    for prompt in prompts:
        found.append(list(Feed(session, prompt).greedy(new_tokens)))
        advance(1)
    return found


def compare_texts(
    session: Session,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    advance: Advance = no_progress,
    recomputed: RecomputedRows | None = None,
) -> Agreement:
    """Feed the dense model's texts to a session, and compare its most probable token at every step.

    This is the session's own greedy decoding up to the first different token, so no second pass is needed to find it.

    Args:
        session: an open session; it is reset for each prompt.
        prompts: token ids.
        texts: what `greedy_texts` found with the dense model.
        advance: called with 1 after each prompt.
        recomputed: where to add the rows of the output table that each decode step computed exactly.

    Raises:
        UserError: no text has a second token, or as `Feed`.
    """
    agreed, steps, divergences = 0, 0, []
    for prompt, text in zip(prompts, texts, strict=True):
        feed = Feed(session, prompt)
        same = [feed.likeliest == text[0]]
        for fed, expected in pairwise(text):
            feed.append(fed)
            if recomputed is not None:
                recomputed.add(session.recomputed)
            same.append(feed.likeliest == expected)
        agreed, steps = agreed + sum(same[1:]), steps + len(same) - 1
        divergences.append(None if all(same) else same.index(False))
        advance(1)
    if not steps:
        raise UserError("the dense model ends every text at once, so there is nothing to compare", "give other text")
    return Agreement(divergences, [len(text) for text in texts], agreed / steps)


def check_positions(
    prompts: Sequence[Sequence[int]], new_tokens: int, positions: int, remedy: str = "ask for fewer new tokens"
) -> None:
    """Refuse prompts that do not fit the model's positions together with ``new_tokens`` more tokens.

    Raises:
        UserError: there is no prompt, or one is too long.
    """
    longest = max(map(len, prompts), default=0)
    if not longest:
        raise UserError("nothing to decode", "give at least one prompt")
    if longest + new_tokens > positions:
        raise UserError(
            f"a prompt of {longest} tokens and {new_tokens} new ones exceed the model's {positions} positions",
            remedy,
        )
