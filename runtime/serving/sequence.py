"""A job that has a slot: its progress, and the choice of its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from shadowllm.models.sparsity import Unit
from shadowllm.models.spec import ModelSpec
from shadowllm.runtime.generation.chooser import Chooser
from shadowllm.runtime.generation.draft_length import draft_length_of
from shadowllm.runtime.generation.generate import kept_tokens
from shadowllm.runtime.generation.text import TextStream
from shadowllm.runtime.serving.drafts import Drafts
from shadowllm.runtime.serving.job import Finished, Job, Token
from shadowllm.runtime.serving.selection import summarise
from shadowllm.runtime.session import Decodes

LEAST_LOGPROB = -9999.0  # for a probability of zero, whose logarithm JSON cannot represent


def end_of(job: Job, spec: ModelSpec) -> int:
    """Return the length of prompt and text at which a job ends; see `generate`."""
    return min(len(job.request.prompts[0]) + job.request.max_new_tokens, spec.max_seqlen + 1)


class RunningSequence:
    """The sequence of a job in a slot.

    Args:
        backend: name of the backend, for errors.
        decodes: whether its decode steps are sparse or dense.

    Attributes:
        prefilled: number of prompt tokens that the session has.
        new_tokens: number of tokens generated so far.
        drafts: of a lossless text, if its steps are sparse.
        last_event: when the job was submitted, or got its last token, as `time.monotonic`.
    """

    def __init__(self, job: Job, slot: int, spec: ModelSpec, backend: str, decodes: Decodes) -> None:
        request = job.request
        self.job, self.slot, self._spec = job, slot, spec
        self.prompt: Sequence[int] = request.prompts[0]
        self._end = end_of(job, spec)
        self._chooser = Chooser(request.prompts, request.sampling, request.stop_ids, backend)
        tokenizer = request.tokenizer
        self._stream = None if tokenizer is None else TextStream(tokenizer, self.prompt, request.stops)
        self._draft_length = draft_length_of(request.drafting) if decodes == "sparse" else None
        self.drafts: Drafts | None = None
        self.prefilled = self.new_tokens = 0
        self.last_event = job.submitted

    @property
    def in_prefill(self) -> bool:
        """Whether tokens of the prompt are missing in the session."""
        return self.prefilled < len(self.prompt)

    @property
    def decodes(self) -> bool:
        """Whether the next step of the batch appends a token to it."""
        return not self.in_prefill and not self.waits_for_verification

    @property
    def waits_for_verification(self) -> bool:
        """Whether it has a complete draft."""
        return self.drafts is not None and self.drafts.complete

    @property
    def length(self) -> int:
        """Number of tokens of its text that are computed for good: all but the last one."""
        return len(self._chooser.texts[0]) - 1

    @property
    def ahead(self) -> list[int]:
        """The last token of its text, and the drafted ones after it."""
        return [self._chooser.texts[0][-1], *(self.drafts.tokens if self.drafts else ())]

    def take(self, logits: np.ndarray, selection: Mapping[Unit, np.ndarray] | None) -> list[Token | Finished]:
        """Choose the next token.

        Args:
            logits: float32 ``(vocab_size,)``.
            selection: of the step that computed them, if the job asked for it.

        Returns:
            The events of this step; the last one is `Finished` if the text has ended.

        Raises:
            UserError: as `Chooser.choose`.
        """
        events = self._events([int(self._chooser.choose(logits[None])[0])], logits[None], selection)
        if self._draft_length is not None and self._chooser.running[0]:
            self.drafts = Drafts(self._chooser, self._draft_length, self._end)
        return events

    def draft(self, logits: np.ndarray, seconds: float) -> list[Token | Finished]:
        """Draft a token, which is no event yet; see `Drafts.add`."""
        assert self.drafts is not None
        self.drafts.add(logits, seconds)
        return []

    def accept(self, logits: np.ndarray, seconds: float) -> list[Token | Finished]:
        """Take the verified tokens of a draft; see `Drafts.accept` and `take`."""
        assert self.drafts is not None
        return self._events(self.drafts.accept(logits, seconds), logits, None)

    def _events(
        self, tokens: list[int], logits: np.ndarray, selection: Mapping[Unit, np.ndarray] | None
    ) -> list[Token | Finished]:
        """The events of the last tokens of the text; row i of ``logits`` is that of token i."""
        stream, pieces = self._stream, list[str]()

        def stops_at(token: int) -> bool:
            pieces.append(stream.push(token) if stream else "")
            return stream is not None and stream.stopped

        kept = kept_tokens(self._chooser, 0, tokens, self._end, self.job.request.stop_ids, stops_at)
        events: list[Token | Finished] = []
        for token, piece, row in zip(kept, pieces, logits, strict=False):
            self.new_tokens += 1
            logprob: float | None = None
            top: tuple[tuple[int, float], ...] = ()
            if self.job.logprobs is not None:
                logprob, top = log_probabilities(row, token, self.job.logprobs)
            summary = summarise(self._spec, selection) if selection else None
            events.append(Token(token, piece, logprob, top, summary))
        if not self._chooser.running[0]:
            piece = stream.finish() if stream else ""
            stopped = len(kept) < len(tokens) or (stream is not None and stream.stopped)
            full = len(self._chooser.texts[0]) >= self._end and not stopped
            events.append(Finished("length" if full else "stop", piece))
        return events


def log_probabilities(logits: np.ndarray, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the logarithm of the probability of a token, and the ``n`` most probable tokens with the same.

    Args:
        logits: float32 ``(vocab_size,)``.
    """
    shifted = logits.astype(np.float64) - logits.max()
    total = np.log(np.exp(shifted).sum())
    n = min(n, len(logits))
    best = np.argpartition(-shifted, n - 1)[:n] if n else np.zeros(0, dtype=np.int64)
    best = best[np.argsort(-shifted[best], kind="stable")]

    def logprob(index: int) -> float:
        return max(LEAST_LOGPROB, float(shifted[index] - total))

    return logprob(token), tuple((int(index), logprob(index)) for index in best)
