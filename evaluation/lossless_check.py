"""Whether lossless decoding writes the dense model's greedy text; ties that rounding decides are counted.

Dense steps over one and over several tokens may add in another order (native ones of nested integers do not). If the
two largest logits differ by less than that changes, either token is the dense model's. After such a place the
comparison goes on with the dense text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shadowllm.evaluation.generation import check_positions
from shadowllm.progress import Advance, no_progress
from shadowllm.runtime.generation.draft_length import AdaptiveLength, DraftLength, DraftRecord
from shadowllm.runtime.generation.generate import generate
from shadowllm.runtime.session import Session

NOISE = 1e-4  # of the largest logit: the tolerance of dense logits in float32


@dataclass(frozen=True)
class Difference:
    """A place where lossless decoding chose another token than the dense model.

    Attributes:
        prompt: number of the prompt.
        position: number of new tokens before it.
        gap: dense logit of the dense token minus that of the other, divided by the largest absolute logit.
        batch: number of prompts that were decoded together.
    """

    prompt: int
    position: int
    gap: float
    batch: int = 1

    @property
    def tie(self) -> bool:
        """Whether rounding decided it."""
        return self.gap < NOISE


@dataclass(frozen=True)
class Check:
    """The result of a comparison.

    Attributes:
        tokens: number of compared tokens.
        differences: all places with another token.
        drafts: what the drafts gave, one record per batch and continuation.
    """

    tokens: int
    differences: Sequence[Difference]
    drafts: Sequence[DraftRecord]

    @property
    def ties(self) -> list[Difference]:
        """The places that rounding decided."""
        return [found for found in self.differences if found.tie]

    @property
    def wrong(self) -> list[Difference]:
        """The places with a token that is not the dense model's."""
        return [found for found in self.differences if not found.tie]


@dataclass(frozen=True)
class _Expected:
    """A prompt, its greedy dense text, and the logits ``(vocab_size,)`` that each token was chosen from."""

    prompt: Sequence[int]
    tokens: Sequence[int]
    logits: Sequence[np.ndarray]

    def gap(self, at: int, other: int) -> float:
        """See `Difference`."""
        logits = self.logits[at]
        return float(logits[self.tokens[at]] - logits[other]) / float(np.abs(logits).max())


def compare_lossless(
    lossless: Session,
    dense: Session,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    draft_length: Callable[[], DraftLength] = AdaptiveLength,
    advance: Advance = no_progress,
    batches: Sequence[int] = (1,),
) -> Check:
    """Compare lossless greedy text with that of a dense session, token by token.

    Args:
        lossless: an open session that decodes sparse, at the budget of the drafts.
        dense: an open session of the same bundle whose steps are dense.
        prompts: token ids.
        new_tokens: number of new tokens of each prompt.
        draft_length: makes the draft lengths of a generation.
        advance: called with 1 after each prompt.
        batches: numbers of prompts that are decoded losslessly together; the text is compared for each of them.

    Raises:
        UserError: as `check_positions` or `generate`.
    """
    check_positions(prompts, new_tokens, dense.spec.max_seqlen)
    differences, drafts = list[Difference](), list[DraftRecord]()
    most = max(batches)
    for first in range(0, len(prompts), most):
        group = {
            number: _Expected(prompts[number], *_dense_text(dense, prompts[number], new_tokens))
            for number in range(first, min(first + most, len(prompts)))
        }
        for batch in batches:
            for start in range(0, len(group), batch):
                together = dict(list(group.items())[start : start + batch])
                for differing, record in _differences(lossless, together, draft_length):
                    differences.extend(differing)
                    drafts.append(record)
        advance(len(group))
    return Check(len(batches) * len(prompts) * new_tokens, differences, drafts)


def _differences(
    lossless: Session, together: Mapping[int, _Expected], draft_length: Callable[[], DraftLength]
) -> Iterator[tuple[list[Difference], DraftRecord]]:
    """Decode prompts together, and go on after the first difference of each until none is left.

    Yields:
        Differences and the record of the drafts, for each continuation.
    """
    starts = dict.fromkeys(together, 0)
    while starts:
        lengths, differing = draft_length(), list[Difference]()
        texts = [[*together[number].prompt, *together[number].tokens[:start]] for number, start in starts.items()]
        left = min(len(together[number].tokens) - start for number, start in starts.items())
        rows = zip(*generate(lossless, texts, left, draft_length=lengths), strict=True)
        for (number, start), row in zip(list(starts.items()), rows, strict=True):
            expected, found = together[number], [token for token in row if token is not None]
            end = next((i for i, token in enumerate(found, start) if token != expected.tokens[i]), None)
            if end is not None:
                differing.append(Difference(number, end, expected.gap(end, found[end - start]), len(together)))
            starts[number] = start + left if end is None else end + 1
            if starts[number] == len(expected.tokens):
                del starts[number]
        yield differing, lengths.record


def _dense_text(session: Session, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[np.ndarray]]:
    """The greedy tokens, and the logits that each was chosen from."""
    session.reset()
    logits = [session.prefill([prompt])[0].copy()]
    tokens = [int(logits[0].argmax())]
    while len(tokens) < new_tokens:
        logits.append(session.decode(np.array([tokens[-1]], dtype=np.int64))[0].copy())
        tokens.append(int(logits[-1].argmax()))
    return tokens, logits
