"""Draws the next tokens on the device, so that a sampled step needs no logits on the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shadowllm.runtime.generation.sampling import Sampling


class DeviceSampler:
    """Temperature, top-k, top-p and min-p for every sequence of a batch; the options are numbers on the device.

    So one CUDA graph serves all options. Random numbers are made on the host before the first step, one for each
    position, so that a step that is launched again draws the same token.

    Args:
        batch: number of sequences.
        steps: most steps of one call.
    """

    def __init__(self, batch: int, steps: int, device: torch.device) -> None:
        self._uniforms = torch.zeros((batch, steps), device=device)
        self._first = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self._temperature, self._top_p, self._min_p = (torch.ones((), device=device) for _ in range(3))
        self._top_k = torch.ones((), dtype=torch.int64, device=device)

    def begin(self, sampling: Sampling, uniforms: np.ndarray, lengths: np.ndarray) -> None:
        """Set the options and the random numbers of the next steps.

        Args:
            uniforms: in [0, 1), float32 ``(batch, steps)``.
            lengths: int64 ``(batch,)``, position of the first step's tokens.
        """
        self._uniforms[:, : uniforms.shape[1]].copy_(torch.from_numpy(uniforms))
        self._first.copy_(torch.from_numpy(lengths)[:, None])
        self._temperature.fill_(sampling.temperature)
        most = torch.iinfo(torch.int64).max
        self._top_k.fill_(min(sampling.top_k or most, most))
        self._top_p.fill_(sampling.top_p)
        self._min_p.fill_(sampling.min_p)

    def choose(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Draw a token of each sequence from float32 ``(batch, vocab_size)`` logits; int64 ``(batch, 1)``.

        As in `transformers`: the temperature first, then the k best, then the fewest whose probabilities reach
        ``top_p``, then those of at least ``min_p`` of the highest. Of equal logits at the end of the k best, only as
        many remain as fit. A sequence whose logits are NaN or infinite gets -1.

        Args:
            positions: int64 ``(batch, 1)``, of the step's tokens.
        """
        scores, tokens = (logits / self._temperature).sort(dim=-1, descending=True, stable=True)
        ranks = torch.arange(scores.shape[-1], device=scores.device)
        weights = scores.masked_fill(ranks >= self._top_k, -torch.inf).softmax(dim=-1)
        before = weights.cumsum(dim=-1) - weights  # the first token always remains
        weights = weights * ((before < self._top_p) | (ranks == 0) | (self._top_p >= 1))
        weights = weights * (weights >= self._min_p * weights[:, :1])
        total = weights.cumsum(dim=-1)
        drawn = self._uniforms.gather(1, (positions - self._first).clamp(0, self._uniforms.shape[1] - 1))
        place = (total <= drawn * total[:, -1:]).sum(dim=-1, keepdim=True)
        # Rounding may leave the place after the last token that remains. Of NaN none remains, and a place outside of
        # the tokens would destroy the CUDA context.
        last = ((weights > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
        # NaN is the first in descending order.
        return torch.where(scores[:, :1].isfinite(), tokens.gather(1, torch.minimum(place, last)), -1)
