"""Counts the launches of sparse layers: in the Triton session's step, and in the programs of engines.

A launch is recorded and not run, so the results have no meaning. A GPU, or the interpreter, would only add time.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="triton is not installed (pip install 'shadowllm[triton]')")

from shadowllm.benchmarks.kernel_programs import SHAPES as KNOWN
from shadowllm.benchmarks.kernel_programs import block_nodes
from shadowllm.benchmarks.random_model import RandomCopies, RandomWeights, shape_spec, untrained
from shadowllm.models.decoder import KVCache
from shadowllm.models.sparsity import SparseLayers
from shadowllm.plugins.registry import schedules
from shadowllm.plugins.triton import cache, launch
from shadowllm.plugins.triton.block_end import KEYS_VALUES, PORTS
from shadowllm.plugins.triton.output_projection import MAX_PARTIAL_BYTES
from shadowllm.runtime.gpu.triton_session import TritonSession

# What launches no kernel: views and allocations.
FREE = (
    "view",
    "reshape",
    "select",
    "slice",
    "split",
    "unsqueeze",
    "expand",
    "t.",
    "empty",
    "detach",
    "alias",
    "_unsafe",
)
BLOCKS = ["project_heads", "decode_attention", "project_back", "mlp_hidden", "project_back"]
# A layer that chooses from a low-bit copy, and adds the rest.
CHOOSING = ["score_heads", *BLOCKS[:3], "score_neurons", *BLOCKS[3:]]


def in_batches(launches: list[str]) -> list[str]:
    """The launches of a batch: others add up partial sums."""
    more = {"project_back": ["project_back", "sum_and_norm"]}
    return [name for launch in launches for name in more.get(launch, [launch])]


class Recorded(TorchDispatchMode):
    """Records PyTorch's kernels beside those of Triton."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(FREE):
            self.launched.append(name)
        return func(*args, **kwargs or {})

    def run(self, schedule, *_others) -> None:
        """Stands for `schedule.run`."""
        self.launched += [call.kernel.fn.__name__ for call in schedule.calls]


def sparse_step(monkeypatch, shape: str, kind: str, rest: str = "drop", batch: int = 1) -> tuple[list[str], int]:
    """The launches from the first sparse layer on, and the number of sparse layers."""
    spec = shape_spec(shape)
    device = torch.device("cpu")
    predictor = untrained(kind, spec, "", rank=2)
    layers = SparseLayers(spec, predictor.dense_layers)
    weights = dict(RandomWeights(spec, torch.float16, device))
    copies = RandomCopies(layers, device) if rest == "shadow" else None
    recorded = Recorded()
    monkeypatch.setattr(launch, "run", recorded.run)
    session = TritonSession(spec, weights, predictor, copies=copies, rest=rest)
    with torch.no_grad(), session:
        positions = torch.full((batch, 1), 5)
        cache = KVCache.empty(spec, batch, 600, torch.float16)
        session._decoder.begin(positions, 600)
        x = session._decoder.embed(positions, positions)
        selection = session._per_layer or session.select(x)
        with recorded:
            recorded.launched.clear()
            session._decoder.sparse_logits(x, positions, cache, selection)
    return recorded.launched, layers.count


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", ["tiny-opt", "tiny-llama"])
def test_a_sparse_layer_of_the_triton_session_has_five_launches(monkeypatch, shape, batch):
    launched, n_layers = sparse_step(monkeypatch, shape, "shadow", batch=batch)
    layer = BLOCKS if batch == 1 else in_batches(BLOCKS)
    first = launched.index("project_heads")  # PyTorch's norm of the hidden states is before it
    assert launched[first:] == [*layer * n_layers, "mm.default"]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", ["tiny-opt", "tiny-llama"])
def test_a_layer_that_chooses_from_a_copy_has_seven(monkeypatch, shape, batch):
    launched, n_layers = sparse_step(monkeypatch, shape, "quantized-shadow", rest="shadow", batch=batch)
    layer = CHOOSING if batch == 1 else in_batches(CHOOSING)
    assert len(CHOOSING) == 7
    first, last = launched.index(layer[0]), len(launched) - 1 - launched[::-1].index(layer[-1])
    assert launched[first : last + 1] == layer * n_layers


def test_the_cache_writer_fuses_products_and_sums_as_the_other_kernels(monkeypatch):
    given = {}

    class Kernel:
        def __getitem__(self, _grid):
            return lambda *_arguments, **options: given.update(options)

    monkeypatch.setattr(cache, "write_step", Kernel())
    stored = torch.zeros(1, 1, 4, 8)
    cache.write_cache(torch.zeros(1, 1, 24), stored, stored, torch.zeros((1, 1), dtype=torch.int64), None, None)
    assert given["enable_fp_fusion"]


SHAPES = {
    "SparseAttention": {
        "x": (0, 0, 48), "key": (0, 2, 600, 12), "value": (0, 2, 600, 12), "lengths": (0,), "indices": (4,),
        "count": (), "w_q": (48, 48), "w_o": (48, 48),
    },
    "SparseMLP": {"x": (0, 0, 48), "indices": (88,), "count": (), "w_up": (88, 48), "w_down": (88, 48)},
}  # fmt: skip
ATTRIBUTES = {"SparseAttention": {"n_heads": 4}, "SparseMLP": {"activation": "relu"}}


def test_the_programs_of_a_sparse_layer_have_five_launches():
    """A program has the launches of its schedules. The norms and sums of an engine's layer are TensorRT's."""
    found = []
    for op, shapes in SHAPES.items():
        one, *_ = schedules(op)(shapes, ATTRIBUTES[op], itemsize=2, max_batch=1, max_seqlen=1)
        found += [call.kernel.fn.__name__ for call in one.calls]
    assert found == BLOCKS


def test_an_mlp_that_chooses_by_gate_has_as_many_launches_as_one_with_indices():
    shapes = {name: shape for name, shape in SHAPES["SparseMLP"].items() if name != "indices"}
    shapes |= {"skip": (0, 0, 48), "norm_weight": (48,)}
    attributes = ATTRIBUTES["SparseMLP"] | {"norm_eps": 1e-5}
    one, *_ = schedules("SparseMLP")(shapes, attributes, itemsize=2, max_batch=1, max_seqlen=1)
    assert [call.kernel.fn.__name__ for call in one.calls] == ["gate_first", BLOCKS[-1]]


END = {port.name for port in (*PORTS, *KEYS_VALUES)}
LIMITS = {"itemsize": 4, "max_batch": 3, "max_seqlen": 1}


def shapes_of(node):
    return {port: tuple(n if isinstance(n, int) else 0 for n in t.shape) for port, t in node.inputs.items()}


@pytest.mark.parametrize("name", ["smollm2-135m", "opt-1.3b", "llama-2-7b"])
def test_the_block_of_a_token_in_a_batch_adds_few_partial_sums(name):
    """It loads all of them at once, so they must fit its registers; those of a rest too."""
    for dtype, options in (("float16", {}), ("float16", {"rest": True}), ("float32", {"residual_bits": 4})):
        for node in block_nodes(KNOWN[name], dtype, **options):
            _, batch = schedules(node.op)(shapes_of(node), node.attributes, **LIMITS)
            (end,) = [call for call in batch.calls if call.kernel.fn.__name__ == "sum_and_norm"]
            for splits in ("SPLITS", "REST_SPLITS"):
                assert 4 * end.constants[splits] * end.constants["WIDTH"] <= MAX_PARTIAL_BYTES
            assert bool(end.constants["REST_SPLITS"]) == bool(options)


@pytest.mark.parametrize("options", [{"rest": True}, {"residual_bits": 4}, {"residual_bits": 2}], ids=str)
@pytest.mark.parametrize("ended", [True, False])
def test_the_programs_of_a_layer_that_chooses_from_a_copy(options, ended):
    """Float rows and nested integers have as many launches."""
    found = []
    for node in block_nodes(KNOWN["smollm2-135m"], "float32", **options):
        shapes = {port: shape for port, shape in shapes_of(node).items() if ended or port not in END}
        one, *_ = schedules(node.op)(shapes, node.attributes, **LIMITS)
        found += [call.kernel.fn.__name__ for call in one.calls]
    assert found == CHOOSING
