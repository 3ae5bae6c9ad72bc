"""Engines from the real TensorRT-RTX builder, and every error of a build."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from shadowllm.bundle.engine_record import ShapeProfile, check_sidecar, read_sidecar
from shadowllm.bundle.gpu_images import PTX
from shadowllm.bundle.manifest import file_hash
from shadowllm.errors import UserError
from shadowllm.exporter.engines import build as engine
from shadowllm.exporter.engines.graph import describe_onnx
from shadowllm.exporter.engines.inspect_engine import engine_contents
from shadowllm.exporter.engines.profiles import profiles_for
from shadowllm.plugins.engine_programs import carried, programs_in
from shadowllm.plugins.tensorrt import load_tensorrt
from tests.exporter.engines.samples import DTYPES, write_sample, write_selection, write_sum

pytestmark = pytest.mark.slow

needs_builder = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="tensorrt_rtx is not installed (pip install 'shadowllm[tensorrt-rtx]')",
)


def build(onnx_path, engine_path, *, sms=(80,), **options):
    profiles = profiles_for(describe_onnx(onnx_path), capacity=64, max_seqlen=32, max_batch=2)
    return engine.build_engine(onnx_path, engine_path, flavour="tensorrt_rtx", profiles=profiles, sms=sms, **options)


@needs_builder
@pytest.mark.parametrize("dtype", DTYPES)
def test_engine_holds_the_plugins(tmp_path, dtype):
    onnx_path, engine_path = write_sample(tmp_path / "sample.onnx", dtype), tmp_path / "engines" / "sample.engine"
    record = build(onnx_path, engine_path, sms=(89,))
    assert [node.op for node in record.plugins].count("SelectTopK") == 4
    assert [(n.name, n.layer) for n in record.plugins if n.op == "SparseMLP"] == [
        ("layers.5.SparseMLP", 5),
        ("layers.6.SparseMLP", 6),
    ]
    engine = engine_path.read_bytes()
    for word in (b"SelectTopK", b"SparseAttention", b"SparseMLP", b"layers.6.SparseMLP"):
        assert word in engine
    programs = set(programs_in(engine))
    assert {program.inputs[0] for program in programs} == {"float32", dtype}  # scores, or hidden states
    assert carried(programs) == record.kernels
    assert record.engine_bytes == len(engine) > describe_onnx(onnx_path).weight_bytes
    assert record.files == {name: file_hash(tmp_path / name) for name in ("sample.onnx", "sample.onnx.data")}
    assert record.compute_capabilities == (89,)
    assert {"select_topk", "mlp_hidden", "decode_attention"} < set(record.kernels)
    assert set(record.kernels.values()) == {(89,)}
    assert [profile.name for profile in record.profiles] == ["prefill", "decode"]
    assert read_sidecar(engine_path) == engine_contents(engine_path) == record
    here = {"compute_capability": 89, "files": record.files}
    assert check_sidecar(engine_path, "tensorrt_rtx", record.version, **here) == record
    assert sorted(p.name for p in engine_path.parent.iterdir()) == ["sample.engine", "sample.engine.json"]


@needs_builder
def test_networks_inside_the_layers_become_an_engine(bundle, tmp_path):
    record = build(bundle("llama-head-dim-16", kind="layerwise") / "body.onnx", tmp_path / "body.engine")
    of_a_layer = ["SelectTopK", "SparseAttention", "SelectTopK", "SparseMLP"]
    assert [node.op for node in record.plugins] == of_a_layer * 2


@needs_builder
def test_gate_first_becomes_an_engine(bundle, tmp_path):
    record = build(bundle("llama-relu", kind="relu") / "body.onnx", tmp_path / "body.engine")
    assert [node.op for node in record.plugins] == ["SelectTopK", "SparseAttention", "SparseMLP"] * 2
    assert {"gate_first", "list_fired"} < set(record.kernels)


@needs_builder
def test_target_gpus_can_be_chosen(tmp_path):
    onnx_path = write_selection(tmp_path / "selection.onnx")
    chosen = [build(onnx_path, tmp_path / f"{i}.engine", sms=sms) for i, sms in enumerate([(120, 80), (75,)])]
    assert [record.compute_capabilities for record in chosen] == [(80, 120), (75,)]
    # Images for 12.0 need a new driver, so the kernels carry PTX too.
    assert [set(record.kernels.values()) for record in chosen] == [{(PTX, 80, 120)}, {(75,)}]
    headers = {(tmp_path / f"{i}.engine").read_bytes()[:64] for i in range(2)}
    assert len(headers) == 2  # the targets are in the engine's header


@needs_builder
@pytest.mark.parametrize(
    ("flavour", "capability", "wanted"), [("tensorrt_rtx", None, [80, 86, 89, 120, 121]), ("tensorrt", 90, [90])]
)
def test_default_targets(monkeypatch, flavour, capability, wanted):
    monkeypatch.setattr(load_tensorrt, "gpu_capability", lambda: capability)
    assert load_tensorrt.targets(flavour, []) == wanted


@needs_builder
def test_the_kernels_of_an_engine_wait_if_that_is_wanted(tmp_path):
    path = write_selection(tmp_path / "selection.onnx")
    for wanted in (False, True):
        build(path, tmp_path / "x.engine", sms=(120,), programmatic_dependent_launch=wanted)
        kernels = [k for program in programs_in((tmp_path / "x.engine").read_bytes()) for k in program.kernels]
        assert {(image.sm, image.waits) for k in kernels for image in k.images} == {(PTX, False), (120, wanted)}


@needs_builder
def test_unknown_target_names_the_known_ones(tmp_path):
    with pytest.raises(UserError, match=r"sm_90; it knows 75, 80, 86, 89, 120, 121"):
        build(write_sample(tmp_path / "sample.onnx"), tmp_path / "sample.engine", sms=(90,))
    assert not (tmp_path / "sample.engine").exists()


@needs_builder
def test_bfloat16_is_not_for_sm_75(tmp_path):
    with pytest.raises(UserError, match=r"sm_75 have no bfloat16; export with --dtype fp16, or leave 75 out"):
        build(write_sample(tmp_path / "sample.onnx", "bfloat16"), tmp_path / "sample.engine", sms=(75, 80))
    assert not (tmp_path / "sample.engine").exists()


# In a child process, because Polygraphy can be imported for one flavour only. Stops before the engine is built.
CONFIGURE = """
import json, sys
from shadowllm.exporter.engines import worker
from shadowllm.plugins.tensorrt import load_tensorrt
trt = load_tensorrt.load("tensorrt_rtx")
from polygraphy.backend import trt as polygraphy
def stop(_network, config, **_options):
    print(config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION), config.max_aux_streams)
    sys.exit()
polygraphy.EngineBytesFromNetwork = stop
worker.build(json.loads(sys.argv[1]), lambda _phase: None)
"""


@needs_builder
def test_steps_can_be_captured(tmp_path):
    """A step of an engine allocates nothing, and all of its work is on one stream."""
    path, profile = write_sum(tmp_path / "sum.onnx"), ShapeProfile("own", dict.fromkeys("ab", ((1,), (2,), (3,))))
    request = engine.request_for(path, describe_onnx(path), tmp_path / "sum.engine", "tensorrt_rtx", [profile])
    command = [sys.executable, "-c", CONFIGURE, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True 0"


@needs_builder
def test_what_the_parser_refuses(tmp_path):
    path, profile = write_sum(tmp_path / "sum.onnx", op="NoSuchOp"), dict.fromkeys("ab", ((1,), (2,), (3,)))
    with pytest.raises(UserError, match=r"the ONNX parser refuses sum.onnx: NoSuchOp .*[Pp]lugin not found"):
        engine.build_engine(
            path, tmp_path / "out" / "sum.engine", flavour="tensorrt_rtx", profiles=[ShapeProfile("own", profile)]
        )
    assert not list((tmp_path / "out").iterdir())


@needs_builder
def test_what_the_builder_refuses_leaves_the_old_engine(tmp_path):
    path, target = write_sum(tmp_path / "sum.onnx"), tmp_path / "out" / "sum.engine"
    good = [ShapeProfile("own", dict.fromkeys("ab", ((2,), (3,), (4,))))]
    record = engine.build_engine(path, target, flavour="tensorrt_rtx", profiles=good)
    bad = [ShapeProfile("own", {"a": ((3,),) * 3, "b": ((5,),) * 3}), ShapeProfile("other", good[0].shapes)]
    with pytest.raises(UserError, match=r"cannot build sum.engine: TensorRT refuses: .*Error Code"):
        engine.build_engine(path, target, flavour="tensorrt_rtx", profiles=bad)
    assert check_sidecar(target, "tensorrt_rtx", record.version) == record
    assert len(list(target.parent.iterdir())) == 2


@needs_builder
def test_a_killed_builder_is_reported(tmp_path):
    def kill(_phase: str) -> None:
        for child in psutil.Process().children():
            child.send_signal(signal.SIGKILL)

    graph = describe_onnx(write_sample(tmp_path / "sample.onnx"))
    request = engine.request_for(
        tmp_path / "sample.onnx",
        graph,
        tmp_path / "sample.part",
        "tensorrt_rtx",
        profiles_for(graph, capacity=8, max_seqlen=8),
    )
    with pytest.raises(UserError, match="builder process died of SIGKILL"):
        engine.run_worker(request, "sample.engine", kill)
    assert not (tmp_path / "sample.part").exists()


@needs_builder
def test_a_bug_in_the_worker_is_no_user_error(tmp_path):
    graph = describe_onnx(write_sum(tmp_path / "sum.onnx"))
    profile = ShapeProfile("own", dict.fromkeys("ab", ((1,), (2,), (3,))))
    request = engine.request_for(tmp_path / "sum.onnx", graph, tmp_path / "no" / "folder", "tensorrt_rtx", [profile])
    with pytest.raises(RuntimeError, match="FileNotFoundError"):
        engine.run_worker(request, "sum.engine", lambda _phase: None)


@needs_builder
def test_missing_weights_are_named(tmp_path):
    path = write_sample(tmp_path / "sample.onnx")
    os.remove(tmp_path / "sample.onnx.data")
    with pytest.raises(UserError, match=r"sample.onnx.data, which is missing"):
        build(path, tmp_path / "sample.engine")


@needs_builder
def test_timing_cache_is_not_for_rtx(tmp_path):
    with pytest.raises(UserError, match="keeps no timing cache"):
        build(write_sample(tmp_path / "sample.onnx"), tmp_path / "sample.engine", timing_cache=tmp_path / "cache")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="the full tensorrt is installed here")
def test_missing_package_names_the_extra(tmp_path):
    path = write_sample(tmp_path / "sample.onnx")
    with pytest.raises(UserError, match=r"tensorrt is not installed.*pip install 'shadowllm\[tensorrt\]'"):
        engine.build_engine(
            path,
            tmp_path / "sample.engine",
            flavour="tensorrt",
            profiles=profiles_for(describe_onnx(path), capacity=8, max_seqlen=8),
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sample.onnx", "sample.onnx.data"]


CHILD = "from shadowllm.child import end_with_parent as end; end(); print(os.getpid(), flush=True)"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_no_builder_outlives_its_caller():
    child = f"import os, time; {CHILD}; time.sleep(60)"
    caller = f"import subprocess, sys; subprocess.run([sys.executable, '-P', '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.PIPE, text=True) as process:
        builder = psutil.Process(int(process.stdout.readline()))
        process.kill()
    _, alive = psutil.wait_procs([builder], timeout=20)
    assert not alive


def test_polygraphy_reads_the_graph(tmp_path):
    polygraphy = shutil.which("polygraphy", path=Path(sys.executable).parent)
    if polygraphy is None:
        pytest.skip("polygraphy is not installed (pip install 'shadowllm[tensorrt-rtx]')")
    path = write_sample(tmp_path / "sample.onnx")
    told = subprocess.run(
        [polygraphy, "inspect", "model", str(path), "--show", "layers"], capture_output=True, text=True, check=True
    )
    assert told.stdout.count("[Op: SparseMLP]") == 2
