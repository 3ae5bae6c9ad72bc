"""The answers to requests for texts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from typing import Any

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from shadowllm.runtime.serving.job import Finished, Token
from shadowllm.serve.errors import BUG, ApiError, api_error, json_response, json_text
from shadowllm.serve.generation import Generation
from shadowllm.serve.log import logger
from shadowllm.serve.model import Plan, ServedModel
from shadowllm.serve.planning import Planner
from shadowllm.serve.replies import Replies, Text, count_tokens
from shadowllm.serve.schema import ChatBody, CompletionBody

Chunks = AsyncIterator[dict[str, Any]]


async def answer(
    request: Request, kind: type[CompletionBody] | type[ChatBody], model: ServedModel, planner: Planner
) -> Response:
    """Answer a request for texts.

    Args:
        kind: the type of the body.
        planner: of the same model.

    Raises:
        ApiError, UserError: the request cannot be answered.
        ClosedByClient: the connection was closed before the answer began.
    """
    deadline = time.monotonic() + model.config.request_timeout
    body = kind.model_validate_json(await read_body(request, model.config.max_body))
    plan = await _while_connected(request.receive, planner.plan(body, deadline))
    generation = Generation(model.engine, plan, body, deadline)
    selection = body.shadowllm is not None and body.shadowllm.selection
    wanted = body.top_logprobs_wanted is not None
    usage = bool(body.stream_options and body.stream_options.include_usage)
    replies = Replies(kind is ChatBody, model.name, model.tokenizer, wanted, selection, usage)
    record = request.state.record
    record.update(id=replies.id, texts=len(plan.requests), prompt_tokens=plan.prompt_tokens, budget=vars(plan.budget))
    record.update(stream=bool(body.stream))
    work = _stream(generation, plan, replies, usage) if body.stream else _whole(generation, plan, replies)
    response = WatchedResponse(work, generation, record)
    await response.begin(request.receive)
    return response


async def read_body(request: Request, most: int) -> bytes:
    """Read the body of a request.

    Raises:
        ApiError: it is not JSON by its type, or has more than ``most`` bytes.
    """
    # A page of another origin cannot send this type without being allowed to.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the content type must be application/json")
    too_large = ApiError(413, f"the body has more than {most} bytes", code="body_too_large")
    if int(request.headers.get("content-length", "0")) > most:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large
    return bytes(body)


async def _whole(generation: Generation, plan: Plan, replies: Replies) -> Chunks:
    texts = [Text() for _ in plan.requests]
    async for index, event in generation.events():
        if isinstance(event, Token):
            texts[index].tokens.append(event)
        else:
            texts[index].rest, texts[index].reason = event.text, event.reason
    yield replies.whole(texts, count_tokens(plan.prompt_tokens, generation.new_tokens))


async def _stream(generation: Generation, plan: Plan, replies: Replies, usage: bool) -> Chunks:
    begun = set[int]()
    async for index, event in generation.events():
        if index not in begun and (role := replies.role(index)):
            yield role
        begun.add(index)
        if isinstance(event, Finished):
            yield replies.end(index, event.text, event.reason)
        elif (chunk := replies.token(index, event)) is not None:
            yield chunk
    if usage:
        yield replies.usage(count_tokens(plan.prompt_tokens, generation.new_tokens))


class WatchedResponse(Response):
    """An answer that is computed while the connection is watched. If it closes, the texts are cancelled.

    The status is sent only when the first part is there, so that an error until then has a status of its own.

    Args:
        chunks: parts of a stream, or the only part of a whole answer.
        record: what is logged of the request.
    """

    def __init__(self, chunks: Chunks, generation: Generation, record: dict[str, Any]) -> None:
        super().__init__()
        self._chunks, self._generation, self._record = chunks, generation, record

    async def begin(self, receive: Receive) -> None:
        """Queue the texts and wait for the first part.

        Raises:
            ApiError, UserError: there will be none.
        """
        self._generation.submit()
        try:
            self._first = await _while_connected(receive, anext(self._chunks))  # type: ignore[arg-type]
        except BaseException:
            self._close()
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if not self._record["stream"]:
                await json_response(self._first)(scope, receive, send)
            else:
                with suppress(ClosedByClient):
                    await _while_connected(receive, self._send_all(send))
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def send_text(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

        try:
            await send_text(json_text(self._first))
            async for chunk in self._chunks:
                await send_text(json_text(chunk))
        except OSError:
            raise
        except Exception as error:  # noqa: BLE001  (the status is sent already, so every error is told in the stream)
            answered = api_error(error)
            self._record["error"] = answered.name
            if answered.name == BUG:
                logger.error("a bug", exc_info=error)
            await send_text(json_text(answered.content), more=False)
            return
        await send_text("[DONE]", more=False)

    def _close(self) -> None:
        self._generation.cancel()
        self._record.update(
            completion_tokens=self._generation.new_tokens,
            first_token_seconds=self._generation.first_token,
            outcome=self._generation.outcome,
        )


class ClosedByClient(Exception):  # noqa: N818  (it is no error of the server)
    """The client closed the connection before it had its answer."""


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of ``work``.

    Raises:
        ClosedByClient: the connection was closed before. ``work`` is cancelled.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_closed(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClosedByClient
        return working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _closed(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
