"""`shadowllm repository`, with the real Triton Inference Server.

The server needs an environment of its own (`make .peers/triton`), because its Python backend needs NumPy 1.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sysconfig
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import shadowllm
from shadowllm.cli import main
from shadowllm.plugins import native_ops

ROOT = Path(__file__).parents[3]
PEER = ROOT / ".peers" / "triton"
PROMPT = "Hello"


@pytest.fixture(scope="module")
def folder(bundle):
    return bundle("llama-blocks", kind="quantized-shadow", rest="shadow")


def test_what_is_written(folder, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "models"
    shutil.copytree(folder, source)
    (source / "engines").mkdir()
    (source / "engines" / "large.engine").write_bytes(b"x")
    assert main(["repository", str(source), str(out), "--model-name", "small", "--slots", "3"]) == 0
    assert f"{out / 'small'}: a model" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["small"]
    assert "slots" in (out / "small" / "config.pbtxt").read_text()
    names = {path.name for path in (out / "small" / "1" / "bundle").iterdir()}
    assert names == {path.name for path in source.iterdir()} - {"engines"}
    (source / "body.onnx").write_bytes(b"x")
    assert main(["repository", str(source), str(tmp_path / "more"), "--model-name", "small"]) == 1
    assert "damaged" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"source", "models"}
    assert len((out / "small" / "1" / "model.py").read_text().splitlines()) < 10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model-name", "a/b"], "cannot be the name of a model"),
        (["--model-name", ".."], "cannot be the name of a model"),
        (["--slots", "0"], "--slots is 0"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(folder, tmp_path, capsys, options, words):
    assert main(["repository", str(folder), str(tmp_path / "models"), *options]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_used(folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["repository", str(folder), str(tmp_path), "--model-name", "small"]) == 1
    assert main(["repository", str(tmp_path), str(tmp_path / "models")]) == 1
    assert capsys.readouterr().err.count("\n") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@contextmanager
def triton(models, work):
    """A running server; yields its address."""
    packages = next(PEER.glob("lib/python3*/site-packages"))
    server, version = packages / "pytriton" / "tritonserver", packages.parent.name.removeprefix("python")
    shutil.copytree(server / "backends", work / "backends")
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, work / "backends" / "python")
    ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    http, grpc, metrics = (str(port.getsockname()[1]) for port in ports)
    for port in ports:
        port.close()
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{packages / 'nvidia_pytriton.libs'}",
        "PYTHONPATH": f"{ROOT}:{packages}",
        "SHADOWLLM_NATIVE_OPS": str(native_ops.library()),
        "PATH": f"{PEER / 'bin'}:{os.environ['PATH']}",
    }
    command = [server / "bin" / "tritonserver", "--model-repository", models, "--backend-directory", work / "backends"]
    command += ["--http-address", "127.0.0.1", "--http-port", http, "--grpc-port", grpc, "--metrics-port", metrics]
    log = (work / "log.txt").open("w")
    with log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as run:
        try:
            url = f"http://127.0.0.1:{http}"
            deadline = time.monotonic() + 120
            while not is_ready(url):
                assert run.poll() is None, (work / "log.txt").read_text()[-5000:]
                assert time.monotonic() < deadline, (work / "log.txt").read_text()[-5000:]
                time.sleep(0.1)
            yield url
        finally:
            run.terminate()
            run.wait(60)


def is_ready(url):
    try:
        with urllib.request.urlopen(f"{url}/v2/models/small/ready", timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def ask(url, streams=False, **parameters):
    """The responses to a request, as JSON."""
    body = {"text_input": PROMPT, "sampling_parameters": json.dumps(parameters | {"stream": streams})}
    path = f"{url}/v2/models/small/generate{'_stream' * streams}"
    with urllib.request.urlopen(urllib.request.Request(path, json.dumps(body).encode()), timeout=120) as answer:
        text = answer.read().decode()
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith(("data: ", "{"))]


@pytest.mark.slow
@pytest.mark.skipif(not PEER.exists(), reason="no Triton Inference Server (make .peers/triton)")
def test_the_real_server_gives_the_texts_of_requests_alone(folder, tmp_path):
    models = tmp_path / "models"
    assert main(["repository", str(folder), str(models), "--model-name", "small", "--threads", "1"]) == 0
    with shadowllm.load(folder, threads=1) as model:
        options = {"temperature": 0.9, "max_new_tokens": 20}
        alone = [shadowllm.generate(model, PROMPT, seed=seed, **options) for seed in range(8)]
    assert len(set(alone)) > 1
    with triton(models, tmp_path) as url:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda seed: ask(url, seed=seed, temperature=0.9, max_tokens=20), range(8)))
        assert [text for ((response),) in found for text in [response["text_output"]]] == alone
        pieces = ask(url, streams=True, seed=3, temperature=0.9, max_tokens=20)
        assert len(pieces) > 1
        assert "".join(piece["text_output"] for piece in pieces) == alone[3]
        assert pieces[-1]["finish_reason"] in ("length", "stop")
        for parameters, words in (
            ({"max_tokens": -1}, "max_tokens"),
            ({"n": 2}, "n is not supported"),
            ({"sparsity": {"neurons": 7.0}}, "the neuron budget 7.0"),
        ):
            with pytest.raises(urllib.error.HTTPError) as raised:
                ask(url, **parameters)
            assert words in raised.value.read().decode()
        assert ask(url, max_tokens=1)[0]["finish_reason"] == "length"
