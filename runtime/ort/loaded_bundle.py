"""The graphs of a bundle, loaded into ONNX Runtime; several kinds of sessions run them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import onnx_ir as ir
import onnxruntime as ort

from shadowllm.bundle.cost_model import sparse_pays
from shadowllm.bundle.manifest import DATA_FILE, Manifest, read_manifest, verify_files
from shadowllm.errors import UserError
from shadowllm.limits import check_threads
from shadowllm.models.sparsity import ActiveCounts, Budget, check_neuron_budget
from shadowllm.models.spec import ModelSpec
from shadowllm.plugins import native_ops
from shadowllm.runtime.inputs import budget_scalars
from shadowllm.runtime.ort.graph import OrtGraph, for_cpu
from shadowllm.runtime.ort.shared_weights import SharedWeights
from shadowllm.runtime.session import Decodes, Prefill

Kind = Literal["auto", "sparse", "dense"]
# All heads, neurons and rows, none of them from the low-bit copy.
EVERYTHING = Budget(rest="drop")


# Counts of each sparse layer, and scalars by name.
Numbers = tuple[ActiveCounts, dict[str, int]]


class LoadedBundle:
    """A bundle and its loaded graphs.

    Args:
        bundle, kind, threads, native, exact, prefill, prepack: see `OrtSession`.

    Attributes:
        pieces: the loaded graphs by name.
        packed: whether the dense graph has packed weights.

    Raises:
        UserError: as `OrtSession`.
    """

    def __init__(
        self,
        bundle: Path,
        kind: Kind = "auto",
        threads: int | None = None,
        native: bool = True,
        exact: bool = False,
        prefill: Prefill = "dense",
        prepack: bool = False,
    ) -> None:
        if threads is not None:
            check_threads(threads)
        self.manifest: Manifest = read_manifest(bundle)
        self.spec: ModelSpec = self.manifest.spec
        self.kind, self.packed = kind, False
        self._bundle, self._threads = bundle, threads
        self._native = native and native_ops.library() is not None
        self._exact, self._prepack = exact, prepack
        if kind == "dense" and prefill == "sparse":
            raise UserError("a dense session has no sparse graphs to prefill with", "leave out the option, or use ort")
        self.prefills = prefill
        self.pieces: dict[str, OrtGraph] = {}

    def load(self, decodes: Decodes) -> None:
        """Check the files and load the graphs.

        Args:
            decodes: which graphs decode at first; the dense graph has packed weights if it decodes.
        """
        pieces = () if self.kind == "dense" else self.manifest.sparse_pieces
        pieces = ("dense", *pieces) if self.prefills == "dense" else pieces
        files = [DATA_FILE, *(f"{piece}.onnx" for piece in pieces)]
        verify_files(self._bundle, self.manifest.digests(*files))
        self._weights, self.packed = SharedWeights((self._bundle / DATA_FILE).resolve()), False
        for piece in pieces:
            self.open(piece, decodes)

    def close(self) -> None:
        """Free the graphs and the weights."""
        self.pieces.clear()
        del self._weights

    def open(self, piece: str, decodes: Decodes, fused: bool = True) -> OrtGraph:
        """Load one graph, or load it again; without ``fused``, it is kept beside the fused one."""
        options = ort.SessionOptions()
        if self._threads:
            options.intra_op_num_threads = self._threads
        if piece != "dense" or decodes == "sparse":
            # The graphs of a text run one after the other: the threads of one must not spin while the next one runs.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        # Packed weights make dense steps faster, and are a copy. A graph that only prefills does without.
        pack = self._prepack or decodes == "dense" or self.manifest.quantisation is not None
        packed = piece == "dense" and pack
        options.add_session_config_entry("session.disable_prepacking", str(int(piece == "dense" and not packed)))
        self.packed |= packed
        native = self._native and piece in ("predictor", "body") and native_ops.register(options)
        path = self._bundle / f"{piece}.onnx"
        if not packed:
            self._weights.give(ir.load(path).graph, options)
        # The graph is loaded from memory, so ONNX Runtime needs the folder of the weights. It refuses a link out of
        # this folder, so links are resolved here.
        weights = (self._bundle / DATA_FILE).resolve()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.parent))
        name = piece if fused else f"{piece}, standard"
        graph = for_cpu(path, self.manifest, native, self._exact, fused)
        self._weights.give_computed(graph.computed, options)
        self.pieces[name] = OrtGraph(path, options, graph)
        self._weights.release()
        return self.pieces[name]

    @property
    def all_active(self) -> bool:
        """Whether dense steps run the sparse graphs with everything active.

        They do if there is no dense graph, and if its float weights are not packed: the native ops read rows as fast as
        ONNX Runtime reads packed weights, and it reads others more slowly.
        """
        return self.kind != "dense" and (self.prefills == "sparse" or (self._native and not self.packed))

    def names(self, decodes: Decodes) -> tuple[str, ...]:
        """The graphs of a step, in their order. Nothing is predicted if everything is active."""
        if decodes == "sparse":
            return self.manifest.sparse_pieces
        if self.all_active:
            return tuple(piece for piece in self.manifest.sparse_pieces if piece != "predictor")
        return ("dense",)

    def verifying(self, batch: int, seqlen: int) -> list[OrtGraph]:
        """The graphs of a dense step over ``seqlen`` tokens of each of ``batch`` sequences, in their order.

        The fused attention of ONNX Runtime's CPU provider does not take several tokens after a past for more than one
        sequence. A graph with standard nodes does. It is loaded when it is first needed.
        """
        return [self._verifier(name, batch > 1 and seqlen > 1) for name in self.names("dense")]

    def _verifier(self, piece: str, standard: bool) -> OrtGraph:
        if not (standard and self.pieces[piece].fused):
            return self.pieces[piece]
        return self.pieces.get(f"{piece}, standard") or self.open(piece, "dense" if self.packed else "sparse", False)

    def plan(self, budget: Budget) -> Decodes:
        """Whether a step at this budget is sparse or dense.

        Raises:
            UserError: the bundle cannot have this budget.
        """
        check_neuron_budget(self.manifest.predictor["kind"], budget)
        self.numbers(budget)
        if self.kind != "auto":
            return self.kind
        narrow_rows = self.manifest.dtype != "float32" and self._native
        return "sparse" if sparse_pays(self.manifest, budget, narrow_rows) else "dense"

    def numbers(self, budget: Budget, decodes: Decodes = "sparse") -> Numbers:
        """The numbers that graphs read: of a budget, or of everything for a dense step."""
        budget = budget if decodes == "sparse" else EVERYTHING
        return budget.counts(self.manifest.sparse_layers), budget_scalars(self.spec, budget, self.manifest.rest)

    def independent(self, decodes: Decodes) -> bool:
        """Whether the result of a sequence has the same bits in a step with other sequences as in one without.

        The native ops and ONNX Runtime's products with packed float weights or with 8-bit integers add in the same
        order for any number of rows. Its products with 4-bit integers, with inputs that are not rounded, and with
        weights that are not packed do not.
        """
        q, manifest = self.manifest.quantisation, self.manifest
        if q is not None and (self._exact or q.bits < 8):
            return False
        if decodes == "dense":
            return self._native if self.all_active else self.packed
        scores_with_four_bits = manifest.predictor["kind"] == "quantized-shadow" and manifest.rest == "drop"
        return self._native and not scores_with_four_bits
