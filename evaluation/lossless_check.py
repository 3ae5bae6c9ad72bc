"""Whether lossless decoding writes the dense model's greedy text; ties that rounding decides are counted.

Dense steps over one and over several tokens add in another order. If the two largest logits differ by less than that
changes, either token is the dense model's. After such a place the comparison goes on with the dense text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """

    prompt: int
    position: int
    gap: float

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
        drafts: what the drafts gave, one record per prompt and continuation.
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


def compare_lossless(
    lossless: Session,
    dense: Session,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    draft_length: Callable[[], DraftLength] = AdaptiveLength,
    advance: Advance = no_progress,
) -> Check:
    """Compare lossless greedy text with that of a dense session, token by token.

    Args:
        lossless: an open session that decodes sparse, at the budget of the drafts.
        dense: an open dense session of the same bundle.
        prompts: token ids.
        new_tokens: number of new tokens of each prompt.
        draft_length: makes the draft lengths of a generation.
        advance: called with 1 after each prompt.

    Raises:
        UserError: as `check_positions` or `generate`.
    """
    check_positions(prompts, new_tokens, dense.spec.max_seqlen)
    differences, drafts = [], []
    for number, prompt in enumerate(prompts):
        text, logits = _dense_text(dense, prompt, new_tokens)
        start = 0
        while start < new_tokens:
            lengths = draft_length()
            steps = generate(lossless, [[*prompt, *text[:start]]], new_tokens - start, draft_length=lengths)
            found = [int(row[0]) for row in steps if row[0] is not None]
            drafts.append(lengths.record)
            same = next((i for i, token in enumerate(found) if token != text[start + i]), None)
            if same is None:
                break
            at, other = logits[start + same], found[same]
            gap = float(at[text[start + same]] - at[other]) / float(np.abs(at).max())
            differences.append(Difference(number, start + same, gap))
            start += same + 1
        advance(1)
    return Check(len(prompts) * new_tokens, differences, drafts)


def _dense_text(session: Session, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[np.ndarray]]:
    """The greedy tokens, and the logits that each was chosen from."""
    session.reset()
    logits = [session.prefill([prompt])[0].copy()]
    tokens = [int(logits[0].argmax())]
    while len(tokens) < new_tokens:
        logits.append(session.decode(np.array([tokens[-1]], dtype=np.int64))[0].copy())
        tokens.append(int(logits[-1].argmax()))
    return tokens, logits
