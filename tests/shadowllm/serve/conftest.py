"""A real server on loopback, for a tiny model or another bundle."""

from __future__ import annotations

import json
import logging
import threading
import time
import urllib.request
from contextlib import contextmanager

import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.runtime.serving.engine import Engine
from shadowllm.runtime.torch_slots import TorchSlots
from shadowllm.serve_config import EngineConfig, ServeConfig
from tests.bundles import make_bundle
from tests.conftest import VARIANTS, build_tokenizer, build_transformers_model

TEMPLATE = "{% for message in messages %}{{ message.role[0] }}: {{ message.content }} {% endfor %}a:"


class Running:
    """A server in a thread of this process.

    Attributes:
        planner: plans its requests.
        url: its address.
        lines: the records of its log.
    """

    def __init__(self, engine, session, model, planner, places, url, lines):
        self.engine, self.session, self.model, self.planner = engine, session, model, planner
        self.places, self.url, self.lines = places, url, lines

    def get(self, path, **headers):
        """Status, headers and text of a GET."""
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
            return answer.status, answer.headers, answer.read().decode()

    def client(self, key="none"):
        """The official client, without retries."""
        import openai

        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, timeout=60)

    def is_idle(self):
        """Whether all slots and places in the queue become free."""
        deadline = time.monotonic() + 10
        while self.engine._places._value < self.places and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self.session._lengths and not self.engine.running and not self.engine.waiting


class Records(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


@contextmanager
def running(
    folder, session=None, keys=None, queue=8, name="tiny", prefill_chunk=16, backend="torch", positions=None, **config
):
    """A running server; without the arguments, of reference slots."""
    from shadowllm.serve.app import make_app
    from shadowllm.serve.keys import ApiKeys
    from shadowllm.serve.log import logger
    from shadowllm.serve.model import ServedModel
    from shadowllm.serve.transport import listen, make_server

    settings, manifest = ServeConfig(port=0, model_name=name, **config), read_manifest(folder)
    session, records = session or TorchSlots(folder, 3), Records()
    logger.setLevel(logging.INFO)
    logger.addHandler(records)
    limits = EngineConfig(slots=session.slots, queue=queue, prefill_chunk=prefill_chunk, cache_positions=positions)
    with listen(settings) as listener, Engine(session, limits) as engine:
        model = ServedModel.of(folder, backend, manifest, engine, settings)
        model.tokenizer.chat_template = model.tokenizer.chat_template or TEMPLATE
        app = make_app(model, ApiKeys(keys), session.slots)
        server = make_server(app, settings, lambda: engine.drain(settings.grace))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        found = Running(engine, session, model, app.state.planner, session.slots + queue, url, records.lines)
        try:
            yield found
        finally:
            server.handle_exit(15, None)
            thread.join(30)
            logger.removeHandler(records)
    assert not thread.is_alive()


@pytest.fixture(scope="session")
def long_texts(tmp_path_factory):
    """The folder of a bundle without a stop token: a text has as many tokens as its request says, up to 1000."""
    family, options = VARIANTS["llama-blocks"]
    checkpoint, folder = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("long-texts")
    options = options | {"max_position_embeddings": 1024, "eos_token_id": None}
    build_transformers_model(family, options).save_pretrained(checkpoint)
    build_tokenizer().save_pretrained(checkpoint)
    make_bundle(checkpoint, folder, kind="quantized-shadow", rest="shadow")
    return folder


@pytest.fixture(scope="module")
def server(bundle):
    pytest.importorskip("fastapi", reason="the server needs packages (pip install '.[serve]')")
    with running(bundle()) as found:
        yield found


def record_of(server, path):
    """The last record of the log for a path."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in reversed(server.lines):
            record = json.loads(line)
            if record["path"] == path:
                return record
        time.sleep(0.01)
    raise AssertionError(server.lines)


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
