"""The GPU benchmark at tiny sizes. Without a GPU, kernels run in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install 'shadowllm[triton]')")

from shadowllm.benchmarks import random_model
from shadowllm.benchmarks.gpu import cases, checks, decode, engines, rates
from shadowllm.benchmarks.gpu.__main__ import Recorder, main
from shadowllm.benchmarks.gpu.child import answer
from shadowllm.benchmarks.gpu.probe import probe
from shadowllm.bundle.weight_file import TORCH_DTYPES
from shadowllm.bundle.weight_layout import copy_groups
from shadowllm.models.sparsity import SparseLayers
from shadowllm.plugins.ops.select_topk import launcher as topk_launcher
from shadowllm.plugins.ops.sparse_mlp import launcher as mlp_launcher
from shadowllm.plugins.tensorrt.load_tensorrt import FLAVOURS
from shadowllm.runtime import open_session
from shadowllm.runtime.gpu.cuda_graph import kernel_device

pytestmark = pytest.mark.slow

# What a bare GPU machine lacks.
ABSENT = (
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "rich",
    "matplotlib",
    "tensorrt_rtx",
    "tensorrt",
    "polygraphy",
    "psutil",
)
BARE = f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); from shadowllm.benchmarks.gpu.__main__ import main; "
if not torch.cuda.is_available():
    ROOT = str(Path(__file__).parents[2])
    BARE += f"sys.path.append({ROOT!r}); from tests.triton_interpreter import patch_once_per_launch as patch; patch(); "


def test_all_of_it_on_a_bare_machine(tmp_path):
    path = tmp_path / "gpu.json"
    code = BARE + f"sys.exit(main(['--tiny', '--json', {str(path)!r}]))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(path.read_text())
    assert record["failed"] == []
    found = record["results"]
    assert set(found) == {
        "tensorrt: tensorrt_rtx", "tensorrt: tensorrt", "checks", "rates", "decode: tiny-opt", "decode: tiny-llama",
    }  # fmt: skip
    assert found["checks"]["passed"]
    assert len(found["checks"]["checks"]) == 2 * 14 + 2
    on_gpu = torch.cuda.is_available()
    for shape in ("tiny-opt", "tiny-llama"):
        result = found[f"decode: {shape}"]
        assert result["all_active_error"] < 1e-2
        assert set(result["contenders"]) == {decode.SPARSE, decode.QUANTISED, decode.DENSE}
        assert result["contenders"][decode.SPARSE]["allowed"] > 1
        assert all((one["speedup"] is not None) is on_gpu for one in result["contenders"].values())
    assert (found["rates"]["copy_gb_per_s"] is not None) is on_gpu


def test_a_failure_is_recorded_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def broken(*_arguments):
        raise RuntimeError("no such luck")

    path = tmp_path / "gpu.json"
    monkeypatch.setattr(decode, "measure_shape", broken)
    assert main(["--tiny", "--only", "tensorrt", "decode", "--json", str(path)]) == 1
    record = json.loads(path.read_text())
    assert record["failed"] == ["decode: tiny-opt", "decode: tiny-llama"]
    assert record["results"]["decode: tiny-llama"]["error"] == "RuntimeError: no such luck"
    assert "failed: decode: tiny-opt, decode: tiny-llama" in capsys.readouterr().err


def test_a_wrong_kernel_fails_its_check(monkeypatch):
    device, right = kernel_device(), mlp_launcher.sparse_mlp
    monkeypatch.setattr(mlp_launcher, "sparse_mlp", lambda *a, **k: (right(*a, **k)[0] * 1.02, None))
    case = cases.TINY[0]
    assert not checks.check_mlp(case, torch.float16, device).passed
    monkeypatch.setattr(topk_launcher, "select_topk", lambda scores, counts, cap: torch.zeros(len(scores), cap).int())
    found = [checks.check_topk(replace(cases.TINY[-1], count=3), device)]
    assert checks.summary(found) | {"checks": []} == {
        "passed": False, "worst_share_of_allowed": 0.0, "failed": [found[0].case], "checks": [],
    }  # fmt: skip


def test_rows_that_relu_skips_are_not_counted():
    """Of the down projection, only rows of neurons above zero are read; of up, all rows of active neurons."""
    x, up = torch.ones(1, 1, 4), torch.ones(88, 4)
    assert rates.fired(x, up) == 88
    assert rates.fired(x, -up) == 0
    ops = rates._ops(torch.device("cpu"), torch.float16, rates.TINY)
    (make, bytes_of), _ = ops["SparseMLP"]
    up, down = make()
    row = rates.TINY.hidden * 2
    assert bytes_of(-up.abs(), down) + bytes_of(up.abs(), down) > 2 * 44 * row
    assert 44 * row < bytes_of(up, down) < 2 * 44 * row


@pytest.mark.parametrize(("positive", "read"), [(10, 0), (44, 0), (60, 16)])
def test_rows_of_the_copy_that_relu_skips_are_not_counted(monkeypatch, positive, read):
    """The active half has the best scores, so nearly all neurons above zero are in it."""
    device, sizes = kernel_device(), rates.TINY

    def ones(device, dtype, *shapes):
        return lambda: tuple(torch.ones(shape, dtype=dtype, device=device) for shape in shapes)

    monkeypatch.setattr(rates, "_random", ones)
    (make, bytes_of), _ = rates._copy_ops(device, torch.float16, sizes)["SparseMLP with a rest"]
    up, down, c_up, cs_up, down_norms, c_down, cs_down = make()
    c_up[:positive], c_up[positive:] = 0x99, 0x77  # 1 and -1, in both halves of a byte
    found = bytes_of(up, down, c_up, cs_up + 1, down_norms + 1, c_down, cs_down)
    rows, copy = (44 + 44) * sizes.hidden * 2, sum(t.nbytes for t in (c_up, cs_up, down_norms))
    assert found == rows + copy + read * (c_down[0].nbytes + cs_down[0].nbytes)


def test_a_decode_of_a_relu_model_counts_the_rows_that_it_reads():
    device = torch.device("cpu")
    shares = {}
    for shape in ("tiny-opt", "tiny-llama"):
        spec = random_model.shape_spec(shape)
        weights = dict(random_model.RandomWeights(spec, torch.float32, device))
        shares[shape] = decode.fired_share(spec, weights, device)
    assert shares["tiny-llama"] == 1
    assert 0.2 < shares["tiny-opt"] < 0.8
    spec, setting = random_model.shape_spec("tiny-opt"), decode.TINY
    shadow = random_model.untrained("shadow", spec, "", rank=2)
    all_read, half_read = (decode._bytes(spec, shadow, setting, fired) for fired in (1, 0.5))
    active = setting.budget.counts(SparseLayers(spec, shadow.dense_layers))["neurons"].sum()
    assert all_read - half_read == active * spec.hidden_size  # half of the rows, two bytes per element
    assert decode._bytes(spec, None, setting, 0.5) == decode._bytes(spec, None, setting, 1)


def test_a_recorder_counts_what_did_not_pass():
    recorder = Recorder(None, {"results": {}})
    recorder.run("good", lambda: {"passed": True})
    recorder.run("bad", lambda: {"passed": False})
    assert recorder.failed == recorder.record["failed"] == ["bad"]


def test_onnxruntime_as_a_contender(bundle):
    prompt, forced = [[5, 17, 42]], [3, 90]
    with (
        engines.OrtDense(bundle(), 16, "CPUExecutionProvider", "cpu") as ours,
        open_session(bundle(), "torch-dense") as theirs,
    ):
        for _ in range(2):  # the second time over what the first one left in the cache
            found = []
            for session in (ours, theirs):
                session.reset()
                found.append([session.prefill(prompt).copy(), *(session.decode(np.array([t])).copy() for t in forced)])
            np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_the_probe_tells_why_tensorrt_does_not_run():
    assert probe("tensorrt_of_another_kind")["error"] == "tensorrt_of_another_kind is not installed"
    pytest.importorskip("tensorrt_rtx")
    found = probe("tensorrt_rtx")
    assert found["runs"] is False
    assert "deserialising failed" in found["error"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_each_flavour_has_a_process_and_its_errors_name_it(bundle):
    pytest.importorskip("tensorrt_rtx")
    before = os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX"), "polygraphy.config" in sys.modules
    for flavour in FLAVOURS:
        found = engines.in_child(bundle(), flavour, decode.TINY)
        assert found == {
            "error": f"{flavour}: UserError: there is no NVIDIA GPU here to run engines on; "
            "run this on a machine with one"
        }
    assert (os.environ.get("POLYGRAPHY_USE_TENSORRT_RTX"), "polygraphy.config" in sys.modules) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_toolkits_that_do_not_run_are_findings():
    found = engines.measure_shape("tiny-llama", decode.TINY)
    assert found["shape"] == "tiny-llama"
    for name in (*FLAVOURS, "onnxruntime"):
        assert "\n" not in found[name]["error"]
        assert found[name]["error"].startswith(name)
    assert "has no CUDAExecutionProvider" in found["onnxruntime"]["error"]


class TestChildren:
    """Programs that end in various ways."""

    DIVIDE = "from shadowllm.child import serve; raise SystemExit(serve(lambda number, _: {'a': 1 / number}))"

    def answer(self, code, request=None, timeout=60):
        return answer("it", (sys.executable, "-c", code), request, timeout=timeout)

    def test_an_answer(self):
        assert self.answer(self.DIVIDE, 1) == {"a": 1}

    def test_a_crash_is_one_line(self):
        code = "import os, sys; print('last words', file=sys.stderr, flush=True); os.abort()"
        assert self.answer(code) == {"error": "it: killed by SIGABRT: last words"}

    def test_a_bug_is_one_line(self):
        error = self.answer(self.DIVIDE, 0)["error"]
        assert error.startswith("it: exit status 1: ")
        assert error.endswith(" | ZeroDivisionError: division by zero")
        assert "\n" not in error

    def test_no_answer(self):
        assert self.answer("import time; time.sleep(60)", timeout=0.5) == {"error": "it: no answer within 0.5 s"}
        assert self.answer("import this")["error"].startswith("it: exit status 0: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_large_sizes_are_not_for_the_interpreter(capsys):
    assert main(["--quick"]) == 1
    assert "too slow for anything but --tiny" in capsys.readouterr().err


def test_random_copies_are_like_a_bundle_s():
    layers = SparseLayers(random_model.shape_spec("tiny-llama"), 1)
    copies = random_model.RandomCopies(layers, torch.device("cpu"))
    wanted = {
        name: (shape, TORCH_DTYPES[dtype]) for group in copy_groups(layers, rest=True) for name, shape, dtype in group
    }
    assert {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in copies.items()} == wanted
