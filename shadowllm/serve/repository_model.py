"""A bundle as a model of Triton Inference Server's Python backend. It can be imported only in that server.

The interface is that of https://github.com/triton-inference-server/python_backend, with decoupled responses. A request
has a prompt in ``text_input`` and may have a JSON object in ``sampling_parameters`` with fields of ``/v1/completions``.
With ``stream`` in it, each piece of the text is a response, else there is one response.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as backend

from shadowllm.runtime.serving.job import Event, Failed, Job, Token
from shadowllm.serve.errors import BUG, ApiError, api_error
from shadowllm.serve.log import logger
from shadowllm.serve.metrics import EngineCollector
from shadowllm.serve.repository_metrics import Publisher
from shadowllm.serve.schema import CompletionBody
from shadowllm.serve.server import Deployment, open_model
from shadowllm.serve_config import EngineConfig, ServeConfig

FINAL = backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL
UNSUPPORTED = ("n", "logprobs", "stream_options", "shadowllm")  # their results have no output
PARAMETERS = "sampling_parameters"


class TritonPythonModel:
    """The model; the server makes one, and calls its methods from one thread."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the bundle and start the engine."""
        options = json.loads(json.loads(args["model_config"])["parameters"]["shadowllm"]["string_value"])
        deployment = {name: options.pop(name) for name in ("backend", "threads", "prepack")}
        bundle = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self._open = ExitStack()
        server = ServeConfig(model_name=args["model_name"])  # so clients may give it as `model`
        self._model = self._open.enter_context(
            open_model(Deployment(bundle, server=server, engine=EngineConfig(**options), **deployment))
        )
        collector = EngineCollector(self._model.engine, options["slots"])
        self._open.enter_context(Publisher(collector, args["model_name"]))

    def execute(self, requests: Sequence[Any]) -> None:
        """Give requests to the engine, whose thread sends the responses."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._submit(request, sender)
            except Exception as error:  # noqa: BLE001  (each request has its own answer)
                _fail(sender, error)

    def finalize(self) -> None:
        """End the engine."""
        self._open.close()

    def _submit(self, request: Any, sender: Any) -> None:
        deadline = time.monotonic() + self._model.config.request_timeout
        try:
            given = json.loads(_text(request, PARAMETERS) or "{}")
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise ApiError(400, f"{PARAMETERS} is not a JSON object", param=PARAMETERS)
        if given.get("prompt") is not None:
            raise ApiError(400, f"prompt is given in {PARAMETERS}; give it as text_input", param="prompt")
        for name in UNSUPPORTED:
            if given.get(name) is not None:
                raise ApiError(400, f"{name} is not supported here; leave it out", param=name)
        body = CompletionBody.model_validate_json(json.dumps(given | {"prompt": _text(request, "text_input")}))
        plan = self._model.plan(body)
        job = Job(
            plan.requests[0],
            Reply(sender, bool(body.stream)),
            plan.budget,
            deadline=deadline,
            step_bytes=plan.step_bytes[0],
            verification_bytes=plan.verification_bytes[0],
        )
        self._model.engine.submit(job)


class Reply:
    """Sends the events of a job as responses.

    Args:
        stream: send each piece of the text, and not the whole text at its end.
    """

    def __init__(self, sender: Any, stream: bool) -> None:
        self._sender, self._stream = sender, stream
        self._pieces: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Failed):
            _fail(self._sender, event.error)
        elif not isinstance(event, Token):
            self._respond("".join((*self._pieces, event.text)), event.reason, FINAL)
        elif self._sender.is_cancelled():
            raise InterruptedError("the client has gone away")  # the engine cancels the job
        elif self._stream:
            self._respond(event.text)
        else:
            self._pieces.append(event.text)

    def _respond(self, text: str, reason: str = "", flags: int = 0) -> None:
        values = {"text_output": text, "finish_reason": reason}
        outputs = [backend.Tensor(name, np.array([value.encode()], dtype=np.object_)) for name, value in values.items()]
        self._sender.send(backend.InferenceResponse(outputs), flags=flags)


def _text(request: Any, name: str) -> str:
    """The string of an input; empty without it.

    Raises:
        ApiError: it is not UTF-8.
    """
    tensor = backend.get_input_tensor_by_name(request, name)
    try:
        return "" if tensor is None else str(tensor.as_numpy().reshape(-1)[0].decode())
    except UnicodeDecodeError as error:
        raise ApiError(400, f"{name} is not UTF-8", param=name) from error


def _fail(sender: Any, error: Exception) -> None:
    answered = api_error(error)
    if answered.name == BUG:
        logger.error("a bug", exc_info=error)
    elif answered.status == 500:
        logger.error(str(answered))
    response = backend.InferenceResponse(error=backend.TritonError(answered.content["error"]["message"]))
    sender.send(response, flags=FINAL)
