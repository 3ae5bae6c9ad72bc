"""The HTTP server: time limits for slow clients, and a graceful end."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from shadowllm.errors import UserError
from shadowllm.serve_config import ServeConfig

CONNECTIONS = 1024  # more are refused


class TimedProtocol(H11Protocol):
    """Closes connections of clients that are too slow to send a request, or to read what is sent to them.

    Args:
        seconds: in which a request must arrive, and a full send buffer must become free.
    """

    def __init__(self, seconds: float, **keywords: Any) -> None:
        super().__init__(**keywords)
        self._seconds = seconds
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start("read")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop("read")
        self._stop("write")
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Read what has arrived; also called after an answer, for what arrived while it was sent."""
        super().handle_events()
        waiting = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]  # a part of a head
        if waiting or self.conn.their_state is h11.SEND_BODY:
            self._start("read")
        else:
            self._stop("read")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("write")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("write")

    def _start(self, timer: str) -> None:
        if timer not in self._timers:
            self._timers[timer] = self.loop.call_later(self._seconds, self.transport.abort)

    def _stop(self, timer: str) -> None:
        if timer in self._timers:
            self._timers.pop(timer).cancel()


class Server(uvicorn.Server):
    """A uvicorn server that calls ``on_stop`` when a signal asks it to end. Then it ends with success.

    A second Ctrl-C ends it at once.
    """

    def __init__(self, config: uvicorn.Config, on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_stop = on_stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self._on_stop()
        self.stop()

    def stop(self) -> None:
        """End when all answers are sent."""
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As in uvicorn, and a hangup asks the server to end too, unless it is ignored (nohup)."""
        before = signal.getsignal(signal.SIGHUP)
        ours = threading.current_thread() is threading.main_thread() and before != signal.SIG_IGN
        if ours:
            signal.signal(signal.SIGHUP, self.handle_exit)
        try:
            with super().capture_signals():
                yield
        finally:
            if ours:
                signal.signal(signal.SIGHUP, before)


def make_server(app: FastAPI, config: ServeConfig, on_stop: Callable[[], None]) -> Server:
    """Return the server of an application."""
    protocol: Any = partial(TimedProtocol, config.transfer_timeout)
    return Server(
        uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=round(config.grace) + 5,
        ),
        on_stop,
    )


def accepted_hosts(config: ServeConfig, address: str) -> set[str] | None:
    """Return the hosts that requests may name; None if they may name any.

    A page of any site can send requests to this machine under a name of its own, and read the answers (DNS rebinding).
    So without keys, a server that only this machine can reach accepts only its own names.

    Args:
        address: on which the server listens.
    """
    if config.api_keys is not None or not ip_address(address).is_loopback:
        return None
    return {"localhost", "127.0.0.1", "[::1]", (f"[{config.host}]" if ":" in config.host else config.host).lower()}


def listen(config: ServeConfig) -> socket.socket:
    """Return a socket that listens on the server's address.

    Raises:
        UserError: it cannot.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {config.host} port {config.port} ({error.strerror or error})",
            "choose another address or port by --host and --port",
        ) from error
