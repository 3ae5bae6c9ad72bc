"""`optimum-cli export shadowllm` is `shadowllm export`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shadowllm.bundle.manifest import DATA_FILE
from shadowllm.cli import COMMANDS, main

pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")


def optimum_cli(*arguments) -> subprocess.CompletedProcess[str]:
    """Run optimum-cli in a process of its own."""
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_help_lists_the_command():
    done = optimum_cli("export", "--help")
    assert done.returncode == 0, done.stderr
    assert COMMANDS["export"] in " ".join(done.stdout.split())


def test_help_of_the_command_shows_our_options():
    assert "--neuron-budget FRACTION" in optimum_cli("export", "shadowllm", "--help").stdout


@pytest.mark.parametrize(
    "arguments",
    [["nothing", "out"], ["--neuron-budget", "7", "nothing", "out"]],
    ids=["model", "budget"],
)
def test_a_mistake_is_told_as_by_our_command_line(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = optimum_cli("export", "shadowllm", *arguments)
    assert done.returncode == main(["export", *arguments]) == 1
    assert done.stderr == capsys.readouterr().err
    assert done.stderr.startswith("shadowllm: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("given", [["--model", "nothing", "out"], ["out", "--model=nothing"], ["-m", "nothing", "out"]])
def test_the_model_is_named_as_in_other_exports(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = optimum_cli("export", "shadowllm", *given)
    assert done.returncode == main(["export", "nothing", "out"]) == 1
    assert done.stderr == capsys.readouterr().err


def test_wrong_usage_has_its_exit_code():
    assert optimum_cli("export", "shadowllm", "--nonsense").returncode == 2


@pytest.mark.slow
def test_the_bundle_is_that_of_our_command_line(checkpoint, tmp_path):
    options = ["--selector", "random", "--skip-validation", "--neuron-budget", "0.5", "--seed", "5"]
    model = str(checkpoint("llama-gqa"))
    done = optimum_cli("export", "shadowllm", model, tmp_path / "theirs", *options)
    assert done.returncode == 0, done.stderr
    assert main(["export", model, str(tmp_path / "ours"), *options]) == 0
    ours, theirs = (sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("ours", "theirs"))
    assert ours == theirs
    for name in (DATA_FILE, "manifest.json"):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
