"""Kernels compiled ahead of time for every architecture, without a GPU.

A process can use either Triton's interpreter or its compiler. The other tests use the interpreter, so these compile in
child processes. `test_compiled_programs` has the programs of whole ops.
"""

from __future__ import annotations

import json
import re

import pytest

from tests.plugins.compiler import child

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
SMS = (80, 86, 89, 90, 120)


def test_unknown_inputs_are_refused():
    """Before anything is compiled, so also where the interpreter runs."""
    from shadowllm.plugins.triton.compile import Tensor, compile_program

    inputs = {"x": Tensor("float32", (1, 2))}
    with pytest.raises(ValueError, match=re.escape("SelectTopK has inputs ['x']")):
        compile_program("SelectTopK", inputs, {"cap": 2}, max_batch=1, max_seqlen=1, sms=(80,))


def test_every_kernel_compiles_for_every_architecture_without_spilling(tmp_path):
    """At the shape of SmolLM2; the script also accepts 7B models.

    Each architecture has one type: compiling everything for one of them takes half a minute.
    """
    rows = []
    wanted = {"float16": (86, 90), "bfloat16": (80, 120), "float32": (89,)}
    assert sorted(sm for sms in wanted.values() for sm in sms) == list(SMS)
    for dtype, sms in wanted.items():
        path = tmp_path / f"{dtype}.json"
        arguments = ["--shapes", "smollm2-135m", "--dtypes", dtype, "--sms", *map(str, sms), "--json", str(path)]
        arguments += ["--machine-code", str(sms[0])] if dtype != "bfloat16" else []
        child("-m", "shadowllm.benchmarks.kernel_resources", *arguments)
        rows += json.loads(path.read_text())["kernels"]["smollm2-135m"]
    for dtype, sms in wanted.items():
        for sm in sms:
            of_one = [row for row in rows if (row["dtype"], row["sm"]) == (dtype, sm)]
            assert {row["kernel"] for row in of_one} == {
                "select_topk",
                "score_neurons",
                "mlp_hidden",
                "gate_first",
                "list_fired",
                "project_heads",
                "decode_attention",
                "prompt_attention",
                "project_back",
                "score_heads",
                "sum_partials",
                "sum_and_norm",
                "table_logits",
                "copy_logits",
                "choose_shortlist",
                "shortlist_logits",
                "bound_row",
                "doubtful_logits",
                "count_rows",
                "write_step",
            } | ({"multiply_rows", "gather_rows"} if dtype == "float32" else set())
    assert not [row for row in rows if row["spilled_bytes"]]
    assert all(0 < row["registers"] <= 255 and row["shared_bytes"] <= 99 * 1024 for row in rows)
    # One token's products are fused multiply-adds, and threads do not wait for each other inside a loop.
    read = [row for row in rows if row["multiply_adds"] is not None]
    fused = {row["kernel"] for row in read if row["multiply_adds"] and not row["loop_barriers"]}
    assert {"mlp_hidden", "project_back", "score_neurons", "project_heads", "table_logits"} <= fused
    # Also those of nested integers.
    kernels = {"mlp_hidden", "project_back", "project_heads", "table_logits", "shortlist_logits", "multiply_rows"}
    of_integers = [row for row in read if "of integers" in row["op"] and row["kernel"] in kernels]
    assert {row["kernel"] for row in of_integers} == kernels
    assert all(row["multiply_adds"] for row in of_integers)
    # The output projection of attention merges the spans of the cache in its loop, and the choice of neurons counts.
    waiting = {(row["kernel"], row["op"].split()[0]) for row in of_integers if row["loop_barriers"]}
    assert waiting <= {("project_back", "SparseAttention"), ("mlp_hidden", "SparseMLP")}


# For each line of arguments, prints the shared memory that a tile of a prompt's attention needs, with its own constants
# or with others.
ATTEND = """
import sys
from shadowllm.errors import UserError
from shadowllm.plugins.triton.compile import ITEMSIZE, POINTERS, compile_kernel
from shadowllm.plugins.triton.schedule import PREFILL, Tier
from shadowllm.plugins.ops.sparse_attention.kernel import prompt_attention
from shadowllm.plugins.ops.sparse_attention.schedule import plan_sparse_attention
for line in sys.argv[1:]:
    dtype, *numbers = line.split()
    head_dim, sm, *other = map(int, numbers)
    heads = {"x": (0, 0, 64), "key": (1, 1, 300, head_dim), "indices": (2,)}
    heads |= dict.fromkeys(("w_q", "w_o"), (2 * head_dim, 64))
    planned = plan_sparse_attention(heads, ITEMSIZE[dtype], Tier(1, 64, PREFILL), 2)
    (call,) = [call for call in planned.calls if call.kernel is prompt_attention]
    floats, integers = ("query", "key", "value", "context"), ("lengths", "indices", "count")
    types = dict.fromkeys(floats, POINTERS[dtype]) | dict.fromkeys(integers, "*i32") | {"seqlen": "i32"}
    types = {name: types[name] for name in call.kernel.arg_names if name in types}
    constants = {**call.constants, **dict(zip(("BLOCK_H", "BLOCK_M"), other))}
    try: kernel = compile_kernel(call.kernel, types, constants, warps=call.warps, stages=call.stages, sms=(sm,))
    except UserError as error: print(error)
    else: print(kernel.images[0].shared_bytes)
"""
LONG_HEADS = {"float32 256 86": 99, "float32 256 75": 64, "float16 256 75": 64, "float32 80 75": 64}  # KiB of the GPU
TOO_LARGE = "float16 256 86 512 64"


@pytest.fixture(scope="module")
def attended():
    """What `ATTEND` prints for each line of arguments."""
    lines = (*LONG_HEADS, TOO_LARGE)
    return dict(zip(lines, child("-c", ATTEND, *lines).splitlines(), strict=True))


@pytest.mark.parametrize("line", LONG_HEADS)
def test_long_heads_fit_small_gpus(attended, line):
    assert 16 * 1024 < int(attended[line]) <= LONG_HEADS[line] * 1024


def test_a_kernel_too_large_for_a_gpu_is_refused_by_name(attended):
    told = attended[TOO_LARGE]
    assert re.match(r"kernel prompt_attention needs 1\d\d KiB of shared memory, and sm_86 has 99; ", told)
    assert "leave 86 out of --sm" in told
