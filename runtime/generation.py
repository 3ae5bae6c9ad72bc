"""The generation loop, written once over any `Session`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from shadowllm.errors import UserError
from shadowllm.runtime.session import Greedy, Session


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    Attributes:
        temperature: 0 takes the most probable token (greedy); above 0 samples.
        top_k: keep only the k most probable tokens; 0 keeps all.
        top_p: keep the fewest most probable tokens whose probabilities reach this sum (nucleus
            sampling, Holtzman et al., arXiv 1904.09751); 1 keeps all.
        seed: of the random draws.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature} is negative", "0 is greedy, 1 samples as trained")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is negative", "0 keeps all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is not in (0, 1]", "1 keeps all tokens")


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Sequence[int] = (),
) -> Iterator[list[int | None]]:
    """Continue prompts, one token of every sequence at a time.

    The session is reset first. A sequence ends with a stop id, which is not yielded, or when the
    model has no position left.

    Yields:
        The new token of each sequence, None for those that have ended.

    Raises:
        UserError: what `Session.prefill` refuses.
    """
    sampling = sampling or Sampling()
    generator = np.random.default_rng(sampling.seed)
    session.reset(len(prompts))
    first = sample(session.prefill(prompts), sampling, generator)
    steps = min(max_new_tokens - 1, session.spec.max_seqlen - max(map(len, prompts)))
    running = np.ones(len(prompts), dtype=bool)
    following = _following(session, first, steps, sampling, generator)
    for tokens in islice(chain([first], following), max_new_tokens):
        running &= ~np.isin(tokens, stop_ids)
        if not running.any():
            return
        yield [int(token) if alive else None for token, alive in zip(tokens, running, strict=True)]


def _following(
    session: Session, tokens: np.ndarray, steps: int, sampling: Sampling, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """The tokens that follow ``tokens``, as many as there are steps."""
    if steps > 0 and sampling.temperature == 0 and isinstance(session, Greedy):
        yield from session.decode_greedy(tokens, steps)
        return
    for _ in range(steps):
        tokens = sample(session.decode(tokens), sampling, generator)
        yield tokens


def sample(logits: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> np.ndarray:
    """Draw one token per row of float32 ``(batch, vocab_size)`` logits; int64 ``(batch,)``."""
    if sampling.temperature == 0:
        return logits.argmax(axis=-1)
    return np.array([_draw(row / sampling.temperature, sampling, generator) for row in logits.astype(np.float64)])


def _draw(scores: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> int:
    order = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    weights = np.exp(scores[order] - scores[order[0]])
    weights /= weights.sum()
    # The first token always stays; each further one as long as those before it fall short of top_p.
    keep = 1 + int(np.searchsorted(np.cumsum(weights)[:-1], sampling.top_p)) if sampling.top_p < 1 else len(order)
    keep = min(keep, len(order))
    return int(generator.choice(order[:keep], p=weights[:keep] / weights[:keep].sum()))
