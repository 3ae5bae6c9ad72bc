"""The graphs of a bundle, loaded into ONNX Runtime; several kinds of sessions run them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import onnx_ir as ir
import onnxruntime as ort

from shadowllm.bundle.manifest import BODY, BODY_ALL_HEADS, DATA_FILE, Manifest, read_manifest, verify_files
from shadowllm.bundle.sparse_pays import mixes, selects, sparse_pays
from shadowllm.errors import UserError
from shadowllm.limits import check_threads
from shadowllm.models.sparsity import ActiveCounts, Budget, check_neuron_budget
from shadowllm.models.spec import ModelSpec
from shadowllm.plugins import native_ops
from shadowllm.runtime.inputs import budget_scalars
from shadowllm.runtime.ort.graph import OrtGraph, for_cpu, with_data
from shadowllm.runtime.ort.shared_weights import SharedWeights
from shadowllm.runtime.session import Decodes, Prefill
from shadowllm.threads import give_threads

Kind = Literal["auto", "sparse", "dense"]
STEP = "stem+body"  # the name of a step whose graphs are joined
# All heads, neurons and rows, none of them from the low-bit copy.
EVERYTHING = Budget(rest="drop")


# Counts of each sparse layer, and scalars by name.
Numbers = tuple[ActiveCounts, dict[str, int]]


@dataclass(frozen=True)
class Plan:
    """Which graphs run a step.

    Attributes:
        decodes: sparse graphs, or dense ones.
        body: the graph of the sparse layers, unless everything is active.
        rounded: whether float matrices are rounded to 8 bits, see `RoundProducts` and `RoundRows`.
        everything: whether all heads and neurons are active. Then nothing is predicted. If the native ops run the dense
            graph, it computes the layers, and only the shortlist is of the body, see `shorten`.
    """

    decodes: Decodes
    body: str = BODY
    rounded: bool = False
    everything: bool = False


DENSE = Plan("dense")


def rounds_products(manifest: Manifest) -> bool:
    """Whether steps of mixed precision round float matrices to 8 bits, see `RoundProducts` and `RoundRows`."""
    floats = manifest.quantisation is None and manifest.rest == "shadow"
    return floats and native_ops.library() is not None


@dataclass(frozen=True)
class _Form:
    """Graphs of a bundle that become one, and how it is rewritten, see `for_cpu`."""

    pieces: tuple[str, ...]
    rounded: bool = False
    fused: bool = True
    prompts: bool = False


class LoadedBundle:
    """A bundle and its graphs, which are loaded into ONNX Runtime when they are first needed.

    Their files are read at once, and the data file stays open. So the bundle's folder may be renamed meanwhile, and a
    file that takes its name is not read.

    Args:
        bundle, kind, threads, native, exact, prefill, prepack: see `OrtSession`.

    Attributes:
        packed: whether the dense graph has packed weights.
        native_dense: whether the native ops run the dense graph too: of nested integers, beside sparse graphs. Then a
            token has the same logits in a step of its own and in a step over up to `LONGEST_DRAFT` + 1. A session of
            kind "dense" has ONNX Runtime's own kernels, because others are compared with it.

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
        self.kind, self.packed, self._decodes_dense = kind, False, False
        self._bundle, self._threads = bundle, threads
        # A session of kind "dense" has no ops of ours.
        self._native = native and kind != "dense" and native_ops.register(ort.SessionOptions())
        self._exact, self._prepack = exact, prepack
        self._rounds = rounds_products(self.manifest) and self._native and not exact
        if kind == "dense" and prefill == "sparse":
            raise UserError("a dense session has no sparse graphs to prefill with", "leave out the option, or use ort")
        if prepack and prefill == "sparse":
            raise UserError("a session that prefills with sparse graphs packs no weights", "leave out one of them")
        self.prefills = prefill
        q = self.manifest.quantisation
        nested = q is not None and q.residual_bits > 0
        self.native_dense = nested and prefill == "dense" and self._native and not exact and native_ops.linear_pays()
        # Whether the body reads 16-bit rows of the output table. Then no graph that only prefills has to widen it.
        widened = q is None and self.manifest.dtype != "float32"
        self._narrow_table = widened and self.manifest.rest == "shadow" and self._native and not exact
        self._files: dict[str, ir.Model] = {}
        self._graphs: dict[_Form, OrtGraph] = {}
        self._weights: SharedWeights | None = None  # while it is open

    def load(self, plan: Plan) -> None:
        """Check the files, and load the graphs that prefill and those of a plan.

        Args:
            plan: of the first steps. If it is dense, the dense graph has packed weights, unless the native ops run it.
        """
        pieces = () if self.kind == "dense" else self.manifest.sparse_pieces
        pieces = ("dense", *pieces) if self.prefills == "dense" else pieces
        if self.kind != "dense" and self.manifest.has_body_all_heads:
            pieces = (*pieces, BODY_ALL_HEADS)
        verify_files(self._bundle, self.manifest.digests(DATA_FILE, *(f"{piece}.onnx" for piece in pieces)))
        self._files = {piece: self._read(self._bundle / f"{piece}.onnx") for piece in pieces}
        self._weights = SharedWeights((self._bundle / DATA_FILE).resolve())
        # Packed weights make dense steps faster, and are a copy. A graph that only prefills does without.
        self._decodes_dense = plan == DENSE
        pack = self._prepack or self._decodes_dense or self.manifest.quantisation is not None
        self.packed = pack and self.prefills == "dense" and not self.native_dense
        self.prefilling()
        self.graphs(plan)

    @staticmethod
    def _read(path: Path) -> ir.Model:
        found = ir.load(path)
        if found.graph.name != path.stem:
            raise UserError(f"{path} is damaged (it is the graph {found.graph.name!r})", "export the model again")
        return found

    def close(self) -> None:
        """Free the graphs and the weights."""
        self._graphs.clear()
        self._files.clear()
        self._weights = None

    def pack(self) -> None:
        """Load the dense graph again, with packed weights, because it decodes now."""
        self.packed = self._decodes_dense = True
        self._graphs = {form: graph for form, graph in self._graphs.items() if form.pieces[0] != "dense"}

    @property
    def fast_dense(self) -> bool:
        """Whether the dense graph decodes as fast as it can: the native ops run it, or its weights are packed."""
        return self.native_dense or self.packed

    @property
    def all_active(self) -> bool:
        """Whether dense steps run the sparse graphs with everything active.

        They do if there is no dense graph, and if its float weights are not packed: the native ops read rows as fast as
        ONNX Runtime reads packed weights, and it reads others more slowly.
        """
        return self.kind != "dense" and (self.prefills == "sparse" or (self._native and not self.fast_dense))

    def graphs(self, plan: Plan) -> dict[str, OrtGraph]:
        """The graphs of a step by the names of the bundle, in their order."""
        return {name: self._graph(form) for name, form in self._forms(plan).items()}

    def pieces(self, plan: Plan) -> tuple[str, ...]:
        """The graphs of a step by their files."""
        return tuple(piece for form in self._forms(plan).values() for piece in form.pieces)

    def prefilling(self) -> dict[str, OrtGraph]:
        """The graphs of a prompt."""
        if self.prefills == "sparse":
            return self.graphs(DENSE)
        # A graph that decodes has its own table, which is packed.
        form = _Form(("dense", BODY), prompts=True) if self._narrow_table and not self.packed else _Form(("dense",))
        return {"dense": self._graph(form)}

    def verifying(self, batch: int, seqlen: int) -> list[OrtGraph]:
        """The graphs of a dense step over ``seqlen`` tokens of each of ``batch`` sequences, in their order.

        The fused attention of ONNX Runtime's CPU provider does not take several tokens after a past for more than one
        sequence. A graph with standard nodes does.
        """
        graphs = self.graphs(DENSE)
        if batch == 1 or seqlen == 1:
            return list(graphs.values())
        return [
            self._graph(replace(form, fused=False)) if graphs[name].fused else graphs[name]
            for name, form in self._forms(DENSE).items()
        ]

    def _forms(self, plan: Plan) -> dict[str, _Form]:
        if plan == DENSE and not self.all_active:
            return {"dense": _Form(("dense",))}
        if plan == DENSE or plan.everything:
            return {STEP: _Form(("dense" if self.native_dense else "stem", self._body_of_everything))}
        if "predictor" not in self.manifest.sparse_pieces:
            return {STEP: _Form(("stem", plan.body), plan.rounded)}
        forms = {name: _Form((name,), plan.rounded) for name in ("stem", plan.body)}
        return {"stem": forms["stem"], "predictor": _Form(("predictor",)), BODY: forms[plan.body]}

    @property
    def _body_of_everything(self) -> str:
        """The graph of the sparse layers that runs if all heads and neurons are active.

        Each graph packs integer rows for itself. So with integers it is the graph that budgets with all heads run too.
        """
        integers = self.manifest.quantisation is not None
        return BODY_ALL_HEADS if integers and self.manifest.has_body_all_heads else BODY

    def _graph(self, form: _Form) -> OrtGraph:
        if form not in self._graphs:
            self._graphs[form] = self._open(form)
        return self._graphs[form]

    def _open(self, form: _Form) -> OrtGraph:
        if self._weights is None:
            raise UserError("the session is not open", "use it inside its `with` statement")
        options, dense = ort.SessionOptions(), form.pieces[0] == "dense"
        give_threads(options, self._threads, wait_actively=dense and self._decodes_dense)
        packed = dense and self.packed
        options.add_session_config_entry("session.disable_prepacking", str(int(dense and not packed)))
        ours = self.native_dense or form.pieces != ("dense",)
        native = self._native and ours and native_ops.register(options)
        data = self._weights.path
        models = [with_data(self._files[piece], data) for piece in form.pieces]
        if not packed:
            self._weights.give((model.graph for model in models), options)
        # The graph is loaded from memory, so ONNX Runtime needs the folder of the weights.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data.parent))
        graph = for_cpu(models, self.manifest, native, self._exact, form.fused, form.rounded, form.prompts)
        self._weights.give_computed(graph.computed, options)
        loaded = OrtGraph(f"{form.pieces[-1]}.onnx", options, graph)
        self._weights.release()
        return loaded

    def plan(self, budget: Budget) -> Plan:
        """The graphs of a step at this budget.

        Raises:
            UserError: the bundle cannot have this budget.
        """
        check_neuron_budget(self.manifest.predictor["kind"], budget)
        counts, _ = self.numbers(budget)
        narrow_rows = self.manifest.dtype != "float32" and self._native
        pays = self.kind == "sparse" or sparse_pays(self.manifest, budget, narrow_rows, self._rounds)
        if self.kind == "dense" or not pays:
            return DENSE
        if not mixes(self.manifest, budget):
            return Plan("sparse", everything=not selects(self.manifest, budget))
        all_heads = bool((counts["heads"] == self.spec.n_heads).all())
        body = BODY_ALL_HEADS if all_heads and self.manifest.has_body_all_heads else BODY
        return Plan("sparse", body, self._rounds)

    def numbers(self, budget: Budget, decodes: Decodes = "sparse") -> Numbers:
        """The numbers that graphs read: of a budget, or of everything for a dense step."""
        budget = budget if decodes == "sparse" else EVERYTHING
        return budget.counts(self.manifest.sparse_layers), budget_scalars(self.spec, budget, self.manifest.rest)

    def independent(self, plan: Plan) -> bool:
        """Whether the result of a sequence has the same bits in a step with other sequences as in one without.

        The native ops and ONNX Runtime's products with packed float weights or with 8-bit integers (also those that
        nested ones are joined to) add in the same order for any number of rows. Its products with 4-bit integers, with
        inputs that are not rounded, and with weights that are not packed do not.
        """
        q, manifest = self.manifest.quantisation, self.manifest
        if q is not None and (self._exact or (q.bits < 8 and not q.residual_bits)):
            return False
        if plan == DENSE:
            return self._native if self.all_active else self.fast_dense
        scores_with_four_bits = manifest.predictor["kind"] == "quantized-shadow" and manifest.rest == "drop"
        return self._native and not scores_with_four_bits
