"""``shadowllm serve`` as a process: it ends with success after a signal, and mistakes are one line."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys

import pytest

from shadowllm.cli import main

openai = pytest.importorskip("openai", reason="the official client is not installed (pip install openai)")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_it_serves_until_a_signal_and_lets_a_stream_finish(bundle, tmp_path, number):
    keys = tmp_path / "keys.txt"
    keys.write_text("# of the tests\nsecret-key\n")
    command = [sys.executable, "-m", "shadowllm.cli", "serve", str(bundle()), "--port", "0", "--slots", "2"]
    command += ["--threads", "1", "--api-keys", str(keys), "--neuron-budget", "0.3", "--model-name", "small"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup ignores it
    )
    try:
        name, _, url = process.stdout.readline().strip().partition(": ")
        assert (name, url.startswith("http://127.0.0.1:")) == ("small", True)
        client = openai.OpenAI(base_url=url + "/v1", api_key="secret-key", max_retries=0, timeout=60)
        (model,) = client.models.list().data
        assert model.shadowllm["budget"]["neurons"] == 0.3
        stream = client.completions.create(model="small", prompt="Hello", max_tokens=50, stream=True)
        chunks = [next(stream)]
        process.send_signal(number)
        chunks += stream
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "secret-key" not in errors
    assert "Hello" not in errors
    assert '"outcome": "' in errors


@pytest.mark.slow
def test_a_crash_leaves_a_stack_in_the_log(bundle):
    command = [sys.executable, "-m", "shadowllm.cli", "serve", str(bundle()), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline()
        process.send_signal(signal.SIGSEGV)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in errors
    assert "engine.py" in errors  # the stack of the engine's thread


@pytest.fixture
def fails(bundle, capsys):
    """A function that returns the one line of an error."""
    folder = str(bundle())  # making it prints progress

    def run(*options):
        capsys.readouterr()
        assert main(["serve", folder, *options]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        return error

    return run


def test_mistakes_are_one_line(fails, tmp_path):
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    assert "has no API key" in fails("--api-keys", str(empty))
    foreign = tmp_path / "foreign"
    foreign.write_text("schl\u00fcssel\n", encoding="utf-8")
    assert "has letters beyond ASCII" in fails("--api-keys", str(foreign))
    assert "the address to listen on is empty" in fails("--host", "")
    assert "the name of the model is empty" in fails("--model-name", "")
    assert "cannot read the API keys" in fails("--api-keys", str(tmp_path / "missing"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen on 127.0.0.1" in fails("--port", str(taken.getsockname()[1]))
    assert "no low-bit copy" in fails("--port", "0", "--shortlist", "4")
    assert "--slots is 0" in fails("--slots", "0")
    assert "grace is 0.0" in fails("--grace", "0")
