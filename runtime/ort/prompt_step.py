"""A step over several tokens of each sequence, with the logits after the last one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shadowllm.runtime.ort.decode_step import Selections, step_buffers
from shadowllm.runtime.ort.loaded_bundle import EVERYTHING, LoadedBundle


def run_prompt(
    bundle: LoadedBundle,
    input_ids: np.ndarray,
    positions: np.ndarray,
    last: np.ndarray,
    cache: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Run a dense step, or a sparse one with everything active if the bundle prefills with sparse graphs.

    Args:
        bundle: with its graphs loaded.
        input_ids, positions: int64 ``(batch, seqlen)``.
        last: of each sequence, the place of the token whose logits are wanted, int64 ``(batch,)``.
        cache: of the sequences, see `KVCache.buffers`.

    Returns:
        float32 ``(batch, vocab_size)``.
    """
    buffers = step_buffers(bundle.spec, input_ids, positions, last[:, None], cache)
    graphs = bundle.prefilling().values()
    if any(name not in buffers for graph in graphs for name in graph.inputs):  # the numbers of a budget
        selections = Selections(bundle, len(input_ids))
        selections.ask([bundle.numbers(EVERYTHING)] * len(input_ids))
        buffers |= selections.buffers()
    for graph in graphs:
        graph.bind(buffers, buffers)()
    return buffers["logits"][:, 0]
