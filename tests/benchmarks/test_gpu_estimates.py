"""The model behind the estimates: bytes of a layer, and what bounds a launch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="triton is not installed (pip install 'shadowllm[triton]')")

from shadowllm.benchmarks.gpu_estimates import ITEM, Gpu, _bytes, _launch, summary
from shadowllm.benchmarks.kernel_programs import SHAPES, block_nodes
from shadowllm.plugins.registry import schedules


def calls(shape):
    for node in block_nodes(shape, "float16"):
        shapes = {name: tuple(n if isinstance(n, int) else 0 for n in t.shape) for name, t in node.inputs.items()}
        (schedule,) = schedules(node.op)(shapes, node.attributes, itemsize=ITEM, max_batch=1, max_seqlen=1)
        yield from ((call, node.op) for call in schedule.calls)


@pytest.mark.parametrize("name", ["opt-6.7b", "llama-2-7b", "smollm2-135m"])
def test_with_all_units_active_a_layer_reads_all_its_matrices_and_the_cache(name):
    shape, context = SHAPES[name], 100
    read = sum(_bytes(shape, call, op, context, 1, 1, 1)[0] for call, op in calls(shape))
    width, kv = shape.hidden_size, 2 * shape.n_kv_heads * shape.head_dim
    rows = 2 * shape.n_heads * shape.head_dim + kv + (3 if shape.gated else 2) * shape.intermediate_size
    assert read == ITEM * (rows * width + kv * context)


def test_relu_saves_rows_of_down_and_a_budget_rows_of_both():
    shape = SHAPES["opt-6.7b"]
    found = {}
    for neurons, fired in ((1, 1), (0.5, 1), (0.5, 0.5)):
        mlp = [_bytes(shape, call, op, 1, 1, neurons, fired)[0] for call, op in calls(shape) if op == "SparseMLP"]
        found[neurons, fired] = mlp[:2]
    matrix = ITEM * shape.intermediate_size * shape.hidden_size
    assert list(found.values()) == [[matrix, matrix], [matrix / 2, matrix / 2], [matrix / 2, matrix / 4]]


def test_what_bounds_a_launch():
    gpu = Gpu()
    found = {call.kernel.fn.__name__: call for call, _ in calls(SHAPES["opt-6.7b"])}
    call = found["project_back"]
    used = SimpleNamespace(registers=64, threads=128, shared_bytes=0)
    shortest = _launch(gpu, call, used, 1, 1)
    assert (shortest.bound, shortest.microseconds) == ("launch", pytest.approx(1e6 * (gpu.launch + 2 * gpu.latency)))
    assert _launch(gpu, call, used, 10**8, 140).bound == "in flight"
    few = _launch(replace(gpu, latency=1e-9), call, used, 10**6, 1)
    assert (few.bound, few.microseconds) == ("few blocks", pytest.approx(10, rel=1e-3))
    many = _launch(gpu, call, used, 10**9, 10**6)
    assert (many.bound, many.resident) == ("bytes", 8 * gpu.multiprocessors)  # 65536 / (64 * 128) is 8
    fewer = _launch(gpu, call, SimpleNamespace(registers=250, threads=128, shared_bytes=0), 10**9, 10**6)
    assert fewer.resident == 2 * gpu.multiprocessors  # 65536 / (256 * 128)
    assert fewer.microseconds > many.microseconds


def test_a_step_has_a_dense_layer_and_the_output_table():
    shape, gpu = SHAPES["opt-6.7b"], Gpu()
    found = summary(shape, gpu, [], 0)
    assert found["launches_per_layer"] == 0
    dense_layer = ITEM * shape.hidden_size * (4 * shape.hidden_size + 2 * shape.intermediate_size)
    table = ITEM * shape.vocab_size * shape.hidden_size
    assert found["ratio"] == pytest.approx((shape.n_layers * dense_layer + table) / (dense_layer + table))
