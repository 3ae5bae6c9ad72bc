"""A dense step over several tokens per sequence, with its buffers bound."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shadowllm.bundle.selection_names import RECOMPUTED
from shadowllm.runtime.ort.decode_step import Selections, step_buffers
from shadowllm.runtime.ort.loaded_bundle import EVERYTHING, LoadedBundle


class Verification:
    """Runs a dense step over ``seqlen`` tokens per sequence and returns the logits after each.

    Args:
        bundle: with its graphs loaded.
        batch, seqlen: number of sequences, and of tokens of each.
        cache: the inputs and outputs of the graphs for the cache, which share memory.
    """

    def __init__(self, bundle: LoadedBundle, batch: int, seqlen: int, cache: Mapping[str, np.ndarray]) -> None:
        self._input_ids, self._positions, kept = (np.zeros((batch, seqlen), dtype=np.int64) for _ in range(3))
        kept[:] = np.arange(seqlen)
        buffers = step_buffers(bundle.spec, self._input_ids, self._positions, kept, cache)
        self._logits = buffers["logits"]
        if bundle.all_active:
            selections = Selections(bundle, 1)  # the same for all tokens, so that they share the reading of the rows
            selections.ask([bundle.numbers(EVERYTHING)])
            buffers |= selections.buffers() | {RECOMPUTED: np.zeros(batch * seqlen, dtype=np.int32)}
        self._runs = [graph.bind(buffers, buffers) for graph in bundle.verifying(batch, seqlen)]

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
        for run in self._runs:
            run()
        return self._logits
