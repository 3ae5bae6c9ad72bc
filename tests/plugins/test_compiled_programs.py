"""Programs of each op, compiled ahead of time: their plans and launches, and what both interpreters launch."""

from __future__ import annotations

import re
import shutil
import sys

import pytest

from shadowllm.bundle.gpu_images import PTX
from shadowllm.plugins.kernel_program import Size
from shadowllm.plugins.kernel_program_bytes import pack, unpack
from tests.plugins.compiler import child
from tests.plugins.cubin import parameters
from tests.plugins.driver.recorder import CXX, build, record

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
HEADS, HEAD_DIM, WIDTH, NEURONS = 4, 12, 48, 88
COMPILE = f"""
import sys
from shadowllm.bundle.gpu_images import PTX
from shadowllm.plugins.kernel_program_bytes import pack
from shadowllm.plugins.triton.compile import Tensor, compile_program
dtype, batch, seqlen, sm = sys.argv[1], *map(int, sys.argv[2:])
count, lengths = Tensor("int32", ()), Tensor("int32", ("batch",))
x, rows = Tensor(dtype, ("batch", "seqlen", {WIDTH})), Tensor(dtype, ({NEURONS}, {WIDTH}))
cache, heads = Tensor(dtype, ("batch", 2, 600, {HEAD_DIM})), Tensor(dtype, ({HEADS * HEAD_DIM}, {WIDTH}))
angles = Tensor(dtype, ("batch", "seqlen", {HEAD_DIM // 2}))
graphs = [
    ("SelectTopK", {{"scores": Tensor("float32", (2, {NEURONS})), "counts": Tensor("int32", (2,))}},
      {{"cap": {NEURONS}}}),
    ("ScoreNeurons", {{"x": x, "copy": Tensor("int32", (2 * {NEURONS}, 1, 8)),
      "scales": Tensor("float32", (2 * {NEURONS}, 1)), "b_gate": Tensor(dtype, ({NEURONS},)),
      "b_up": Tensor(dtype, ({NEURONS},)), "down_norms": Tensor("float32", ({NEURONS},)), "count": count}},
      {{"activation": "silu", "layer": 1}}),
    ("SparseMLP", {{"x": x, "indices": Tensor("int32", ({NEURONS},)), "count": count, "w_up": rows,
      "b_up": Tensor(dtype, ({NEURONS},)), "w_down": rows}}, {{"activation": "relu", "layer": 1}}),
    ("SparseAttention", {{"x": x, "key": cache, "value": cache, "lengths": lengths, "indices":
      Tensor("int32", ({HEADS},)), "count": count, "w_q": heads, "w_o": heads, "cos": angles, "sin": angles}},
      {{"n_heads": {HEADS}, "layer": 1}}),
    ("ShortlistLogits", {{"x": Tensor(dtype, ("batch", {WIDTH})), "table": rows,
      "copy": Tensor("int32", ({NEURONS}, 1, 8)), "scales": Tensor("float32", ({NEURONS}, 1)),
      "errors": Tensor("float32", ({NEURONS},)), "shortlist": count, "certify": count}}, {{}}),
]
# The same with a rest from a low-bit copy: the op chooses the units, or gets them.
copies = {{"rest": count}}
for part in ("gate", "up", "down"):
    copies |= {{"c_" + part: Tensor("int32", ({NEURONS}, 1, 8)), "cs_" + part: Tensor("float32", ({NEURONS}, 1))}}
chosen = {{"x": x, "count": count, "w_gate": rows, "w_up": rows, "w_down": rows, **copies,
  "down_norms": Tensor("float32", ({NEURONS},))}}
graphs.append(("SparseMLP", chosen, {{"activation": "silu", "layer": 1}}))
given = graphs[2][1] | {{name: port for name, port in copies.items() if "gate" not in name}}
graphs.append(("SparseMLP", given, {{"activation": "relu", "layer": 1}}))
gates = {{"x": x, "count": count, "w_gate": rows, "w_up": rows, "w_down": rows}}
graphs.append(("SparseMLP", gates, {{"activation": "fatrelu", "threshold": 0.01, "layer": 1}}))
packed = Tensor("int32", ({HEADS * HEAD_DIM}, 1, 8)), Tensor("float32", ({HEADS * HEAD_DIM}, 1))
given = graphs[3][1] | {{"rest": count}} | dict(zip(("c_q", "cs_q", "c_o", "cs_o"), 2 * packed))
chosen = {{name: port for name, port in given.items() if name != "indices"}}
chosen |= {{"score_weight": Tensor("float32", (2, {WIDTH})), "score_bias": Tensor("float32", (2,))}}
graphs += [("SparseAttention", one, {{"n_heads": {HEADS}, "layer": 1}}) for one in (chosen, given)]
# Nested integers, with residuals of 2 bits.
table = {{"w": Tensor("int16", ({NEURONS}, 1, 8)), "copy": Tensor("int32", ({NEURONS}, 1, 8)),
  "scales": Tensor("float32", ({NEURONS}, 1))}}
graphs.append(("NestedLinear", {{"x": Tensor(dtype, ("batch", {WIDTH})), **table,
  "bias": Tensor(dtype, ({NEURONS},))}}, {{}}))
graphs.append(("NestedGather", {{"ids": Tensor("int32", ("batch",)), **table}}, {{"width": {WIDTH}}}))
residuals = {{name: Tensor("int16", ({NEURONS}, 1, 8)) for name in ("w_up", "w_down")}}
graphs.append(("SparseMLP", graphs[6][1] | residuals, {{"activation": "relu", "layer": 1}}))
for op, inputs, attributes in graphs:
    limits = {{"max_batch": batch, "max_seqlen": seqlen, "sms": (sm, PTX)}}
    program = compile_program(op, inputs, attributes, **limits)
    again = compile_program(op, inputs, attributes | {{"layer": 2}}, **limits)
    assert again is program or "layer" not in attributes, "the layers of a model share a program"
    print(pack(program).hex())
"""


# The type, the largest batch, the most tokens, and the architecture. To compile a kernel takes almost half a second, so
# only one type has all plans.
WHOLE, ONE_TOKEN = ("float16", "3", "9", "86"), ("float32", "1", "1", "90")
ROWS = ("SelectTopK", "ShortlistLogits", "NestedLinear", "NestedGather")  # a call of these has no sequences, only rows
PLANS = {"float16": [(1, 1), (3, 1), (3, 9)], "float32": [(1, 1)]}
COMPILED_FOR = {"float16": 86, "float32": 90}


@pytest.fixture(scope="module", params=[WHOLE, ONE_TOKEN], ids=lambda limits: limits[0])
def programs(request):
    """Compiled programs of each op: ``(dtype, {op: Program})``."""
    told = child("-c", COMPILE, *request.param)
    ops = ("SelectTopK", "ScoreNeurons", "SparseMLP", "SparseAttention", "ShortlistLogits")
    ops += ("SparseMLP chooses", "SparseMLP rest", "SparseMLP gate first")
    ops += ("SparseAttention chooses", "SparseAttention rest", "NestedLinear", "NestedGather", "SparseMLP integers")
    return request.param[0], dict(zip(ops, (unpack(bytes.fromhex(line)) for line in told.split()), strict=True))


def test_ports(programs):
    dtype, found = programs
    assert found["SelectTopK"].inputs == ("float32", "int32")
    assert found["SparseMLP"].inputs == (dtype, "int32", "int32", dtype, dtype, dtype)
    assert found["ScoreNeurons"].inputs == (dtype, "int32", "float32", dtype, dtype, "float32", "int32")
    (scores,) = found["ScoreNeurons"].outputs
    assert (scores.dtype, scores.shape) == ("float32", (1, (3, 0)))
    logits, recomputed = found["ShortlistLogits"].outputs
    assert (logits.dtype, logits.shape) == ("float32", ((0, 0), (1, 0)))
    assert (recomputed.dtype, recomputed.shape) == ("int32", ((0, 0),))
    (indices,), (y,) = found["SelectTopK"].outputs, found["SparseAttention"].outputs
    assert (indices.dtype, indices.shape) == ("int32", ((0, 0), NEURONS))
    assert (y.dtype, y.shape) == (dtype, ((0, 0), (0, 1), (0, 2)))


def test_ports_of_nested_integers(programs):
    """An engine has the words of a residual of 2 bits as int32, though kernels read words of 16 bits."""
    dtype, found = programs
    assert found["NestedLinear"].inputs == (dtype, "int32", "int32", "float32", dtype)
    assert found["NestedGather"].inputs == ("int32", "int32", "int32", "float32")
    (products,), (rows,) = found["NestedLinear"].outputs, found["NestedGather"].outputs
    assert (products.dtype, products.shape) == (dtype, ((0, 0), (1, 0)))
    assert (rows.dtype, rows.shape) == ("float32", ((0, 0), WIDTH))
    (same, *_), (mlp, *_) = found["SparseMLP rest"].outputs, found["SparseMLP integers"].outputs
    assert mlp == same
    assert [kind for kind in found["SparseMLP integers"].inputs if "int" in kind] == ["int32"] * 7
    for op in ("NestedLinear", "NestedGather"):  # the kernel for one token loads a word at a time
        assert re.search(r"ld\.global\S*\.b16", found[op].kernels[0].images[0].data.decode())


def test_the_units_that_an_op_chooses_are_an_output(programs):
    dtype, found = programs
    for op in ("SparseMLP", "SparseAttention"):
        assert [output.dtype for output in found[op].outputs] == [dtype]
        assert [output.dtype for output in found[f"{op} rest"].outputs] == [dtype]
        assert [output.dtype for output in found[f"{op} chooses"].outputs] == [dtype, "int32"]
    assert [output.dtype for output in found["SparseMLP gate first"].outputs] == [dtype, "int32"]
    assert found["SparseMLP chooses"].outputs[1].shape == ((2, 0),)  # rows of w_gate, the input after x and count
    assert found["SparseAttention chooses"].outputs[1].shape == (HEADS,)


def test_packed_integers_are_signed(programs):
    """Words are unsigned in a program; an integer of a copy is in -8 .. 7."""
    _, found = programs
    for program in found.values():
        for kernel in program.kernels:
            text = next(image.data for image in kernel.images if image.sm == PTX).decode()
            assert not re.search(r"cvt\.rn\S*\.f\w+\.u32", text), kernel.name


def test_plans_cover_one_token_a_batch_and_prompts(programs):
    dtype, found = programs
    covered = [(plan.max_batch, plan.max_seqlen) for plan in found["SparseMLP"].plans]
    assert covered == PLANS[dtype]
    assert [(plan.max_batch, plan.max_seqlen) for plan in found["SelectTopK"].plans] == [(2, 1)]


def test_launches_fit_their_kernels(programs):
    """Grids are not empty, arguments have the types of the compiled kernel, and buffers are inside the workspace."""
    _, found = programs
    for program in found.values():
        for plan in program.plans:
            for launch in plan.launches:
                kernel = program.kernels[launch.kernel]
                text = next(image.data for image in kernel.images if image.sm == PTX).decode()
                wanted = ["u32" if a.kind == "int" else "u64" for a in launch.arguments] + ["u64"] * kernel.hidden
                entry = text[text.index(f".entry {kernel.name}(") : text.index(")\n", text.index(".entry"))]
                assert re.findall(r"\.param \.(u\d+)", entry) == wanted
                for a in launch.arguments:
                    assert a.kind != "workspace" or (a.value % 256 == 0 and a.value < plan.workspace_bytes)
                    assert a.kind != "input" or a.value < len(program.inputs)
                for batch in (1, plan.max_batch):
                    for seqlen in (1, plan.max_seqlen):
                        assert all(size(batch, seqlen) >= 1 for size in launch.grid)


def test_the_parameters_of_each_cubin_are_what_both_launchers_pass(programs):
    """A launcher passes 8 bytes for a pointer, and the first 4 of 8 for an int32; hidden pointers follow."""
    _, found = programs
    seen = set()
    for program in found.values():
        for launch in (launch for plan in program.plans for launch in plan.launches):
            kernel = program.kernels[launch.kernel]
            passed = [4 if a.kind == "int" else 8 for a in launch.arguments] + [8] * kernel.hidden
            for image in kernel.images:
                if image.sm != PTX:
                    assert [size for _, size in parameters(image.data, kernel.name)] == passed, kernel.name
                    seen.add(kernel.name)
    assert len(seen) > 12


def test_parameters_of_a_cubin_are_at_multiples_of_their_sizes(programs):
    _, found = programs
    kernel = found["SparseMLP"].kernels[0]
    places = parameters(kernel.images[1].data, kernel.name)
    assert places[0] == (0, 8)
    assert all(offset % size == 0 for offset, size in places)


def test_every_gpu_has_the_shared_memory(programs):
    """Most GPUs have 99 KiB; `test_long_heads_fit_small_gpus` tests the smallest, 64 KiB of sm_75."""
    _, found = programs
    for program in found.values():
        for kernel in program.kernels:
            assert all(image.shared_bytes <= 99 * 1024 for image in kernel.images)


def test_grids_cover_the_work(programs):
    """The first launch of SparseMLP has a block per tile of slots and of tokens."""
    dtype, found = programs
    wanted = [
        (Size(NEURONS, divisor=8), Size(), Size()),
        (Size(NEURONS, divisor=64), Size(batch=True, divisor=16), Size()),
        (Size(NEURONS, divisor=64), Size(batch=True, seqlen=True, divisor=64), Size()),
    ]
    assert [plan.launches[0].grid for plan in found["SparseMLP"].plans] == wanted[: len(PLANS[dtype])]


def test_ptx_is_for_the_oldest_gpu(programs):
    dtype, found = programs
    for program in found.values():
        for kernel in program.kernels:
            assert [image.sm for image in kernel.images] == [PTX, COMPILED_FOR[dtype]]
            assert ".target sm_80" in kernel.images[0].data.decode()
            assert kernel.images[1].data.startswith(b"\x7fELF")


@pytest.mark.parametrize("programs", [WHOLE], indirect=True, ids=["float16"])  # it has all plans
@pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler")
@pytest.mark.skipif(sys.platform != "linux", reason="the fake driver is a libcuda.so.1")
def test_both_interpreters_launch_the_same(programs, tmp_path):
    """The compiled kernels of all ops, with the batches and lengths that they have plans for."""
    pytest.importorskip(
        "cuda.bindings", reason="cuda-bindings is not installed (pip install 'shadowllm[tensorrt-rtx]')"
    )
    _, found = programs
    sizes = ((1, 1), (2, 1), (2, 9))
    calls = [(pack(found[op]), *size) for op in found for size in sizes if size[1] == 1 or op not in ROWS]
    python, cpp = record(build(tmp_path), tmp_path, calls, FAKE_SM="86")
    assert cpp == python
    launched = [line.split()[1] for line in python if line.startswith("launch")]
    assert {"select_topk", "mlp_hidden", "project_back", "decode_attention", "prompt_attention"} < set(launched)
    assert not [line for line in python if line.startswith(("error", "refused"))]
