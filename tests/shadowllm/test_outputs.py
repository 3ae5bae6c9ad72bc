"""A command never replaces what it reads."""

from __future__ import annotations

import argparse
import json

import pytest

from shadowllm.benchmarks.random_model import shape_spec
from shadowllm.commands.outputs import check_outputs
from shadowllm.errors import UserError
from tests.bundles import make_predictor


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "bundle").mkdir()
    for name in ("manifest.json", "model.onnx.data", "old.png"):
        (tmp_path / "bundle" / name).write_text("{}")
    (tmp_path / "bundle" / "report.json").write_text(json.dumps({"environment": {}}))
    make_predictor(shape_spec("tiny-llama"), "f00d").save(tmp_path / "bundle" / "predictor.safetensors")
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "link.json").symlink_to(tmp_path / "bundle" / "manifest.json")
    return tmp_path


def arguments(folder, **outputs):
    return argparse.Namespace(
        bundle=folder / "bundle",
        text=[str(folder / "text.txt"), "no such file", "a\0b", 300 * "x"],
        threads=2,
        **outputs,
    )


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("text.txt", "is read by this command; name another file"),
        ("bundle/manifest.json", "is a file of .*bundle, which this command reads"),
        ("bundle/model.onnx.data", "is a file of"),
        ("bundle/../bundle/manifest.json", "is a file of"),
        ("link.json", "is a file of"),
    ],
)
@pytest.mark.parametrize("option", ["output", "json", "plot"])
def test_inputs_are_not_replaced(folder, option, output, words):
    with pytest.raises(UserError, match=words):
        check_outputs(arguments(folder, **{option: folder / output}))


def test_one_file_for_two_outputs_is_refused(folder):
    with pytest.raises(UserError, match="is named for two outputs"):
        check_outputs(arguments(folder, json=folder / "new", plot=folder / "bundle" / ".." / "new"))


def test_new_files_and_those_of_the_same_kind_are_written(folder):
    same = {"json": "report.json", "plot": "old.png", "output": "predictor.safetensors"}
    for option, name in same.items():
        for output in ("new", "bundle/new", f"bundle/{name}"):
            check_outputs(arguments(folder, **{option: folder / output}))
        for other in same.keys() - {option}:
            with pytest.raises(UserError, match="is a file of"):
                check_outputs(arguments(folder, **{other: folder / "bundle" / name}))
    (folder / "other.json").write_text("{}")
    check_outputs(arguments(folder, json=folder / "other.json"))
    check_outputs(arguments(folder, json=True))
