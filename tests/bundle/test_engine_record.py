"""The engine record: an error names each thing that does not fit, before an engine is deserialised."""

from __future__ import annotations

import hashlib
import json

import pytest

from shadowllm.bundle.engine_record import (
    CustomNode,
    EngineRecord,
    ShapeProfile,
    check_sidecar,
    read_sidecar,
    write_sidecar,
)
from shadowllm.errors import UserError
from shadowllm.exporter.engines.inspect_engine import engine_contents
from shadowllm.plugins.kernel_program_bytes import pack
from tests.plugins.kernel_programs import program

ENGINE = b"engine: SparseMLP layers.1.SparseMLP " * 7 + pack(program(sms=(0, 80, 89))) + b"the rest"
FILES = {"body.onnx": "ab" * 32, "model.onnx.data": "cd" * 32}
HERE = {"flavour": "tensorrt_rtx", "version": "1.7.1.116", "compute_capability": 89, "files": FILES}


@pytest.fixture
def engine_path(tmp_path):
    """A file that is no engine, with a record that fits it."""
    path = tmp_path / "body.engine"
    path.write_bytes(ENGINE)
    write_sidecar(
        path,
        EngineRecord(
            flavour="tensorrt_rtx",
            version="1.7.1.116",
            compute_capabilities=(80, 89),
            plugin_version=1,
            plugins=(CustomNode("SparseMLP", "layers.1.SparseMLP", 1),),
            kernels={"first": (0, 80, 89), "second": (0, 80, 89)},
            profiles=(ShapeProfile("decode", {"x": ((1, 1), (1, 1), (2, 1))}),),
            files=FILES,
            engine_sha256=hashlib.sha256(ENGINE).hexdigest(),
            engine_bytes=len(ENGINE),
            build_seconds=1.5,
        ),
    )
    return path


def edit(engine_path, **changes):
    path = engine_path.with_name("body.engine.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_round_trip_and_fit(engine_path):
    record = check_sidecar(engine_path, **HERE)
    assert record == read_sidecar(engine_path) == engine_contents(engine_path)
    assert record.profiles[0].shapes["x"] == ((1, 1), (1, 1), (2, 1))
    assert sorted(p.name for p in engine_path.parent.iterdir()) == ["body.engine", "body.engine.json"]


def test_files_of_other_pieces_do_not_matter(engine_path):
    check_sidecar(engine_path, **HERE | {"files": FILES | {"stem.onnx": "ef" * 32}})
    check_sidecar(engine_path, **HERE | {"files": None, "compute_capability": None})


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ({"flavour": "tensorrt"}, "flavour tensorrt_rtx, here it is tensorrt; build the engine again"),
        ({"version": "1.8.0.1"}, "tensorrt_rtx version 1.7.1.116, here it is 1.8.0.1; .*`shadowllm build`"),
        ({"compute_capability": 120}, "built for sm_80, sm_89, this GPU is sm_120; `shadowllm build --sm 120`"),
        ({"files": FILES | {"model.onnx.data": "00" * 32}}, "another model.onnx.data"),
        ({"files": {"model.onnx.data": "cd" * 32}}, "another body.onnx"),
    ],
)
def test_another_place_is_refused(engine_path, here, words):
    with pytest.raises(UserError, match=words):
        check_sidecar(engine_path, **HERE | here)


def test_another_plugin_version_is_refused(engine_path):
    edit(engine_path, plugin_version=2)
    with pytest.raises(UserError, match="plugin version 2, here it is 1"):
        check_sidecar(engine_path, **HERE)


def test_kernels_that_do_not_serve_the_gpu_are_refused(engine_path):
    edit(engine_path, kernels={"first": [86, 90]})
    with pytest.raises(
        UserError,
        match=r"carries first for sm_86, sm_90, which does not run on this GPU, sm_80; .*--sm 80",
    ):
        check_sidecar(engine_path, **HERE | {"compute_capability": 80})
    assert check_sidecar(engine_path, **HERE).kernels == {"first": (86, 90)}  # 8.6 serves 8.9


@pytest.mark.parametrize("damage", [ENGINE[:-1], ENGINE + b"x", b"", ENGINE[:40] + b"X" + ENGINE[41:]])
def test_damaged_engine_is_refused(engine_path, damage):
    engine_path.write_bytes(damage)
    with pytest.raises(UserError, match=r"body\.engine is damaged"):
        check_sidecar(engine_path, **HERE)


@pytest.mark.parametrize("name", ["body.engine", "body.engine.json"])
def test_a_missing_file_is_named(engine_path, name):
    engine_path.with_name(name).unlink()
    with pytest.raises(UserError, match=rf"no file .*{name}; .*`shadowllm build`"):
        check_sidecar(engine_path, **HERE)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "flavour": "tensorrt"}'])
def test_an_unreadable_sidecar_is_refused(engine_path, text):
    engine_path.with_name("body.engine.json").write_text(text)
    with pytest.raises(UserError, match=r"body.engine.json is not readable"):
        check_sidecar(engine_path, **HERE)


def test_an_unknown_field_is_refused(engine_path):
    edit(engine_path, surprise=1)
    with pytest.raises(UserError, match="surprise"):
        read_sidecar(engine_path)


@pytest.mark.parametrize("contents", [b"", b"SparseMLP alone, without its layer"])
def test_contents_are_held_against_the_engine(engine_path, contents):
    engine_path.write_bytes(contents)
    with pytest.raises(UserError, match=r"does not hold .*SparseMLP, which its record lists"):
        engine_contents(engine_path)


@pytest.mark.parametrize(
    ("kernels", "words"),
    [
        ({"first": [0, 80, 89, 120]}, "the kernel first for PTX, sm_80, sm_89, sm_120"),
        ({"third": [80]}, "the kernel third for sm_80"),
    ],
)
def test_kernels_are_held_against_the_engine(engine_path, kernels, words):
    edit(engine_path, kernels=kernels)
    with pytest.raises(UserError, match=f"body.engine does not hold {words}, which its record lists"):
        engine_contents(engine_path)


def test_a_damaged_program_in_an_engine_is_named(engine_path):
    engine_path.write_bytes(ENGINE[:-200])
    with pytest.raises(UserError, match=r"does not hold whole programs \(the program is damaged\)"):
        engine_contents(engine_path)
