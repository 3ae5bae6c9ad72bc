"""`shadowllm repository`, with the real Triton Inference Server.

The server needs an environment of its own (`make .peers/triton`), because its Python backend needs NumPy 1.
"""

from __future__ import annotations

import http.client
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
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import shadowllm
from shadowllm.cli import main
from shadowllm.plugins import native_ops

ROOT = Path(__file__).parents[3]
PEER = ROOT / ".peers" / "triton"
PROMPT = "Hello"
TEXTS, TOKENS = 16, 1000  # of clients that go away
CANCELLED = "shadowllm_texts_total" + "cancelled"
needs_server = pytest.mark.skipif(not PEER.exists(), reason="no Triton Inference Server (make .peers/triton)")


@pytest.fixture
def folder(long_texts):
    return long_texts


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
        (["--model-name", ""], "cannot be the name of a model"),
        (["--model-name", ".."], "cannot be the name of a model"),
        (["--slots", "0"], "--slots is 0"),
        (["--backend", "torch", "--prepack"], "the backend 'torch' does not pack weights; leave prepack out"),
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
    errors = capsys.readouterr().err
    assert errors.count("\n") == 2
    assert "--overwrite" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_repository_is_not_written_into_its_bundle(folder, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    assert main(["repository", str(source), str(source / "models")]) == 1
    assert "lies inside the bundle; name a folder beside it" in capsys.readouterr().err
    assert not (source / "models").exists()


@dataclass
class Addresses:
    """Of a running server."""

    url: str
    grpc: str
    metrics: str


@pytest.fixture(scope="module")
def server(long_texts, tmp_path_factory):
    work = tmp_path_factory.mktemp("triton")
    arguments = ["repository", str(long_texts), str(work / "models"), "--model-name", "small", "--threads", "1"]
    assert main(arguments) == 0
    with triton(work / "models", work) as addresses:
        yield addresses


@contextmanager
def triton(models, work):
    """A running server; yields its addresses."""
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
    command += ["--http-address", "127.0.0.1", "--http-port", http, "--metrics-port", metrics]
    command += ["--grpc-address", "127.0.0.1", "--grpc-port", grpc]
    log = (work / "log.txt").open("w")
    with log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as run:
        try:
            url = f"http://127.0.0.1:{http}"
            deadline = time.monotonic() + 120
            while not is_ready(url):
                assert run.poll() is None, (work / "log.txt").read_text()[-5000:]
                assert time.monotonic() < deadline, (work / "log.txt").read_text()[-5000:]
                time.sleep(0.1)
            yield Addresses(url, f"127.0.0.1:{grpc}", f"http://127.0.0.1:{metrics}/metrics")
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
@needs_server
def test_the_real_server_gives_the_texts_of_requests_alone(server, long_texts):
    url = server.url
    with shadowllm.load(long_texts, threads=1) as model:
        options = {"temperature": 0.9, "max_new_tokens": 20}
        alone = [shadowllm.generate(model, PROMPT, seed=seed, **options) for seed in range(8)]
    assert len(set(alone)) > 1
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda seed: ask(url, seed=seed, temperature=0.9, max_tokens=20), range(8)))
    assert [text for ((response),) in found for text in [response["text_output"]]] == alone
    pieces = ask(url, streams=True, seed=3, temperature=0.9, max_tokens=20)
    assert len(pieces) > 1
    assert "".join(piece["text_output"] for piece in pieces) == alone[3]
    assert pieces[-1]["finish_reason"] == "length"
    for parameters, words in (
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 2}, "n is not supported"),
        ({"sparsity": {"neurons": 7.0}}, "the neuron budget 7.0"),
    ):
        with pytest.raises(urllib.error.HTTPError) as raised:
            ask(url, **parameters)
        assert words in raised.value.read().decode()
    assert ask(url, max_tokens=1)[0]["finish_reason"] == "length"


def metrics_of(server):
    """The values of all metrics that the server shows, by name and outcome."""
    with urllib.request.urlopen(server.metrics, timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples]
    return {sample.name + sample.labels.get("outcome", ""): sample.value for sample in samples}


def settled(server, cancelled):
    """The metrics when no text runs or waits, and more than this number were cancelled."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = metrics_of(server)
        if found[CANCELLED] > cancelled and found["shadowllm_slots_taken"] == found["shadowllm_queue_length"] == 0:
            return found
        time.sleep(0.1)
    raise AssertionError(found)


def leave_http(server):
    """Close the connections of streams after their first pieces."""
    body = json.dumps({"text_input": PROMPT, "sampling_parameters": json.dumps({"max_tokens": TOKENS, "stream": True})})
    with ExitStack() as stack:
        connections = [stack.enter_context(closing(http.client.HTTPConnection(server.url[7:]))) for _ in range(TEXTS)]
        for connection in connections:
            connection.request("POST", "/v2/models/small/generate_stream", body)
        assert connections[0].getresponse().readline().startswith(b"data: ")


def leave_grpc(server):
    """Cancel requests after the first pieces. Half of them are streams."""
    client = Path(__file__).with_name("triton_client.py")
    subprocess.run([PEER / "bin" / "python", client, server.grpc, str(TEXTS), str(TOKENS)], check=True, timeout=120)


@pytest.mark.slow
@needs_server
@pytest.mark.parametrize("leave", [leave_http, leave_grpc])
def test_a_client_that_goes_away_frees_its_slot(server, leave):
    """The texts of all slots and of the queue are cancelled long before their last token, and the next is computed."""
    before = metrics_of(server)
    leave(server)
    assert ask(server.url, max_tokens=5)[0]["finish_reason"] == "length"
    after = settled(server, before[CANCELLED])
    grown = {name: after[name] - value for name, value in before.items()}
    assert TEXTS / 2 < grown[CANCELLED] <= TEXTS
    assert 0 < grown["shadowllm_new_tokens_total"] < TEXTS * TOKENS / 2
    assert grown["shadowllm_read_bytes_total"] > 0
