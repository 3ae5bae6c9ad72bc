"""The command line on a tiny model: all commands, and the errors for wrong use."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

import shadowllm
from shadowllm.bundle.manifest import DATA_FILE
from shadowllm.cli import COMMANDS, main
from tests.conftest import build_transformers_model

QUICK = ["--calibration-tokens", "512", "--calibration-seqlen", "32", "--epochs", "1", "--rank", "16"]


@pytest.fixture
def model(checkpoint):
    return str(checkpoint("llama-gqa"))


@pytest.fixture
def copy(bundle, tmp_path):
    shutil.copytree(bundle(), tmp_path / "copy")
    return tmp_path / "copy"


def fails(capsys, *arguments) -> str:
    """Run a command that must fail: exit code 1, one line on stderr; return that line."""
    capsys.readouterr()  # the output of fixtures
    assert main(list(map(str, arguments))) == 1
    error = capsys.readouterr().err
    assert error.startswith("shadowllm: error: ")
    assert error.count("\n") == 1, error
    return error


class TestMainJob:
    def test_steps_one_by_one(self, model, tmp_path, capsys):
        traces, predictor, out = tmp_path / "traces.safetensors", tmp_path / "predictor.safetensors", tmp_path / "out"
        assert main(["calibrate", model, "-o", str(traces), *QUICK[:4]]) == 0
        assert main(["train", model, "--traces", str(traces), "-o", str(predictor), *QUICK[4:]]) == 0
        assert "held-out tokens" in capsys.readouterr().out
        assert main(["export", model, str(out), "--predictor", str(predictor)]) == 0
        assert "8 outputs within" in capsys.readouterr().out
        assert main(["run", str(out), "--prompt", "Hello", "--max-new-tokens", "4"]) == 0
        assert capsys.readouterr().out.startswith("Hello")
        assert main(["eval", str(out), "--text", __file__, "--tokens", "64", "--seqlen", "32"]) == 0
        assert "oracle" in capsys.readouterr().out

    @pytest.mark.usefixtures("quick_exports")
    def test_export_trains_when_no_predictor_is_given(self, model, tmp_path, capsys):
        assert main(["export", model, str(tmp_path / "out"), "--selector", "shadow", *QUICK]) == 0
        assert "shadow of rank 16, trained on" in capsys.readouterr().out

    @pytest.mark.usefixtures("quick_exports")
    def test_the_seed_decides_everything(self, model, tmp_path):
        options = ["--skip-validation", "--selector", "shadow", *QUICK, "--seed", "5"]
        for name in ("a", "b"):
            assert main(["export", model, str(tmp_path / name), *options]) == 0
        first, second = ((tmp_path / name / DATA_FILE).read_bytes() for name in ("a", "b"))
        assert first == second

    def test_run_json_for_a_batch_on_two_backends(self, copy, capsys):
        assert (
            main(
                [
                    "run",
                    str(copy),
                    "--prompt",
                    "One",
                    "--prompt",
                    "Three",
                    "--json",
                    "--against",
                    "torch",
                    "--max-new-tokens",
                    "5",
                    "--neuron-budget",
                    "1",
                    "--head-budget",
                    "1",
                ]
            )
            == 0
        )
        found = json.loads(capsys.readouterr().out)
        assert [result["backend"] for result in found["results"]] == ["ort", "torch"]
        assert found["results"][0]["tokens"] == found["results"][1]["tokens"]
        assert len(found["results"][0]["texts"]) == 2

    def test_eval_json(self, copy, tmp_path, capsys):
        path = tmp_path / "eval.json"
        assert (
            main(
                [
                    "eval",
                    str(copy),
                    "--text",
                    __file__,
                    "--tokens",
                    "64",
                    "--seqlen",
                    "32",
                    "--json",
                    str(path),
                    "--selector",
                    "static",
                    "oracle",
                    "--neuron-budget",
                    "0.5",
                    "1",
                    "--head-budget",
                    "1",
                ]
            )
            == 0
        )
        found = json.loads(path.read_text())
        whole = [row for row in found["results"] if row["neuron_budget"] == 1]
        assert len(found["results"]) == 4
        assert all(row["perplexity"] == pytest.approx(found["dense"]["perplexity"], rel=1e-5) for row in whole)

    @pytest.mark.parametrize("name", ["", "body.onnx", "predictor.safetensors"])
    def test_inspect_json(self, copy, name, capsys):
        assert main(["inspect", str(copy / name), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        if name == "body.onnx":
            assert found["plugins"] == {f"layer {i}": ["SparseAttention", "SparseMLP"] for i in (1, 2)}

    @pytest.mark.parametrize("name", COMMANDS)
    def test_help_teaches_by_example(self, name, capsys):
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert f"shadowllm {name} " in capsys.readouterr().out.split("examples:")[1]


def test_the_package_runs_as_the_command():
    command = [sys.executable, "-m", "shadowllm", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"shadowllm {shadowllm.__version__}\n")


@pytest.mark.parametrize("arguments", ["families", "inspect nothing", "train --help"])
def test_a_closed_output(arguments):
    command = f"exec {sys.executable} -m shadowllm {arguments} >&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("shadowllm: error: standard output is closed; ")
    assert done.stderr.count("\n") == 1


class TestMistakes:
    @pytest.mark.parametrize(
        "command",
        [["run", "caf\udce9", "--prompt", "x"], ["export", "caf\udce9", "out"], ["export", "model", "caf\udce9"]],
    )
    def test_a_name_that_is_not_utf8(self, capsys, command):
        assert main(command) == 1
        assert "is not UTF-8 here; rename it" in capsys.readouterr().err

    def test_no_such_model(self, tmp_path, capsys):
        assert "no such model" in fails(capsys, "export", tmp_path / "nothing", tmp_path / "out")

    def test_options_of_networks_without_networks(self, model, tmp_path, capsys):
        said = fails(capsys, "export", model, tmp_path / "out", "--selector", "static", "--rank", "8", "--loss", "bce")
        assert "the selector static trains no networks, so loss and rank cannot be used" in said
        predictor = tmp_path / "predictor.safetensors"
        traces = tmp_path / "traces.safetensors"
        assert main(["calibrate", model, "-o", str(traces), *QUICK[:4]]) == 0
        train = ["train", model, "--traces", traces, "-o", predictor, "--selector", "static"]
        assert "so epochs cannot be used" in fails(capsys, *train, "--epochs", "2")
        assert main(list(map(str, train))) == 0
        said = fails(capsys, "export", model, tmp_path / "out", "--predictor", predictor, "--epochs", "2")
        assert "a predictor is given, so epochs cannot be used" in said

    def test_unsupported_family(self, checkpoint, tmp_path, capsys):
        model = tmp_path / "model"
        shutil.copytree(checkpoint("opt"), model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
        assert "'gpt2' is not supported" in fails(capsys, "export", model, tmp_path / "out")

    @pytest.mark.parametrize("budget", ["0", "1.5", "abc", "-1", "nan"])
    @pytest.mark.parametrize("flag", ["--neuron-budget", "--head-budget"])
    def test_budget(self, model, tmp_path, capsys, flag, budget):
        assert f"the budget '{budget}'" in fails(capsys, "export", model, tmp_path / "out", f"{flag}={budget}")

    @pytest.mark.parametrize("target", [["--target-ppl-increase", "2%"], ["--target-speedup", "2"]])
    @pytest.mark.parametrize("budget", [["--neuron-budget", "0.9"], ["--exact"], ["--shortlist", "all"]], ids=str)
    def test_a_budget_beside_a_target(self, model, tmp_path, capsys, budget, target):
        assert "leave out one of them" in fails(capsys, "export", model, tmp_path / "out", *budget, *target)

    def test_a_model_of_one_layer(self, tmp_path, capsys):
        build_transformers_model("llama", {"num_hidden_layers": 1}).save_pretrained(tmp_path / "model")
        assert "the model has one layer" in fails(capsys, "export", tmp_path / "model", tmp_path / "out")

    def test_empty_calibration_text(self, model, tmp_path, capsys):
        (tmp_path / "empty.txt").write_text("")
        error = fails(capsys, "export", model, tmp_path / "out", "--calibration-text", tmp_path / "empty.txt")
        assert "calibration text is empty" in error
        assert not (tmp_path / "out").exists()

    def test_predictor_of_another_model(self, bundle, checkpoint, tmp_path, capsys):
        other = bundle("llama-biases") / "predictor.safetensors"
        assert "predictor of another model" in fails(
            capsys, "export", checkpoint("llama-gqa"), tmp_path / "out", "--predictor", other
        )

    def test_flipped_byte(self, copy, capsys):
        data = bytearray((copy / DATA_FILE).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / DATA_FILE).write_bytes(data)
        assert f"{DATA_FILE} is damaged" in fails(capsys, "run", copy, "--prompt", "x")

    def test_manifest_path_outside(self, copy, capsys):
        text = (copy / "manifest.json").read_text()
        (copy / "manifest.json").write_text(text.replace('"stem.onnx"', '"../stem.onnx"'))
        assert "outside the bundle" in fails(capsys, "run", copy, "--prompt", "x")

    def test_output_exists(self, model, copy, capsys):
        before = (copy / "manifest.json").read_bytes()
        assert "--overwrite" in fails(capsys, "export", model, copy)
        assert (copy / "manifest.json").read_bytes() == before

    def test_engine_without_its_package(self, model, tmp_path, capsys):
        if shutil.which("trtexec") or _installed("tensorrt"):
            pytest.skip("the full TensorRT is installed here")
        error = fails(capsys, "export", model, tmp_path / "out", "--selector", "random", "--engine", "tensorrt")
        assert "tensorrt is not installed" in error
        assert not (tmp_path / "out").exists()

    def test_tasks_without_the_harness(self, copy, capsys):
        if _installed("lm_eval"):
            pytest.skip("lm-evaluation-harness is installed here")
        assert "pip install 'shadowllm[lm-eval]'" in fails(capsys, "eval", copy, "--tasks", "arc_easy")

    @pytest.mark.parametrize(
        ("given", "flag"),
        [
            (["--tasks", "arc_easy", "--aggregate", "sequence"], "--aggregate does nothing with"),
            (["--tasks", "arc_easy", "--head-unit", "kv_group"], "--head-unit does nothing with"),
            (["--tasks", "arc_easy", "--layers"], "--layers does nothing with"),
            (["--tasks", "arc_easy", "--plot", "x.png"], "--plot does nothing with"),
            (["--tasks", "arc_easy", "--text", "x.txt"], "--text does nothing with"),
            (["--tasks", "arc_easy", "--seqlen", "64"], "--seqlen does nothing with"),
            (["--limit", "3"], "--limit does nothing without"),
        ],
    )
    def test_options_that_do_nothing(self, copy, capsys, given, flag):
        assert flag in fails(capsys, "eval", copy, *given)

    def test_packed_weights_have_no_effect_on_budgets(self, copy, capsys):
        refused = fails(capsys, "tune", copy, "--target-ppl-increase", "5%", "--prepack")
        assert "--prepack does nothing without --lossless; leave it out" in refused

    def test_run_without_engines(self, copy, capsys):
        assert "no tensorrt_rtx engines" in fails(capsys, "run", copy, "--prompt", "x", "--backend", "tensorrt_rtx")

    def test_bundle_without_tokenizer(self, checkpoint, tmp_path, capsys):
        model = tmp_path / "model"
        shutil.copytree(checkpoint("opt"), model)
        for path in model.glob("tokenizer*"):
            path.unlink()
        assert main(["export", str(model), str(tmp_path / "out"), "--selector", "random", "--skip-validation"]) == 0
        assert "has no tokenizer" in fails(capsys, "run", tmp_path / "out", "--prompt", "x")

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--prompt", ""],
            ["--prompt", "x", "--max-new-tokens", "0"],
            ["--prompt", "x", "--temperature", "-1"],
            ["--prompt", "x" * 100],
            ["--prompt", "x", "--chat"],
        ],
    )
    def test_run_options(self, copy, capsys, arguments):
        fails(capsys, "run", copy, *arguments)

    def test_mem_pool_size(self, copy, capsys):
        assert "workspace:512M" in fails(capsys, "build", copy, "--engine", "tensorrt_rtx", "--memPoolSize", "lots")

    def test_unknown_option_is_wrong_usage(self, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["run", "--nonsense"])
        assert stop.value.code == 2


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


@pytest.mark.slow
class TestInterrupted:
    """Stop a real process while it writes."""

    def start(self, model, out):
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "shadowllm.cli", "export", model, str(out), "--selector", "random"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            # If the tests run in a shell's background, or with nohup, they inherit that these are ignored.
            preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)],
        )
        deadline = time.monotonic() + 60
        while not list(out.parent.glob(f".{out.name}.partial-*")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline, "no partial folder appeared"
            time.sleep(0.005)
        return process

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    def test_ctrl_c_leaves_nothing(self, model, tmp_path, number):
        process = self.start(model, tmp_path / "out")
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 1
        assert re.fullmatch(r"shadowllm: error: interrupted; .*\n", error.splitlines(keepends=True)[-1])
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_the_exit_code_is_ours_within_an_exec_of_text(self, number, tmp_path):
        """A signal may come while a dataclass is defined; Python remembers a KeyboardInterrupt from there."""
        text = f"import os; os.kill(os.getpid(), {number.value})"
        (tmp_path / "interrupted.py").write_text(f"""
import signal, sys
from shadowllm import cli
from shadowllm.commands import inspect
signal.signal(signal.SIGINT, signal.default_int_handler)
inspect.run = lambda args: exec({text!r})
sys.exit(cli.main(["inspect", "."]))
""")
        command = [sys.executable, "-m", "interrupted"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr == "shadowllm: error: interrupted; nothing was left half-written\n"

    @pytest.mark.usefixtures("quick_exports")
    def test_a_killed_export_can_be_run_again(self, model, tmp_path):
        process = self.start(model, tmp_path / "out")
        process.kill()
        process.communicate(timeout=60)
        assert not (tmp_path / "out").exists()
        assert main(["export", model, str(tmp_path / "out"), "--selector", "random"]) == 0
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
