"""A step over several tokens of each sequence, with the logits after the last one."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shadowllm.runtime.ort.decode_step import Selections
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
    batch, spec = len(input_ids), bundle.spec
    logits = np.zeros((batch, 1, spec.vocab_size), dtype=np.float32)
    buffers = {
        "input_ids": input_ids,
        "position_ids": positions,
        "logits_to_keep": last[:, None],
        "logits": logits,
        "hidden": np.zeros((*input_ids.shape, spec.hidden_size), dtype=np.float32),
        **cache,
    }
    names: tuple[str, ...] = ("dense",)
    if bundle.prefills == "sparse":
        names, selections = bundle.names("dense"), Selections(bundle, batch)
        selections.ask([bundle.numbers(EVERYTHING)] * batch)
        buffers |= selections.buffers()
    for name in names:
        bundle.pieces[name].bind(buffers, buffers)()
    return logits[:, 0]
