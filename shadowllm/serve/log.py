"""The log: one line of JSON per request, without texts and keys."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import Counter
from starlette.types import ASGIApp, Receive, Scope, Send

from shadowllm.serve.errors import BUG

logger = logging.getLogger("shadowllm.serve")


class RequestLog:
    """Writes a line for each request, and counts it. Handlers add to ``request.state.record``.

    Args:
        app: answers the requests.
        requests: counts them by path and status.
    """

    def __init__(self, app: ASGIApp, requests: Counter) -> None:
        self._app, self._requests = app, requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        record |= {"method": scope["method"], "path": scope["path"], "status": None}
        scope.setdefault("state", {})["record"] = record
        start = time.monotonic()

        async def send_noting(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                record["status"] = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except Exception:
            if record["status"] is None:  # a bug: the application answers it outside of this
                record |= {"status": 500, "error": BUG}
            raise
        finally:
            record["seconds"] = round(time.monotonic() - start, 6)
            path = scope["route"].path if "route" in scope else "other"
            self._requests.labels(path, str(record["status"])).inc()
            logger.info(json.dumps(record))
