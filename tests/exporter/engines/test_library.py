"""TensorRT-RTX loads the library of C++ plugins and builds engines with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from shadowllm.config import EngineOptions, Export, Source
from shadowllm.errors import UserError
from shadowllm.exporter.engines.inspect_engine import engine_contents
from shadowllm.pipeline import export_model
from shadowllm.plugins.engine_programs import programs_in
from tests.exporter.engines.samples import write_sample, write_selection
from tests.exporter.engines.test_build import build, needs_builder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
LIBRARY = ROOT / "build" / "plugin" / "libshadowllm_tensorrt.so"
needs_library = pytest.mark.skipif(
    not LIBRARY.is_file(), reason="the C++ plugins are not built (`make plugin`, which needs TensorRT's headers)"
)


@needs_library
def test_the_library_is_that_of_these_sources():
    newest = max(path.stat().st_mtime for path in (ROOT / "plugins" / "tensorrt" / "cpp").rglob("*.?pp"))
    assert LIBRARY.stat().st_mtime >= newest, "run `make plugin` again"


@needs_builder
@needs_library
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_engines_of_both_plugins_carry_the_same_programs(tmp_path, dtype):
    onnx_path = write_sample(tmp_path / "sample.onnx", dtype)
    paths = [tmp_path / "python.engine", tmp_path / "cpp.engine"]
    for path, library in zip(paths, (None, LIBRARY), strict=True):
        build(onnx_path, path, sms=(89,), plugin_library=library)
    python, cpp = (path.read_bytes() for path in paths)  # some of the builder's own bytes differ from build to build
    assert list(programs_in(python)) == list(programs_in(cpp))
    assert len(python) == len(cpp)
    assert engine_contents(paths[1]).kernels["select_topk"] == (89,)


@needs_builder
def test_a_library_that_is_not_there_is_told_before_the_work(tmp_path):
    engine = EngineOptions("tensorrt_rtx", plugin_library=str(tmp_path / "none.so"))
    with pytest.raises(UserError, match=r"there is no plugin library .*none\.so; build it with `make plugin`"):
        export_model(Source("a model that is not read"), tmp_path / "out", Export(engines=(engine,)))


@needs_builder
def test_a_library_without_the_plugins_is_refused(tmp_path):
    onnx_path = write_selection(tmp_path / "selection.onnx")
    with pytest.raises(UserError, match=r"there is no plugin library .*none\.so; build it with `make plugin`"):
        build(onnx_path, tmp_path / "x.engine", plugin_library=tmp_path / "none.so")
    (tmp_path / "none.so").write_bytes(b"no library")
    with pytest.raises(UserError, match=r"none\.so does not hold the plugins of this version"):
        build(onnx_path, tmp_path / "x.engine", plugin_library=tmp_path / "none.so")
    assert not (tmp_path / "x.engine").exists()
