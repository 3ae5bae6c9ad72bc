"""The predictor file: round trip, damaged files, and the check that it belongs to the model."""

from __future__ import annotations

import dataclasses
import errno

import pytest
import torch
from safetensors import SafetensorError

from shadowllm.bundle.predictor_file import Predictor
from shadowllm.config import TrainConfig
from shadowllm.errors import UserError
from shadowllm.predictor.tracefile import Traces, calibrate
from shadowllm.predictor.train import train_network, train_static
from tests.tiny import split, token_windows


@pytest.fixture(scope="module")
def predictors(llama):
    spec, weights = llama
    traces = calibrate(spec, weights, split(token_windows(spec)), "f00d")
    return {"static": train_static(spec, traces), "shadow": train_network(spec, traces, TrainConfig(rank=5, epochs=1))}


@pytest.mark.parametrize("kind", ["static", "shadow"])
def test_round_trip(predictors, kind, tmp_path):
    mine = predictors[kind]
    mine.save(tmp_path / "p.safetensors")
    read = Predictor.load(tmp_path / "p.safetensors")
    assert read.tensors.keys() == mine.tensors.keys()
    assert all(torch.equal(read.tensors[name], mine.tensors[name]) for name in mine.tensors)
    plain = [field.name for field in dataclasses.fields(Predictor) if field.name != "tensors"]
    assert all(getattr(read, name) == getattr(mine, name) for name in plain)
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


@pytest.mark.parametrize("where", [0.0, 0.02, 0.5, 0.999])
def test_a_flipped_byte_is_noticed(predictors, tmp_path, where):
    path = tmp_path / "p.safetensors"
    predictors["shadow"].save(path)
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(UserError):
        Predictor.load(path)


def test_a_truncated_or_missing_file_is_named(predictors, tmp_path):
    path = tmp_path / "p.safetensors"
    predictors["static"].save(path)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged"):
        Predictor.load(path)
    with pytest.raises(UserError, match="no such file"):
        Predictor.load(tmp_path / "absent")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_refused_by_name(predictors, llama, tmp_path, value):
    mine = predictors["static"]
    spoilt = mine.tensors["neurons.scores"].clone()
    spoilt[0, 3] = value
    dataclasses.replace(mine, tensors=mine.tensors | {"neurons.scores": spoilt}).save(tmp_path / "p")
    with pytest.raises(UserError, match=r"tensor neurons\.scores of .* holds NaN or infinity"):
        Predictor.load(tmp_path / "p")
    traces = calibrate(llama[0], llama[1], split(token_windows(llama[0])), "f00d")
    traces.statistics["heads"][0, 0] = value
    traces.save(tmp_path / "t")
    with pytest.raises(UserError, match=r"tensor statistics\.heads of .* holds NaN or infinity"):
        Traces.load(tmp_path / "t")


def test_a_predictor_is_not_a_trace_file(predictors, tmp_path):
    predictors["static"].save(tmp_path / "p")
    with pytest.raises(UserError, match="not a shadowllm-traces file"):
        Traces.load(tmp_path / "p")


def test_an_interrupted_save_leaves_the_old_file(predictors, tmp_path, monkeypatch):
    path = tmp_path / "p"
    predictors["static"].save(path)
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("shadowllm.bundle.predictor_file.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        predictors["shadow"].save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_base_is_checked(predictors, llama):
    spec, _ = llama
    predictors["shadow"].check_base(spec, "f00d")
    with pytest.raises(UserError, match="predictor of another model"):
        predictors["shadow"].check_base(spec, "beef")
    with pytest.raises(UserError, match="predictor of another model"):
        predictors["shadow"].check_base(dataclasses.replace(spec, n_layers=spec.n_layers + 1), "f00d")


def test_tensors_of_other_shapes_are_refused(predictors):
    static = predictors["static"]
    with pytest.raises(UserError, match="do not fit"):
        dataclasses.replace(static, intermediate_size=static.intermediate_size + 1)
    with pytest.raises(UserError, match="do not fit"):
        dataclasses.replace(static, kind="shadow")


def test_saving_nowhere_is_a_users_mistake(predictors, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        predictors["static"].save(tmp_path / "no" / "folder" / "p")


def test_a_full_disk_is_told_as_the_system_tells_it(predictors, tmp_path, monkeypatch):
    def refuse(*args, **keywords):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("shadowllm.bundle.predictor_file.save_file", refuse)
    with pytest.raises(OSError, match="No space left") as caught:
        predictors["static"].save(tmp_path / "p")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
