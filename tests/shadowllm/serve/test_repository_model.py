"""The model for Triton Inference Server, with a stand-in for the module that only that server has."""

from __future__ import annotations

import importlib
import json
import queue
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the server needs packages (pip install '.[serve]')")
pytestmark = pytest.mark.usefixtures("one_thread")
MODULE = "shadowllm.serve.repository_model"
NAME = "small"
OPTIONS = {"backend": "torch", "threads": None, "prepack": False, "slots": 2, "queue": 4}


@dataclass
class Input:
    """A tensor with one value."""

    name: str
    value: bytes

    def as_numpy(self):
        return np.array([self.value], dtype=np.object_)


class StandIn(ModuleType):
    """The parts of ``triton_python_backend_utils`` that the model uses."""

    TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
    TritonError = str

    @staticmethod
    def get_input_tensor_by_name(request, name):
        return next((given for given in request.inputs if given.name == name), None)

    @staticmethod
    def Tensor(name, values):  # noqa: N802
        return name, values[0].decode()

    @staticmethod
    def InferenceResponse(tensors=(), error=None):  # noqa: N802
        return SimpleNamespace(**dict(tensors), error=error)


@pytest.fixture
def ask(bundle, tmp_path, monkeypatch):
    """A function that returns the response to a request."""
    utils = StandIn("triton_python_backend_utils")
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    repository_model = importlib.import_module(MODULE)
    monkeypatch.setattr(repository_model, "Publisher", lambda *_: nullcontext())
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "bundle").symlink_to(bundle())
    config = json.dumps({"parameters": {"shadowllm": {"string_value": json.dumps(OPTIONS)}}})
    model = repository_model.TritonPythonModel()
    given = {"model_config": config, "model_repository": str(tmp_path), "model_version": "1", "model_name": NAME}
    model.initialize(given)

    def get(prompt, parameters):
        responses = queue.SimpleQueue()
        sender = SimpleNamespace(send=lambda response, flags: responses.put(response), is_cancelled=lambda: False)
        inputs = [Input("text_input", prompt), Input("sampling_parameters", parameters)]
        model.execute([SimpleNamespace(inputs=inputs, get_response_sender=lambda: sender)])
        return responses.get(timeout=60)

    get.engine = model._model.engine
    yield get
    model.finalize()
    sys.modules.pop(MODULE)  # it holds the stand-in


def test_the_name_in_triton_is_that_of_the_model(ask):
    found = ask(b"Hello", json.dumps({"model": NAME, "max_tokens": 2}).encode())
    assert found.error is None
    assert found.finish_reason in ("stop", "length")
    assert "no model 'other'" in ask(b"Hello", b'{"model": "other"}').error


@pytest.mark.parametrize(
    ("prompt", "parameters", "error"),
    [
        (b"Hello", b'{"prompt": "other"}', "prompt is given in sampling_parameters; give it as text_input"),
        (b"\xff", b"{}", "text_input is not UTF-8"),
        (b"Hello", b'{"stop": "\xff"}', "sampling_parameters is not UTF-8"),
        (b"Hello", b"[]", "sampling_parameters is not a JSON object"),
        (b"Hello", b'{"n": 2}', "n is not supported here; leave it out"),
    ],
)
def test_a_mistake_is_named(ask, caplog, prompt, parameters, error):
    assert ask(prompt, parameters).error == error
    assert "a bug" not in caplog.text


def test_logits_that_are_nan_are_logged_as_such_and_not_as_a_bug(ask, caplog, monkeypatch):
    session = ask.engine._session
    step = session.step
    monkeypatch.setattr(session, "step", lambda tokens: {slot: found * np.nan for slot, found in step(tokens).items()})
    assert "NaN or infinite logits" in ask(b"Hello", b'{"max_tokens": 4}').error
    assert "NaN or infinite logits" in caplog.text
    assert "a bug" not in caplog.text


def test_a_bug_is_logged_and_not_told_to_clients(ask, caplog, monkeypatch):
    def broken(*_):
        raise KeyError("a secret")

    monkeypatch.setattr(ask.engine, "submit", broken)
    assert ask(b"Hello", b"{}").error == "an internal error; the server's log has more"
    assert "a bug" in caplog.text
    assert "KeyError: 'a secret'" in caplog.text
