"""Numbers on the command line and in the Python API: beyond their limits, the error is one clear line."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict

import numpy as np
import pytest

from shadowllm.cli import main
from shadowllm.config import Calibration, EngineOptions, Target, TrainConfig
from shadowllm.errors import UserError
from shadowllm.eval_config import Generation
from shadowllm.limits import check_seed, check_threads
from shadowllm.runtime.ort.session import OrtSession

COMMANDS = {
    "export": ["export", "model", "out"],
    "calibrate": ["calibrate", "model", "-o", "traces.file"],
    "train": ["train", "model", "--traces", "traces.file", "-o", "predictor.file"],
    "build": ["build", "out", "--engine", "tensorrt_rtx"],
    "eval": ["eval", "out"],
    "tune": ["tune", "out"],
    "bench": ["bench", "out"],
    "drift": ["drift", "out", "--text", "text"],
}
COUNTS = {
    "export": ["--calibration-tokens", "--calibration-seqlen", "--dense-layers", "--rank", "--epochs", "--max-batch"],
    "calibrate": ["--calibration-tokens", "--calibration-seqlen", "--dense-layers"],
    "train": ["--rank", "--epochs"],
    "build": ["--capacity", "--max-seqlen", "--max-batch", "--sm"],
    "eval": ["--tokens", "--seqlen", "--limit"],
    "tune": ["--tokens", "--seqlen", "--threads"],
    "bench": ["--prompt-len", "--new-tokens", "--iterations", "--threads"],
    "drift": ["--tokens", "--seqlen"],
}


def refused(capsys, command, option, value):
    assert main([*COMMANDS[command], option, value]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"shadowllm: error: {option} is ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "many", str(2**70)])
@pytest.mark.parametrize(("command", "option"), [(name, option) for name, many in COUNTS.items() for option in many])
def test_counts(capsys, command, option, value):
    refused(capsys, command, option, value)


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [("train", "--rank", "65537"), *(("bench", "--percentile", value) for value in ("101", "-1", "nan", "abc"))],
)
def test_limits_of_their_own(capsys, command, option, value):
    refused(capsys, command, option, value)


@pytest.mark.parametrize("value", ["-1", str(2**63), "soon"])
@pytest.mark.parametrize("command", ["export", "calibrate", "train"])
def test_seeds(capsys, command, value):
    refused(capsys, command, "--seed", value)


@pytest.mark.parametrize("value", [-1, 2**63, 1.5, True])
def test_seeds_in_python(value):
    for take in (check_seed, lambda seed: Calibration(seed=seed), lambda seed: TrainConfig(seed=seed)):
        with pytest.raises(UserError, match="the seed is"):
            take(value)


def test_the_largest_seed_is_taken():
    assert Calibration(seed=2**63 - 1).seed == TrainConfig(seed=2**63 - 1).seed


@pytest.mark.parametrize("value", [0, -1, 100_000])
def test_threads_in_python(bundle, value):
    with pytest.raises(UserError, match="the number of threads is"):
        check_threads(value)
    with pytest.raises(UserError, match="the number of threads is"):
        OrtSession(bundle(), threads=value)


@pytest.mark.parametrize("name", ["tokens", "seqlen", "dense_layers"])
def test_calibration_in_python(name):
    with pytest.raises(UserError, match="is 0"):
        Calibration(**{name: 0})


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_targets_in_python(value):
    for name in ("ppl_increase", "speedup"):
        with pytest.raises(UserError, match=f"{value!r} is no finite number above"):
            Target(**{name: value})


@pytest.mark.parametrize("value", ["2%", True, [0.5]])
@pytest.mark.parametrize("make", [lambda value: Target(speedup=value), lambda value: TrainConfig(learning_rate=value)])
def test_what_is_no_number(make, value):
    with pytest.raises(UserError, match=re.escape(f"is {value!r}; give a number")):
        make(value)


def test_numbers_of_numpy_become_those_that_json_has():
    half = np.float32(0.5)
    for config in (Target(ppl_increase=half), TrainConfig(learning_rate=half)):
        assert "0.5" in json.dumps(asdict(config))


@pytest.mark.parametrize("given", [{"prompt_tokens": "x"}, {"prompt_tokens": 0}, {"seed": -1}, {"seed": None}])
def test_comparisons_of_decoded_text_in_python(given):
    with pytest.raises(UserError, match=f"is {next(iter(given.values()))!r}; give a whole number"):
        Generation(**given)


def test_flavours_in_python():
    with pytest.raises(UserError, match="flavour 'rtx' is not supported; use one of tensorrt_rtx, tensorrt"):
        EngineOptions("rtx")


@pytest.mark.parametrize("name", ["capacity", "max_seqlen", "max_batch"])
def test_engines_in_python(name):
    with pytest.raises(UserError, match=f"{name} is 0"):
        EngineOptions("tensorrt_rtx", **{name: 0})


def test_the_longest_prompt_fits_into_the_cache(capsys):
    assert main([*COMMANDS["build"], "--max-seqlen", "100", "--capacity", "20"]) == 1
    assert "prompts of 100 tokens do not fit into a cache of 20; raise the capacity" in capsys.readouterr().err
    options = [EngineOptions("tensorrt_rtx", capacity=capacity) for capacity in (20, 1024)]
    assert [one.longest_prompt for one in options] == [20, 512]


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_a_figure_is_a_png(capsys, tmp_path, command):
    assert main([command, "out", "--plot", str(tmp_path / "x.txt")]) == 1
    assert "x.txt would be a PNG file; give it a name that ends with .png" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["eval", "out", "--json"],
        ["eval", "out", "--plot"],
        ["bench", "out", "--json"],
        ["bench", "out", "--plot"],
        ["calibrate", "model", "-o"],
        ["train", "model", "--traces", "traces", "-o"],
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-1]}",
)
def test_a_file_that_cannot_be_written_is_told_before_the_work(capsys, tmp_path, arguments):
    for place, words in ((tmp_path, "is a folder"), (tmp_path / "no" / "file", "there is no folder")):
        assert main([*arguments, str(place)]) == 1
        assert words in capsys.readouterr().err
