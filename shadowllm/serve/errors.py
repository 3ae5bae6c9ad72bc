"""Errors of the HTTP interface, in OpenAI's format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Response
from pydantic import ValidationError

from shadowllm.errors import BundleGoneError, UserError
from shadowllm.runtime.generation.chooser import LogitsError
from shadowllm.runtime.serving.job import DeadlineError, EngineClosedError, EngineFailedError, QueueFullError

RETRY_AFTER = 1  # seconds
BUG = "internal_error"  # the code of an error that is none of the others
# What fields of several types accept. pydantic has one error per type, and none of them says so.
ACCEPTED = {
    "prompt": "a text, a list of texts, token ids, or a list of lists of token ids",
    "stop": "a string or a list of strings",
    "neurons": "a number or a list of numbers",
    "heads": "a number or a list of numbers",
    "shortlist": 'a whole number or "all"',
    "sparsity": '"exact" or an object',
    "content": "a string, or a list of parts of the type text",
}
# Their objects have fields, so an error inside says more.
WITH_FIELDS = ("sparsity", "content")
# Status, type and code of errors of the engine and of the model; any other `UserError` is a mistake in the request.
ENGINE_ERRORS: dict[type[Exception], tuple[int, str, str]] = {
    QueueFullError: (429, "rate_limit_error", "queue_full"),
    DeadlineError: (504, "timeout_error", "deadline_exceeded"),
    EngineClosedError: (503, "server_error", "stopping"),
    EngineFailedError: (503, "server_error", "session_failed"),
    BundleGoneError: (503, "server_error", "bundle_gone"),
    LogitsError: (500, "server_error", "bad_logits"),
}


class ApiError(Exception):
    """An answer with an error.

    Args:
        status: HTTP status.
        message: one sentence for the user.
        kind: OpenAI's ``type``.
        param: the parameter that is wrong, if it is one.
        code: a short name of the error for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @property
    def name(self) -> str:
        """Its code, or its type if it has none."""
        error = self.content["error"]
        return str(error["code"] or error["type"])


def api_error(error: Exception) -> ApiError:
    """Return the answer for an error. A bug's message is not given to clients."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if type(error) in ENGINE_ERRORS:
        status, kind, code = ENGINE_ERRORS[type(error)]
        return ApiError(status, str(error), kind, code=code)
    if isinstance(error, UserError):
        # A remedy that names an option of the command line does not help a client.
        return ApiError(400, error.problem if "--" in error.remedy else str(error))
    return ApiError(500, "an internal error; the server's log has more", "server_error", code=BUG)


@contextmanager
def blame(param: str) -> Iterator[None]:
    """Name the parameter whose value a `UserError` inside is about.

    Raises:
        ApiError: in place of the `UserError`.
    """
    try:
        yield
    except UserError as error:
        found = api_error(error)
        found.content["error"]["param"] = param
        raise found from error


def _invalid(error: ValidationError) -> ApiError:
    """The answer for a body of a wrong form. The innermost error is that of the type that fits best."""
    found = error.errors(include_url=False, include_input=False, include_context=False)
    location, message = max(((each["loc"], each["msg"]) for each in found), key=lambda each: len(each[0]))
    place: list[str] = []
    for index, part in enumerate(location):
        field = location[index - 1] if index else None
        if field not in ACCEPTED or not isinstance(part, str):
            place.append(str(part))
        elif field not in WITH_FIELDS or index == len(location) - 1:  # `part` is one of the field's types
            message = f"Input should be {ACCEPTED[str(field)]}"
            break
    return ApiError(400, f"{'.'.join(place) or 'the body'}: {message}", param=place[0] if place else None)


def json_text(content: Any) -> str:
    """Return JSON in ASCII, because a client's text may have characters that UTF-8 cannot represent."""
    return json.dumps(content, ensure_ascii=True, separators=(",", ":"))


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return an answer with JSON."""
    return Response(json_text(content), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """Return the answer for an error."""
    headers = {"Retry-After": str(RETRY_AFTER)} if error.status in (429, 503) else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error.content, error.status, headers)
