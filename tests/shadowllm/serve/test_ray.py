"""A real Ray cluster on this machine: two replicas, of which one is killed under load."""

from __future__ import annotations

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

import shadowllm

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install '.[ray]')")
openai = pytest.importorskip("openai", reason="the official client is not installed (pip install openai)")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of Ray's own code
PROMPT = "Hello"


@pytest.fixture(scope="module")
def folder(bundle):
    return bundle("llama-blocks", kind="quantized-shadow", rest="shadow")


@pytest.fixture(scope="module")
def url(folder):
    from ray import serve

    from shadowllm.serve.ray import Arguments, app

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {"bundle": folder, "replicas": 2, "model_name": "tiny", "threads": 1, "slots": 4}
    serve.run(app(Arguments(**arguments)), route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def replicas():
    """The processes of the replicas."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.name().startswith("ray::ServeRepl")]


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def test_texts_are_those_alone(url, folder):
    client = client_of(url)
    assert [model.id for model in client.models.list().data] == ["tiny"]
    assert len(replicas()) == 2
    with shadowllm.load(folder, threads=1) as model:
        for seed in range(8):
            options = {"temperature": 0.9, "seed": seed}
            alone = shadowllm.generate(model, PROMPT, 20, **options)
            options |= {"model": "tiny", "prompt": PROMPT, "max_tokens": 20}
            assert client.completions.create(**options).choices[0].text == alone
            pieces = [chunk.choices[0].text for chunk in client.completions.create(stream=True, **options)]
            assert len(pieces) > 1
            assert "".join(pieces) == alone
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=-1)


def test_a_killed_replica_is_replaced_and_no_request_hangs(url):
    """Requests of the killed replica end with an error, the others with their text, and new ones are answered."""
    before, client = {replica.pid for replica in replicas()}, client_of(url)

    def one(seed):
        try:
            options = {"temperature": 5.0, "seed": seed, "max_tokens": 60, "stream": True}
            stream = client.completions.create(model="tiny", prompt=PROMPT, **options)
            reasons = [chunk.choices[0].finish_reason for chunk in stream]
        except Exception as error:  # noqa: BLE001  (a cut connection has no type that is documented)
            return type(error).__name__
        return reasons[-1] if reasons and reasons[-1] else "cut off"

    def many(first):
        return [one(seed) for seed in range(first, first + 40)]

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(many, 100 * thread) for thread in range(8)]
        time.sleep(0.5)
        os.kill(min(before), signal.SIGKILL)
        outcomes = [outcome for future in running for outcome in future.result(timeout=240)]
    assert len(outcomes) == 320
    good = [outcome for outcome in outcomes if outcome in ("length", "stop")]
    assert len(good) > 160, outcomes
    deadline = time.monotonic() + 120
    while len(replicas()) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    after = {replica.pid for replica in replicas()}
    assert len(after) == 2
    assert len(after & before) == 1
    assert one(1) in ("length", "stop")
