"""The generation loop, which works with any `Session`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

import numpy as np

from shadowllm.errors import UserError
from shadowllm.runtime.generation.sampling import Sampling
from shadowllm.runtime.session import Session

if TYPE_CHECKING:
    from transformers import StoppingCriteria


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
    stopping: StoppingCriteria | None = None,
) -> Iterator[list[int | None]]:
    """Continue prompts; each step makes one token per sequence.

    The session is reset first. A sequence ends at a stop id, which is not yielded, or after a token at which
    ``stopping`` is true, which is yielded. All sequences end when the longest has used all positions of the model.

    Args:
        stopping: a criterion of `transformers`, as `StopStringCriteria`; it is called with prompt and new tokens of
            one sequence.

    Yields:
        The new token of each sequence, None for those that have ended.

    Raises:
        UserError: as `Session.prefill`, logits that are NaN or infinite, or no token left to choose.
    """
    chooser = Chooser(prompts, sampling or Sampling(), stop_ids, type(session).__name__)
    session.reset(len(prompts))
    first = chooser.choose(session.prefill(prompts))
    texts = [list(prompt) for prompt in prompts]
    steps = min(max_new_tokens - 1, session.spec.max_seqlen - max(map(len, prompts)))
    for tokens in islice(chain([first], _following(session, first, steps, chooser)), max_new_tokens):
        chooser.running &= ~np.isin(tokens, stop_ids)
        if not chooser.running.any():
            return
        yield [int(token) if alive else None for token, alive in zip(tokens, chooser.running, strict=True)]
        if stopping is not None:
            for row in np.flatnonzero(chooser.running):
                texts[row].append(int(tokens[row]))
                chooser.running[row] = not _ends(texts[row], stopping)
            if not chooser.running.any():
                return


def _following(session: Session, tokens: np.ndarray, steps: int, chooser: Chooser) -> Iterator[np.ndarray]:
    """The tokens after ``tokens``, one per sequence and step."""
    alone = session.decode_greedy(tokens, steps) if steps > 0 and chooser.plain else None
    if alone is not None:
        yield from alone
        return
    for _ in range(steps):
        tokens = chooser.choose(session.decode(tokens))
        yield tokens


def _ends(text: Sequence[int], stopping: StoppingCriteria) -> bool:
    import torch

    return bool(stopping(torch.tensor([text]), None)[0])


class Chooser:
    """Chooses the next token of every sequence of a batch.

    Attributes:
        running: bool ``(batch,)``, which sequences have not ended; tokens chosen for the others do not matter.
        plain: whether it always takes the token with the largest unchanged logit.

    Args:
        prompts: token ids of each sequence.
        stop_ids: tokens that end a sequence.
        backend: name of the backend, for the error about logits that are NaN or infinite.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_ids: Sequence[int] = (), backend: str = ""
    ) -> None:
        self._texts = [list(prompt) for prompt in prompts]
        self._processors = [sampling.processors(len(prompt), stop_ids) for prompt in prompts]
        self._sampled, self._backend = sampling.temperature > 0, backend
        self.running = np.ones(len(prompts), dtype=bool)
        self.plain = not self._sampled and not any(self._processors)
        if self._sampled:
            import torch  # not at the top, because the command line imports this package for the names of backends

            self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: np.ndarray) -> np.ndarray:
        """Choose one token for each row of float32 ``(batch, vocab_size)`` logits; int64 ``(batch,)``.

        Raises:
            UserError: logits of a running sequence are NaN or +Inf, or its sampling options leave no token.
        """
        self._check(logits)
        tokens = logits.argmax(axis=-1)
        for row in np.flatnonzero(self.running).tolist():
            if not self.plain:
                tokens[row] = self._next(row, logits[row : row + 1])
            self._texts[row].append(int(tokens[row]))
        return tokens

    def _next(self, row: int, logits: np.ndarray) -> int:
        import torch

        scores = self._processors[row](torch.LongTensor([self._texts[row]]), torch.tensor(logits))
        if not scores.max() < torch.inf:
            raise UserError(
                f"the sampling options make a logit infinite for sequence {row + 1}, position {len(self._texts[row])}",
                "choose a repetition penalty nearer to 1, or a higher temperature",
            )
        if scores.max() == -torch.inf:
            raise UserError(
                f"no token is left for sequence {row + 1} at position {len(self._texts[row])}",
                "suppress fewer tokens, or lower the n-gram size that may not repeat",
            )
        if not self._sampled:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))

    def _check(self, logits: np.ndarray) -> None:
        sound = (logits < np.inf).all(axis=-1) | ~self.running  # a comparison with NaN is false
        if not sound.all():
            row = int(sound.argmin())
            raise UserError(
                f"{self._backend} computed NaN or infinite logits for sequence {row + 1}, position "
                f"{len(self._texts[row])}",
                "export in bf16 or fp32; if that does not help, the model's weights are damaged",
            )
