"""Programs packed ahead of time, and the launchers that run them without TensorRT; without a GPU, on a fake driver."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install 'shadowllm[triton]')")
pytest.importorskip("cuda.bindings", reason="cuda-bindings is not installed (pip install 'shadowllm[tensorrt-rtx]')")

from shadowllm.benchmarks.gpu import programs
from shadowllm.bundle.gpu_images import PTX
from shadowllm.errors import UserError
from shadowllm.plugins.kernel_program_bytes import unpack

ROOT = Path(__file__).parents[2]
CXX = os.environ.get("CXX", "c++")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(CXX) is None, reason="no C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
]

# PTX tells the fake driver how many parameters a kernel has.
WRITE = """
import sys
from pathlib import Path
from shadowllm.benchmarks.gpu import programs
from shadowllm.benchmarks.kernel_programs import Shape, block_nodes, nested_nodes, nodes
from shadowllm.bundle.gpu_images import PTX
programs.SHAPES["tiny"] = Shape(48, 88, 2, 4, 2, 12, gated=True, capacity=300, vocab_size=97)
# The blocks of a layer, one node with prompts, and of nested integers the products, rows and a residual of 2 bits.
programs.nodes = lambda *model: [*block_nodes(*model, max_batch=3), nodes(*model)[2]]
programs.nested_nodes = lambda *model: [node for node in nested_nodes(*model) if node.op != "SparseAttention"]
programs.write(Path(sys.argv[1]), ["tiny"], "float16", [PTX])
"""
# Each launcher makes the same calls, with invented addresses.
RUN = """
import sys
from pathlib import Path
from shadowllm.benchmarks.gpu import programs
runners = {"python": programs.python_runner(), "c++": programs.library_runner(Path(sys.argv[2]))}
for name, runner in runners.items():
    print(name, flush=True)
    for _, node, packed in programs.read(Path(sys.argv[1]))[:2]:
        inputs = [4096 * (i + 1) for i in range(len(node.inputs))]
        runner(packed, (1, 1, 48), inputs, [1 << 20, 1 << 21], 1 << 30, 0x55)
    try:
        runner(packed, (1, 1, 48), [8] * len(inputs), [1 << 20, 1 << 21], 1 << 30, 0x55)
    except (RuntimeError, ValueError) as error:
        print(error, flush=True)
"""


def child(code: str, *arguments: object, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | variables
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("programs")
    child(WRITE, found)
    return found


def test_both_launchers_run_what_was_packed(folder, tmp_path):
    fake, library = tmp_path / "libcuda.so.1", tmp_path / "libshadowllm_programs.so"
    shared = [CXX, "-shared", "-fPIC", "-O1"]
    source = ROOT / "tests" / "plugins" / "driver" / "fake_cuda.c"
    subprocess.run([*shared, "-x", "c", str(source), "-o", str(fake), "-ldl"], check=True)
    cpp = ROOT / "plugins" / "tensorrt" / "cpp"
    sources = [str(cpp / f"{name}.cpp") for name in ("run_program", "launcher", "driver", "kernel_program")]
    subprocess.run([*shared, "-std=c++17", *sources, "-o", str(library), "-ldl"], check=True)
    paths = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("LD_LIBRARY_PATH")]))
    told = child(RUN, folder, library, LD_LIBRARY_PATH=paths, FAKE_SM="86")
    python, own = told.removeprefix("python\n").split("c++\n")
    launches = [line for line in python.splitlines() if line.startswith("launch")]
    assert [line.split()[1] for line in launches] == [
        "project_heads",
        "decode_attention",
        "project_back",
        "mlp_hidden",
        "project_back",
    ]
    assert [line for line in own.splitlines() if line.startswith("launch")] == launches
    assert own.splitlines()[-1] == python.splitlines()[-1] == "input 0 does not begin at a multiple of 16 bytes"


def test_inputs_and_outputs_fit_the_programs(folder):
    """What Triton's own launches write: numbers in every place, and the step's keys and values in the cache."""
    calls = [(*program, *size) for program in programs.read(folder) for size in programs.sizes(program[1])]
    assert {size[-2:] for size in calls} == {(1, 1), (3, 1), (1, 7)}
    assert {call[1].op for call in calls} > {"NestedLinear", "NestedGather", "ShortlistLogits"}
    for _, node, packed, batch, seqlen in calls:
        inputs = programs.make_inputs(node, torch.device("cpu"), batch, seqlen)
        before = {name: tensor.clone() for name, tensor in inputs.items()}
        outputs = programs.expected(node, unpack(packed), inputs)
        assert all(tensor.isfinite().all() and (tensor != -7).all() for tensor in outputs)
        assert programs.difference(outputs[0], outputs[0]) == 0
        assert programs.difference(outputs[0] * 1.1, outputs[0]) > 0.05
        assert programs.difference(outputs[0] * float("nan"), outputs[0]) == float("inf")
        if node.op == "SparseAttention":
            changed = (inputs["key"] != before["key"]).any(dim=-1).nonzero()
            assert (changed[:, 2] == programs.LENGTH - 1).all()
            assert len(changed) == 2 * batch


WRITE_TWICE = """
import sys
from pathlib import Path
from shadowllm.benchmarks.gpu import programs
all_nodes = programs.nodes
programs.nodes, programs.nested_nodes = lambda *model: all_nodes(*model)[:1], lambda *_model: []
programs.write(Path(sys.argv[1]), ["smollm2-135m"], "float16", [86, 90])
"""


def test_programs_with_dependent_launch_are_written_too(tmp_path):
    """Without the GPUs that do not have it; a driver that is too old takes the PTX."""
    child(WRITE_TWICE, tmp_path)
    found = {name: unpack(packed) for name, _, packed in programs.read(tmp_path)}
    assert {name: [(i.sm, i.waits) for i in program.kernels[0].images] for name, program in found.items()} == {
        "smollm2-135m-0-SelectTopK.program": [(PTX, False), (86, False), (90, False)],
        "smollm2-135m-0-SelectTopK-dependent.program": [(PTX, False), (90, True)],
    }


def test_a_timed_call_is_repeated():
    made = []
    programs.repeated(lambda: made.append(1))()
    assert len(made) == programs.CALLS


def test_a_folder_without_programs(tmp_path):
    with pytest.raises(UserError, match="has no programs; write them"):
        programs.read(tmp_path)
    with pytest.raises(UserError, match=r"is no library of the C\+\+ launcher"):
        programs.library_runner(tmp_path / "none.so")
