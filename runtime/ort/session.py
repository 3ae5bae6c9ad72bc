"""Runs a bundle on ONNX Runtime (CPU); buffers are bound once, so the KV cache is not copied per token."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from shadowllm.bundle import selection_names as names
from shadowllm.bundle.cost_model import sparse_pays
from shadowllm.bundle.manifest import DATA_FILE, Manifest, read_manifest, verify_files
from shadowllm.errors import UserError
from shadowllm.limits import LONGEST_DRAFT, check_threads
from shadowllm.models.sparsity import UNITS, ActiveCounts, Budget, Unit, check_neuron_budget, layer_units
from shadowllm.models.spec import ModelSpec
from shadowllm.plugins import native_ops
from shadowllm.runtime.inputs import budget_scalars, check_rewind, check_tokens, check_verified, pad_prompts
from shadowllm.runtime.ort.fuse_attention import fuses
from shadowllm.runtime.ort.graph import OrtGraph, for_cpu
from shadowllm.runtime.ort.shared_weights import SharedWeights
from shadowllm.runtime.ort.verification import Verification
from shadowllm.runtime.session import Decodes, Prefill

# The cache grows by this many positions, so that a short text needs little memory.
CACHE_BLOCK = 256
# All heads, neurons and rows, none of them from the low-bit copy.
EVERYTHING = Budget(rest="drop")

Kind = Literal["auto", "sparse", "dense"]


class OrtSession:
    """A `VerifyingSession` over ONNX Runtime.

    "dense" always runs ``dense.onnx``. "sparse" prefills with it and decodes with ``stem``, ``predictor`` and
    ``body``. "auto" does the same, unless the budget saves less than the predictor costs: then it decodes with
    ``dense.onnx``.

    With ``prefill="sparse"``, the graphs of a sparse step also prefill, with everything active, and ``dense.onnx`` is
    not opened. The weights are then in memory only once. A prompt takes longer. A budget for which "auto" would decode
    with ``dense.onnx`` decodes with these graphs too, with everything active.

    16-bit bundles are computed in float32, because ONNX Runtime's CPU kernels have no 16-bit arithmetic. Only the
    native ops read 16-bit rows.

    Args:
        bundle: folder written by ``shadowllm export``.
        kind: which graphs decode.
        threads: threads of each operator; None is ONNX Runtime's default.
        profile: whether to record the seconds of each part of the last step in ``step_seconds``.
        native: whether to run the custom ops with the native library, if it is built. Otherwise their function
            bodies run.
        prefill: which graphs prefill.
        exact: whether integer layers read float32 inputs, and not inputs rounded to 8 bits. This is slow, and meant
            for validation.
        prepack: whether a sparse session of float weights also keeps ONNX Runtime's packed copy of them for dense
            steps. Prefill and `verify` are then as fast as in a dense session, and the weights are in memory twice.

    Attributes:
        cache: float32 ``(batch, n_kv_heads, capacity, head_dim)`` by "layer.key" and "layer.value".
        decodes: "sparse" or "dense", at the current budget.
        selection: padded indices of the last sparse step, by unit, int32 ``(n_sparse, n_units)``.
        step_seconds: seconds of each part of the last step; None without ``profile``.

    Raises:
        UserError: no bundle, a damaged file, a wrong number of threads, a dense session that is to prefill with sparse
            graphs, or a graph this ONNX Runtime cannot run.
    """

    memory = None

    def __init__(
        self,
        bundle: Path,
        kind: Kind = "auto",
        threads: int | None = None,
        profile: bool = False,
        native: bool = True,
        exact: bool = False,
        prefill: Prefill = "dense",
        prepack: bool = False,
    ) -> None:
        if threads is not None:
            check_threads(threads)
        self.manifest: Manifest = read_manifest(bundle)
        self.spec: ModelSpec = self.manifest.spec
        self.step_seconds: dict[str, float] | None = {} if profile else None
        self._bundle, self._kind, self._threads = bundle, kind, threads
        self._native, self._exact, self._prepack = native, exact, prepack
        if kind == "dense" and prefill == "sparse":
            raise UserError("a dense session has no sparse graphs to prefill with", "leave out the option, or use ort")
        self._prefills = prefill
        self.longest_draft = LONGEST_DRAFT if prefill == "dense" else 0  # the dense graph verifies
        self._counts, self._scalars = self._numbers(EVERYTHING)
        self._pieces: dict[str, OrtGraph] = {}
        self.set_budget(self.manifest.budget)

    @property
    def fired(self) -> list[float] | None:
        """See `Session.fired`."""
        if self.manifest.predictor["kind"] != "relu" or self.decodes == "dense":
            return None
        shares: list[float] = (self.selection["neurons"] >= 0).mean(axis=1).tolist()
        return shares

    def __enter__(self) -> Self:
        pieces = () if self._kind == "dense" else self.manifest.sparse_pieces
        pieces = ("dense", *pieces) if self._prefills == "dense" else pieces
        names = [DATA_FILE, *(f"{piece}.onnx" for piece in pieces)]
        verify_files(self._bundle, self.manifest.digests(*names))
        self._weights, self._packed = SharedWeights((self._bundle / DATA_FILE).resolve()), False
        self._pieces = {piece: self._open(piece) for piece in pieces}
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        self._pieces.clear()
        self._verifications: dict[int, Verification] = {}
        del self._weights
        self._steps: dict[str, list[Step]] = {}
        self.cache: dict[str, np.ndarray] = {}

    def _open(self, piece: str, fused: bool = True) -> OrtGraph:
        options = ort.SessionOptions()
        if self._threads:
            options.intra_op_num_threads = self._threads
        if piece != "dense" or self.decodes == "sparse":
            # The graphs of a text run one after the other: the threads of one must not spin while the next one runs.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        # Packed weights make dense steps faster, and are a copy. A graph that only prefills does without.
        pack = self._prepack or self.decodes == "dense" or self.manifest.quantisation is not None
        packed = piece == "dense" and pack
        options.add_session_config_entry("session.disable_prepacking", str(int(piece == "dense" and not packed)))
        self._packed |= packed
        native = self._native and piece in ("predictor", "body") and native_ops.register(options)
        path = self._bundle / f"{piece}.onnx"
        if not packed:
            self._weights.give(ir.load(path).graph, options)
        # The graph is loaded from memory, so ONNX Runtime needs the folder of the weights. It refuses a link out of
        # this folder, so links are resolved here.
        weights = (self._bundle / DATA_FILE).resolve()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.parent))
        graph = for_cpu(path, self.manifest, native, self._exact, fused)
        self._weights.give_computed(graph.computed, options)
        loaded = OrtGraph(path, options, graph.model)
        self._weights.release()
        return loaded

    @property
    def _prefill_pieces(self) -> tuple[str, ...]:
        """The graphs that prefill, and decode if a sparse step does not pay off."""
        return ("dense",) if self._prefills == "dense" else self.manifest.sparse_pieces

    def reset(self, batch: int = 1) -> None:
        """See `Session.reset`."""
        self._batch = batch
        self._lengths = np.zeros(batch, dtype=np.int64)
        self._capacity = 0
        self.cache = {}
        self._logits = np.zeros((batch, 1, self.spec.vocab_size), dtype=np.float32)
        self._reserve(1)

    def set_budget(self, budget: Budget) -> None:
        """See `Session.set_budget`."""
        check_neuron_budget(self.manifest.predictor["kind"], budget)
        counts, scalars = self._numbers(budget)
        if self._kind != "auto":
            self.decodes: Decodes = self._kind
        else:
            narrow_rows = self.manifest.dtype != "float32" and self._native and native_ops.library() is not None
            self.decodes = "sparse" if sparse_pays(self.manifest, budget, narrow_rows) else "dense"
        if self.decodes == "dense" and self._prefills == "sparse":
            counts, scalars = self._numbers(EVERYTHING)
        for unit in UNITS:
            self._counts[unit][:] = counts[unit]  # in place: graphs are bound to these arrays
        for name, number in scalars.items():
            self._scalars[name][...] = number
        if "dense" in self._pieces and self.decodes == "dense" and not self._packed:
            self._pieces["dense"] = self._open("dense")
            self._bind_decode()

    def _numbers(self, budget: Budget) -> tuple[ActiveCounts, dict[str, np.ndarray]]:
        """The inputs of the graphs that a budget decides: counts, and scalars by name."""
        scalars = budget_scalars(self.spec, budget, self.manifest.rest)
        arrays = {name: np.array(number, dtype=np.int32) for name, number in scalars.items()}
        return budget.counts(self.manifest.sparse_layers), arrays

    @property
    def recomputed(self) -> np.ndarray | None:
        """See `Session.recomputed`; None if the bundle has no low-bit copy of the output table."""
        return self._recomputed if self.manifest.rest == "shadow" and self.decodes == "sparse" else None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Session.prefill`."""
        input_ids, positions, lengths = pad_prompts(prompts, self._batch, self.spec)
        self._reserve(input_ids.shape[1])
        feeds = {
            "input_ids": input_ids,
            "position_ids": positions,
            "logits_to_keep": lengths[:, None] - 1,
        }
        buffers = self._buffers(feeds)
        if self._prefills == "sparse":
            counts, scalars = self._numbers(EVERYTHING)
            buffers |= scalars | self._selected(counts)
        for name in self._prefill_pieces:
            self._pieces[name].bind(buffers, buffers)()
        self._lengths[:] = lengths
        return self._logits[:, 0]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Session.decode`."""
        self._reserve(check_tokens(tokens, self._lengths, self.spec))
        self._input_ids[:, 0] = tokens
        self._positions[:, 0] = self._lengths
        seconds = {}
        for step in self._steps[self.decodes]:
            start = time.perf_counter()
            step.run()
            seconds[step.name] = time.perf_counter() - start
        if self.step_seconds is not None:
            self.step_seconds = seconds
        self._lengths += 1
        return self._logits[:, 0]

    def decode_greedy(self, tokens: np.ndarray, steps: int) -> None:
        """Return None, see `Session.decode_greedy`: every step needs the host."""

    def verify(self, tokens: np.ndarray) -> np.ndarray:
        """See `VerifyingSession.verify`."""
        self._reserve(check_verified(tokens, self._lengths, self.spec))
        seqlen = tokens.shape[1]
        if seqlen not in self._verifications:
            graph, cache = self._verifier(seqlen), self._past() | self._present()
            self._verifications[seqlen] = Verification(graph, self.spec, self._batch, seqlen, cache)
        logits = self._verifications[seqlen](tokens, self._lengths)
        self._lengths += seqlen
        return logits

    def _verifier(self, seqlen: int) -> OrtGraph:
        """The dense graph for ``seqlen`` tokens per sequence.

        The fused attention of ONNX Runtime's CPU provider does not take several tokens after a past for more than one
        sequence. The same graph with standard nodes does. It is loaded when it is first needed.
        """
        if self._batch == 1 or seqlen == 1 or not fuses(self.spec):
            return self._pieces["dense"]
        if "dense, standard" not in self._pieces:
            self._pieces["dense, standard"] = self._open("dense", fused=False)
        return self._pieces["dense, standard"]

    def rewind(self, lengths: np.ndarray) -> None:
        """See `VerifyingSession.rewind`."""
        self._lengths = check_rewind(lengths, self._lengths)

    def _reserve(self, length: int) -> None:
        """Grow the cache to at least ``length`` positions and keep its contents."""
        if length <= self._capacity:
            return
        self._capacity = -(-length // CACHE_BLOCK) * CACHE_BLOCK
        shape = (self._batch, self.spec.n_kv_heads, self._capacity, self.spec.head_dim)
        for layer in range(self.spec.n_layers):
            for part in ("key", "value"):
                name, grown = f"{layer}.{part}", np.zeros(shape, dtype=np.float32)
                if name in self.cache:
                    grown[:, :, : self.cache[name].shape[2]] = self.cache[name]
                self.cache[name] = grown
        self._bind_decode()

    def _bind_decode(self) -> None:
        """Bind the decode step's buffers, which are the same arrays for all tokens."""
        self._verifications = {}
        batch, n_sparse = self._batch, self.manifest.sparse_layers.count
        self._recomputed = np.zeros(batch, dtype=np.int32)
        self._input_ids, self._positions = (np.zeros((batch, 1), dtype=np.int64) for _ in range(2))
        units = layer_units(self.spec) if self._kind != "dense" else {}
        self.selection: dict[Unit, np.ndarray] = {
            unit: np.zeros((n_sparse, width), dtype=np.int32) for unit, width in units.items()
        }
        feeds = {
            "input_ids": self._input_ids,
            "position_ids": self._positions,
            "logits_to_keep": np.zeros((batch, 1), dtype=np.int64),
        }
        buffers = self._buffers(feeds) | self._scalars | self._selected(self._counts)
        # The graphs of a decode step, in their order.
        pieces = {"dense": self._prefill_pieces, "sparse": self.manifest.sparse_pieces}
        self._steps = {
            kind: [Step(name, self._pieces[name], buffers) for name in names]
            for kind, names in pieces.items()
            if self._kind in ("auto", kind)
        }

    def _buffers(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The arrays of a step over the tokens ``input_ids (batch, seqlen)``, without those of the budget."""
        hidden = np.zeros((*feeds["input_ids"].shape, self.spec.hidden_size), dtype=np.float32)
        given = {"logits": self._logits, "hidden": hidden, names.RECOMPUTED: self._recomputed}
        return {**feeds, **given, **self._past(), **self._present()}

    def _selected(self, counts: ActiveCounts) -> dict[str, np.ndarray]:
        """Indices and counts of all sparse layers, and their rows, which are inputs after `SplitSelection`."""
        whole = {names.indices(unit): indices for unit, indices in self.selection.items()}
        whole |= {names.counts(unit): counts[unit] for unit in UNITS}
        rows = {names.of_row(name, row): found[row, ...] for name, found in whole.items() for row in range(len(found))}
        return whole | rows

    def _past(self) -> dict[str, np.ndarray]:
        return {f"past_key_values.{name}": array for name, array in self.cache.items()}

    def _present(self) -> dict[str, np.ndarray]:
        # The same arrays as the past, so that TensorScatter writes in place.
        return {f"present.{name}": array for name, array in self.cache.items()}


class Step:
    """One part of a decode step."""

    def __init__(self, name: str, piece: OrtGraph, buffers: Mapping[str, np.ndarray]) -> None:
        self.name = name
        self.run = piece.bind(buffers, buffers)
