"""The drafts of a lossless text in a running batch."""

from __future__ import annotations

import numpy as np

from shadowllm.limits import LONGEST_DRAFT
from shadowllm.runtime.generation.chooser import Chooser
from shadowllm.runtime.generation.draft_length import DraftLength, Round
from shadowllm.runtime.generation.speculative import Draft, accept


class Drafts:
    """Rounds of drafts and verifications of one text, as `speculative.rounds`, but one step at a time.

    The sparse steps of a draft are those of the batch. So a draft's time is the one that the text has waited.

    Args:
        chooser: of one text, which has its first new token.
        draft_length: decides how many tokens a round drafts.
        end: length of the text at which it ends.

    Attributes:
        tokens: drafted tokens of this round.
    """

    def __init__(self, chooser: Chooser, draft_length: DraftLength, end: int) -> None:
        self._chooser, self._draft_length, self._end = chooser, draft_length, end
        self._begin()

    @property
    def complete(self) -> bool:
        """Whether the draft waits for its verification."""
        return len(self.tokens) >= self._length

    def add(self, logits: np.ndarray, seconds: float) -> None:
        """Draft a token.

        Args:
            logits: of a sparse step, float32 ``(vocab_size,)``.
            seconds: time of the step.

        Raises:
            UserError: as `Chooser.choose`.
        """
        token = int(logits.argmax())
        if not self._chooser.plain:
            self._probabilities.append(self._chooser.probabilities(0, logits, self.tokens))
            token = self._chooser.draw(self._probabilities[-1])
        self.tokens.append(token)
        self._seconds += seconds

    def accept(self, logits: np.ndarray, seconds: float) -> list[int]:
        """End the round: append the accepted tokens and one more to the text, and return them.

        Args:
            logits: of the dense step after the last token and after each drafted one, float32
                ``(length + 1, vocab_size)``.
            seconds: time of the step.

        Raises:
            UserError: as `Chooser.choose`, for the logits that are used.
        """
        length = len(self.tokens)
        drafted = Draft(np.array(self.tokens, dtype=np.int64)[None], [self._probabilities])
        (taken,) = accept(self._chooser, drafted, logits[None])
        self._draft_length.observe(Round(length, [len(taken) - 1], self._seconds, seconds))
        self._begin()
        return taken

    def _begin(self) -> None:
        left = self._end - len(self._chooser.texts[0])
        self._length = max(0, min(self._draft_length.choose(), LONGEST_DRAFT, left - 1))
        self.tokens: list[int] = []
        self._probabilities: list[np.ndarray] = []
        self._seconds = 0.0
