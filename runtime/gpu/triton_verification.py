"""A dense step over several tokens per sequence on a GPU, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from shadowllm.models.decoder import KVCache
from shadowllm.runtime.gpu.cuda_graph import captured
from shadowllm.runtime.gpu.triton_step import StepDecoder


class Verification:
    """Runs the dense model over ``seqlen`` tokens per sequence and returns the logits after each.

    The graph is captured in the first call. The runs before the capture write the same cache entries as
    the step.

    Args:
        decoder: the session's decoder.
        cache: the session's cache.
        seqlen: number of tokens of each sequence.
        device: device of both.
    """

    def __init__(self, decoder: StepDecoder, cache: KVCache, seqlen: int, device: torch.device) -> None:
        self._decoder, self._cache, self._device = decoder, cache, device
        shape = (len(cache.keys[0]), seqlen)
        self._tokens, self._positions = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
        self._logits = torch.zeros((*shape, decoder.spec.vocab_size), device=device)
        self._replay: Callable[[], Any] | None = None

    @torch.no_grad()
    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Run the step.

        Args:
            tokens: int64 ``(batch, seqlen)``.
            lengths: int64 ``(batch,)``, tokens of each sequence before this step.

        Returns:
            float32 ``(batch, seqlen, vocab_size)``.
        """
        self._tokens.copy_(torch.from_numpy(tokens))
        self._positions.copy_(torch.from_numpy(lengths[:, None] + np.arange(tokens.shape[1])))
        if self._replay is None:
            self._replay = captured(self._step, self._device)
        self._replay()
        return self._logits.cpu().numpy()

    @torch.no_grad()
    def _step(self) -> None:
        decoder, cache = self._decoder, self._cache
        decoder.begin(self._positions, cache.keys[0].shape[2])
        x = decoder.embed(self._tokens, self._positions)
        for layer in range(decoder.spec.n_layers):
            x = decoder.layer(layer, x, self._positions, cache)
        self._logits.copy_(decoder.logits(x))
