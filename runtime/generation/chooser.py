"""The choice of tokens from logits, for every sequence of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowllm.errors import UserError
from shadowllm.runtime.generation.sampling import Sampling

if TYPE_CHECKING:
    import torch


class LogitsError(UserError):
    """A model computed NaN or infinite logits."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch in this thread alone.

    Between two small operations, its other threads spin and take the cores from ONNX Runtime. A step then takes twice
    as long.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Chooser:
    """Chooses the next token of every sequence of a batch.

    Attributes:
        texts: token ids of each sequence: the prompt, and the tokens chosen so far.
        running: bool ``(batch,)``, which sequences have not ended; tokens chosen for the others do not matter.
        plain: whether it always takes the token with the largest unchanged logit.
        sampling: the options.
        only_sampled: whether tokens are drawn, and no option depends on the text so far.

    Args:
        prompts: token ids of each sequence.
        stop_ids: tokens that end a sequence.
        backend: name of the backend, for the error about logits that are NaN or infinite.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, stop_ids: Sequence[int] = (), backend: str = ""
    ) -> None:
        self.texts = [list(prompt) for prompt in prompts]
        self._processors = [sampling.processors(len(prompt), stop_ids) for prompt in prompts]
        independent = ("temperature", "top_k", "top_p", "seed", "min_p")  # of the text so far
        options = {name: getattr(sampling, name) for name in independent}
        self.sampling = sampling
        self.only_sampled = sampling.temperature > 0 and sampling == Sampling(**options)
        self._sampled, self._backend = sampling.temperature > 0, backend
        self.running = np.ones(len(prompts), dtype=bool)
        self.plain = not self._sampled and not any(self._processors)
        if self._sampled:
            import torch  # not at the top, because the command line imports this package for the names of backends

            self._generator = torch.Generator().manual_seed(sampling.seed)

    @property
    def rows(self) -> list[int]:
        """The sequences that have not ended."""
        return [int(row) for row in np.flatnonzero(self.running)]

    def choose(self, logits: np.ndarray) -> np.ndarray:
        """Choose one token for each row of float32 ``(batch, vocab_size)`` logits, and append it; int64 ``(batch,)``.

        Raises:
            UserError: logits of a running sequence are NaN or +Inf, or its sampling options leave no token.
        """
        for row in self.rows:
            self.check(row, logits[row])
        tokens = logits.argmax(axis=-1)
        for row in self.rows:
            if not self.plain:
                tokens[row] = self.draw(self.probabilities(row, logits[row]))
            self.texts[row].append(int(tokens[row]))
        return tokens

    def probabilities(self, row: int, logits: np.ndarray, ahead: Sequence[int] = ()) -> np.ndarray:
        """The distribution of a sequence's next token under the sampling options, float32 ``(vocab_size,)``.

        Without sampling, the chosen token has all of the probability.

        Args:
            logits: float32 ``(vocab_size,)``.
            ahead: tokens between the sequence's text and the next token.

        Raises:
            UserError: as `choose`.
        """
        self.check(row, logits, len(ahead))
        text = [*self.texts[row], *ahead]
        found = np.zeros(logits.shape, dtype=np.float32)
        with one_thread():
            tokens, scores = self._processed(row, logits, text)
            largest = float(scores.max())
            if not largest < np.inf:
                raise UserError(
                    f"the sampling options make a logit infinite for sequence {row + 1}, position {len(text)}",
                    "choose a repetition penalty nearer to 1, or a higher temperature",
                )
            if largest == -np.inf:
                raise UserError(
                    f"no token is left for sequence {row + 1} at position {len(text)}",
                    "suppress fewer tokens, or lower the n-gram size that may not repeat",
                )
            if self._sampled:
                found[tokens] = scores[0].softmax(dim=-1).numpy()
            else:
                found[int(scores.argmax())] = 1
        return found

    def _processed(self, row: int, logits: np.ndarray, text: list[int]) -> tuple[Any, torch.Tensor]:
        """The scores of a sequence's next token, float32 ``(1, tokens)``, and which tokens have one.

        After top-k, the others have none. So top-p does not sort the whole vocabulary.
        """
        import torch
        from transformers import TopKLogitsWarper

        ids, scores = torch.LongTensor([text]), torch.tensor(logits)[None]
        tokens: Any = slice(None)
        for processor in self._processors[row]:  # the list's own call inspects the signature of each every time
            scores = processor(ids, scores)
            if isinstance(processor, TopKLogitsWarper):
                kept = torch.nonzero(scores[0] > -np.inf)[:, 0].numpy()
                if not len(kept):  # no token is left
                    break
                tokens, scores = kept, scores[:, kept]
        return tokens, scores

    def draw(self, probabilities: np.ndarray) -> int:
        """A token drawn from ``(vocab_size,)`` probabilities; the most probable one without sampling."""
        if not self._sampled:
            return int(probabilities.argmax())
        up_to = np.cumsum(probabilities, dtype=np.float64)
        place = min(self.uniform() * up_to[-1], np.nextafter(up_to[-1], 0))  # the product may be rounded up
        return int(np.searchsorted(up_to, place, side="right"))

    def uniforms(self, steps: int) -> np.ndarray:
        """Random numbers in [0, 1) for steps that are drawn elsewhere, float32 ``(batch, steps)``."""
        import torch

        return torch.rand((len(self.texts), steps), generator=self._generator).numpy()

    def uniform(self) -> float:
        """A random number, uniform in [0, 1); 0 without sampling."""
        if not self._sampled:
            return 0.0
        import torch

        return float(torch.rand((), dtype=torch.float64, generator=self._generator))

    def check(self, row: int, logits: np.ndarray, ahead: int = 0) -> None:
        """Refuse logits ``(vocab_size,)`` of a sequence that are NaN or +Inf.

        Args:
            ahead: number of tokens between the sequence's text and the next token.

        Raises:
            LogitsError: they are.
        """
        if not (logits < np.inf).all():  # a comparison with NaN is false
            raise self._error(row, ahead)

    def append(self, row: int, token: int) -> None:
        """Append a token that the session chose for a sequence; it is negative if the logits are NaN or infinite.

        Raises:
            LogitsError: they are.
        """
        if token < 0:
            raise self._error(row)
        self.texts[row].append(token)

    def _error(self, row: int, ahead: int = 0) -> LogitsError:
        return LogitsError(
            f"{self._backend} computed NaN or infinite logits for sequence {row + 1}, position "
            f"{len(self.texts[row]) + ahead}",
            "export in bf16 or fp32; if that does not help, the model's weights are damaged",
        )
