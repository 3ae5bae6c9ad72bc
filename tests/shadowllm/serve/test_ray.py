"""A real Ray cluster on this machine: the load decides between one and two replicas, and one is killed under load."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest

import shadowllm
from shadowllm.errors import UserError

ray = pytest.importorskip("ray", reason="Ray is not installed (pip install '.[ray]')")
openai = pytest.importorskip("openai", reason="the official client is not installed (pip install openai)")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of Ray's own code
PROMPT = "Hello"
CLIENTS = 12
# Ray's own values are times of half a minute to ten minutes.
SOON = {"upscale_delay_s": 0.5, "downscale_delay_s": 3.0, "look_back_period_s": 2.0, "metrics_interval_s": 0.5}


@pytest.fixture(scope="module")
def url(long_texts):
    from ray import serve

    from shadowllm.serve.ray import Arguments, app

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    scaling = {"replicas": 1, "most_replicas": 2, "autoscaling": SOON}
    serve.run(app(Arguments(bundle=long_texts, model_name="tiny", threads=1, slots=4, **scaling)), route_prefix="/")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def replicas():
    """The processes of the replicas."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if child.name().startswith("ray::ServeRepl")}


def wait_for(count):
    """Wait until this number of replicas answers, and no other process of a replica is left."""
    from ray import serve

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        states = serve.status().applications["default"].deployments["shadowllm"].replica_states
        if states == {"RUNNING": count} and len(replicas()) == count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{count} replicas are expected, found {dict(states)}, {len(replicas())} processes")


def client_of(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


@contextmanager
def load(one):
    """Clients that send requests all the time; yields the list of what ``one(seed)`` returned for each."""
    outcomes, ended = [], threading.Event()

    def many(first):
        for seed in itertools.count(first):
            outcomes.append(one(seed))
            if ended.is_set():
                return

    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(many, 1000 * client) for client in range(CLIENTS)]
        try:
            yield outcomes
        finally:
            ended.set()
    for client in running:
        client.result()


def test_texts_are_those_alone(url, long_texts):
    client = client_of(url)
    assert [model.id for model in client.models.list().data] == ["tiny"]
    with shadowllm.load(long_texts, threads=1) as model:
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


def test_replicas_follow_the_load(url, long_texts):
    """A second replica is added while there are more requests than slots, and every request has its right text."""
    options = {"temperature": 0.9}
    with shadowllm.load(long_texts, threads=1) as model:
        alone = [shadowllm.generate(model, PROMPT, 200, seed=seed, **options) for seed in range(4)]
    assert len(set(alone)) == 4
    client = client_of(url)
    options |= {"model": "tiny", "prompt": PROMPT, "max_tokens": 200}

    def one(seed):
        return client.completions.create(seed=seed % 4, **options).choices[0].text == alone[seed % 4]

    wait_for(1)
    with load(one) as outcomes:
        wait_for(2)
        first = len(outcomes)
    assert len(outcomes) >= first + CLIENTS  # also after the second one was added
    assert all(outcomes)
    wait_for(1)
    assert one(0)


def test_a_killed_replica_is_replaced_and_no_request_hangs(url):
    """Requests of the killed replica end with an error, the others with their text, and new ones are answered."""
    client = client_of(url)

    def one(seed):
        try:
            options = {"temperature": 5.0, "seed": seed, "max_tokens": 60, "stream": True}
            stream = client.completions.create(model="tiny", prompt=PROMPT, **options)
            reasons = [chunk.choices[0].finish_reason for chunk in stream]
        except Exception as error:  # noqa: BLE001  (a cut connection has no type that is documented)
            return type(error).__name__
        return reasons[-1] if reasons and reasons[-1] else "cut off"

    with load(one) as outcomes:
        wait_for(2)
        before = replicas()
        killed = psutil.Process(min(before))
        killed.kill()
        killed.wait(30)
        wait_for(2)
        after = replicas()
    assert len(after & before) == 1
    good = outcomes.count("length")
    assert good > len(outcomes) / 2, outcomes
    assert one(1) == "length"


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"autoscaling": SOON}, "without most_replicas"),
        ({"most_replicas": 2, "autoscaling": {"upscale_delay": 1.0}}, "no 'upscale_delay'"),
        ({"most_replicas": 2, "autoscaling": {"upscale_delay_s": -1.0}}, "upscale_delay_s Input should be"),
        ({"replicas": 3, "most_replicas": 2}, "must be greater"),
        ({"replicas": 0}, "replicas is 0"),
        ({"replicas": -1, "most_replicas": 2}, "replicas is -1"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_scaling_that_ray_cannot_do(scaling, words):
    from shadowllm.serve.ray import Arguments, app

    with pytest.raises(UserError, match=words):
        app(Arguments(bundle="out", **scaling))


def test_paths_do_not_depend_on_the_working_directory(monkeypatch, tmp_path):
    from shadowllm.serve import ray as module

    plans = []
    monkeypatch.setattr(module, "application", lambda plan, *scaling: plans.append(plan))
    monkeypatch.chdir(tmp_path)
    module.app(module.Arguments(bundle="out", api_keys="keys.txt"))
    assert plans[0].bundle == tmp_path / "out"
    assert plans[0].server.api_keys == tmp_path / "keys.txt"
