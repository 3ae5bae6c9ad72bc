"""A dense step over several tokens per sequence, with its buffers bound."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shadowllm.models.spec import ModelSpec
from shadowllm.runtime.ort.graph import OrtGraph


class Verification:
    """Runs ``dense.onnx`` over ``seqlen`` tokens per sequence and returns the logits after each.

    Args:
        graph: the dense graph.
        spec: the model.
        batch, seqlen: number of sequences, and of tokens of each.
        cache: the inputs and outputs of the graph for the cache, which share memory.
    """

    def __init__(
        self, graph: OrtGraph, spec: ModelSpec, batch: int, seqlen: int, cache: Mapping[str, np.ndarray]
    ) -> None:
        self._input_ids, self._positions, kept = (np.zeros((batch, seqlen), dtype=np.int64) for _ in range(3))
        kept[:] = np.arange(seqlen)
        self._logits = np.zeros((batch, seqlen, spec.vocab_size), dtype=np.float32)
        buffers: dict[str, np.ndarray] = {
            "input_ids": self._input_ids,
            "position_ids": self._positions,
            "logits_to_keep": kept,
            "logits": self._logits,
            **cache,
        }
        self._run = graph.bind(buffers, buffers)

    def __call__(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Run the step.

        Args:
            tokens: int64 ``(batch, seqlen)``.
            lengths: int64 ``(batch,)``, tokens of each sequence before this step.

        Returns:
            float32 ``(batch, seqlen, vocab_size)``; the next call overwrites it.
        """
        self._input_ids[:] = tokens
        self._positions[:] = lengths[:, None] + np.arange(tokens.shape[1])
        self._run()
        return self._logits
