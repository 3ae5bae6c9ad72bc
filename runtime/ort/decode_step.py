"""One decode step of some sequences: its graphs, with all buffers bound."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from shadowllm.bundle import selection_names as names
from shadowllm.models.sparsity import UNITS, Unit, layer_units
from shadowllm.models.spec import ModelSpec
from shadowllm.runtime.ort.loaded_bundle import LoadedBundle, Numbers, Plan


class Selections:
    """What graphs read and write of the selections of some sequences.

    Attributes:
        indices: active indices by unit, int32 ``(n_sparse, batch, n_units)``, padded with -1. All units, until a graph
            writes them.
        recomputed: rows of the output table that were computed exactly, int32 ``(batch,)``.
    """

    def __init__(self, bundle: LoadedBundle, batch: int) -> None:
        n_sparse = bundle.manifest.sparse_layers.count
        self.indices: dict[Unit, np.ndarray] = {
            unit: np.tile(np.arange(width, dtype=np.int32), (n_sparse, batch, 1))
            for unit, width in layer_units(bundle.spec).items()
        }
        self.recomputed = np.zeros(batch, dtype=np.int32)
        self._counts: dict[Unit, np.ndarray] = {unit: np.zeros((n_sparse, batch), dtype=np.int32) for unit in UNITS}
        self._scalars = {name: np.zeros(batch, dtype=np.int32) for name in names.SCALARS}

    def ask(self, numbers: Sequence[Numbers]) -> None:
        """Set the numbers of each sequence's budget."""
        for row, (counts, scalars) in enumerate(numbers):
            for unit in UNITS:
                self._counts[unit][:, row] = counts[unit]
            for name, number in scalars.items():
                self._scalars[name][row] = number

    def buffers(self) -> dict[str, np.ndarray]:
        """The arrays by name: of all sparse layers, and of each, which `SplitSelection` makes separate inputs."""
        whole = {names.indices(unit): found for unit, found in self.indices.items()}
        whole |= {names.counts(unit): found for unit, found in self._counts.items()}
        rows = {names.of_row(name, row): found[row] for name, found in whole.items() for row in range(len(found))}
        return whole | rows | self._scalars | {names.RECOMPUTED: self.recomputed}


def step_buffers(
    spec: ModelSpec,
    input_ids: np.ndarray,
    positions: np.ndarray,
    kept: np.ndarray,
    cache: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    """The arrays of a step by name, without those of selections.

    Args:
        spec: the model.
        input_ids, positions: int64 ``(batch, seqlen)``.
        kept: places of the tokens whose logits are wanted, int64 ``(batch, kept)``.
        cache: of the sequences, see `KVCache.buffers`.

    Returns:
        These, and "logits", float32 ``(batch, kept, vocab_size)``, and "hidden", which one graph gives to the next.
    """
    return {
        "input_ids": input_ids,
        "position_ids": positions,
        "logits_to_keep": kept,
        "logits": np.zeros((*kept.shape, spec.vocab_size), dtype=np.float32),
        "hidden": np.zeros((*input_ids.shape, spec.hidden_size), dtype=np.float32),
        **cache,
    }


class DecodeStep:
    """Runs the graphs of one token of each sequence.

    Args:
        bundle: with its graphs loaded.
        plan: which graphs.
        batch: the number of sequences.
        cache: their part of the cache, see `KVCache.buffers`.

    Attributes:
        selections: of the sequences; the dense graph does not use them.
        seconds: of each graph in the last step, by name.
    """

    def __init__(self, bundle: LoadedBundle, plan: Plan, batch: int, cache: Mapping[str, np.ndarray]) -> None:
        self.selections = Selections(bundle, batch)
        self.seconds: dict[str, float] = {}
        self._input_ids, self._positions, kept = (np.zeros((batch, 1), dtype=np.int64) for _ in range(3))
        buffers = step_buffers(bundle.spec, self._input_ids, self._positions, kept, cache)
        self._logits = buffers["logits"]
        buffers |= self.selections.buffers()
        self._graphs = {name: graph.bind(buffers, buffers) for name, graph in bundle.graphs(plan).items()}

    def __call__(self, tokens: np.ndarray | Sequence[int], lengths: np.ndarray | Sequence[int]) -> np.ndarray:
        """Run the step.

        Args:
            tokens, lengths: of each sequence, its next token and the number of tokens before it.

        Returns:
            The logits, float32 ``(batch, vocab_size)``; the next call overwrites them.
        """
        self._input_ids[:, 0] = tokens
        self._positions[:, 0] = lengths
        for name, run in self._graphs.items():
            start = time.perf_counter()
            run()
            self.seconds[name] = time.perf_counter() - start
        return self._logits[:, 0]
