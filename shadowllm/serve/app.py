"""The routes of the server."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from shadowllm.errors import UserError
from shadowllm.serve.completions import ClosedByClient, answer
from shadowllm.serve.errors import ApiError, api_error, error_response, json_response
from shadowllm.serve.keys import ApiKeys
from shadowllm.serve.log import RequestLog
from shadowllm.serve.metrics import make_registry
from shadowllm.serve.model import ServedModel
from shadowllm.serve.planning import Planner
from shadowllm.serve.schema import ChatBody, CompletionBody

PAGE = Path(__file__).parent / "page"
FILES = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
# The page loads nothing from other servers, and no other page can show it in a frame.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def make_app(model: ServedModel, keys: ApiKeys, slots: int, hosts: Collection[str] | None = None) -> FastAPI:
    """Return the application that serves a model.

    Args:
        slots: number of slots of the engine.
        hosts: names of the server, in small letters, one of which a request must have as its host; None accepts all.
    """
    planner = Planner(model)
    registry, requests = make_registry(model.engine, slots)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        planner.close()

    def check_host(request: Request) -> None:
        given = re.sub(r":\d*$", "", request.headers.get("host", "")).lower()
        if hosts is not None and given not in hosts:
            raise ApiError(403, f"the host {given!r:.80} is not a name of this server", code="wrong_host")

    app = FastAPI(lifespan=lifespan, openapi_url=None, redirect_slashes=False, dependencies=[Depends(check_host)])
    app.state.planner = planner
    app.add_middleware(RequestLog, requests=requests)
    for kind in (UserError, ApiError, ValidationError, Exception):
        app.add_exception_handler(kind, _error)
    app.add_exception_handler(HTTPException, _http_error)
    for kind in (ClosedByClient, ClientDisconnect):
        app.add_exception_handler(kind, _closed)

    def check_key(request: Request) -> None:
        if not keys.accept(request.headers.get("authorization")):
            raise ApiError(401, "the API key is missing or wrong", "authentication_error", code="invalid_api_key")

    guarded = APIRouter(dependencies=[Depends(check_key)])
    _add_api(guarded, model, planner, registry)
    app.include_router(guarded)
    _add_open(app, model, slots)
    return app


def _add_api(router: APIRouter, model: ServedModel, planner: Planner, registry: CollectorRegistry) -> None:
    """Add the routes that need a key."""
    listed = describe(model)

    @router.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [listed]})

    @router.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != model.name:
            raise ApiError(404, f"there is no model {name!r:.80}", param="model", code="model_not_found")
        return json_response(listed)

    @router.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionBody, model, planner)

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        if not model.tokenizer.chat_template:
            raise ApiError(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
        return await answer(request, ChatBody, model, planner)

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _add_open(app: FastAPI, model: ServedModel, slots: int) -> None:
    """Add the routes that need no key."""

    @app.get("/health")
    async def health() -> Response:
        engine = model.engine
        status = "failed" if engine.failure else "ok" if engine.accepts else "stopping"
        content = {"status": status, "slots": slots, "running": engine.running, "waiting": engine.waiting}
        return json_response(content, 200 if engine.accepts else 503)

    def add_file(path: str, name: str, kind: str) -> None:
        content = (PAGE / name).read_bytes()

        @app.get(path)
        async def file() -> Response:
            return Response(content, headers=HEADERS, media_type=kind)

    for path, (name, kind) in FILES.items():
        add_file(path, name, kind)


def describe(model: ServedModel) -> dict[str, Any]:
    """Return the entry of a model in ``/v1/models``, with sizes and budget under ``shadowllm``."""
    spec, manifest = model.manifest.spec, model.manifest
    own = {
        "layers": spec.n_layers,
        "dense_layers": manifest.dense_layers,
        "heads": spec.n_heads,
        "neurons": spec.intermediate_size,
        "positions": spec.max_seqlen,
        "max_tokens": model.config.max_tokens,
        "rest": manifest.rest,
        "selector": manifest.predictor["kind"],
        "budget": vars(model.budget),
        "chat": bool(model.tokenizer.chat_template),
    }
    return {
        "id": model.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "shadowllm",
        "shadowllm": own,
    }


async def _error(request: Request, error: Exception) -> Response:
    answered = api_error(error)
    request.state.record["error"] = answered.name
    return error_response(answered)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path:.80}: {str(error.detail).lower()}"
    response = error_response(ApiError(error.status_code, message))
    response.headers.update(error.headers or {})
    return response


async def _closed(request: Request, error: Exception) -> Response:
    request.state.record["error"] = "closed_by_client"
    return Response(status_code=499)  # nobody reads it
