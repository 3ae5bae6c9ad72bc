"""The inputs that are written for ``trtexec`` are those of a step that reads nothing out of range."""

from __future__ import annotations

import shlex
import shutil

import numpy as np
import pytest

from shadowllm.benchmarks.trtexec import main
from shadowllm.bundle.manifest import read_manifest
from shadowllm.exporter.engines.graph import describe_onnx
from tests.runtime.gpu.fake_tensorrt import FLAVOUR, write_engines

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("piece", ["stem", "body"])
def test_a_command_and_its_inputs(bundle, tmp_path, capsys, piece):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle("llama-gqa", rest="shadow"), folder)
    write_engines(folder, read_manifest(folder), capacity=48)
    options = ["--engine", FLAVOUR, "--piece", piece, "--position", "47", "--inputs", str(tmp_path / "in")]
    assert main([str(folder), *options]) in (None, 0)
    told = shlex.split(capsys.readouterr().out)
    given = dict(word.removeprefix("--").split("=", 1) for word in told[1:] if "=" in word)
    assert given["useProfile"] == "1"
    shapes = {
        name: [int(n) for n in text.split("x")] for name, text in (s.split(":") for s in given["shapes"].split(","))
    }
    assert shapes["past_key_values.0.key" if piece == "stem" else "past_key_values.1.key"][2] == 48
    graph = describe_onnx(folder / f"{piece}.onnx")
    files = dict(entry.split(":") for entry in given["loadInputs"].split(","))
    integers = {t.name: t for t in graph.inputs if t.dtype.startswith("int")}
    assert set(files) == set(integers)
    for name, path in files.items():
        array = np.fromfile(path, integers[name].dtype)
        shape = shapes.get(name) or integers[name].shape
        assert array.size == np.prod(shape, dtype=int)
        if name == "position_ids":
            assert (array == 47).all()
        if name == "neuron_indices":
            assert (np.sort(array.reshape(shape)) == np.arange(shape[-1])).all()
        if name == "neuron_counts":
            assert (array == 44).all()
    assert "position_ids" in files
