"""The kernels on a GPU. Other tests check their logic in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from shadowllm.benchmarks.gpu import cases, checks
from shadowllm.plugins.ops.sparse_mlp.launcher import sparse_mlp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch sees"),
]


@pytest.mark.parametrize("case", cases.CASES, ids=str)
def test_errors_are_within_twice_pytorch_s_own(case):
    found = list(checks.check_all(torch.device("cuda"), (case,)))
    assert [check for check in found if not check.passed] == []


def test_one_graph_serves_every_count():
    device = torch.device("cuda")
    make = checks._random(torch.float16, device)
    x, up, down = make(1, 1, 256), make(512, 256, scale=0.06), make(512, 256, scale=0.06)
    indices, count = checks._selection(512, 512, device)

    def call():
        return sparse_mlp(x, indices, count, None, None, up, None, down, None, activation="relu")[0]

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for active in (512, 100, 1, 0):
        count.fill_(active)
        graph.replay()
        torch.testing.assert_close(captured, call())
        assert captured.abs().max() > 0 or active == 0
