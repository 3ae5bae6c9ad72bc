"""Child processes in Python. Requests and answers are JSON lines over a separate channel.

The parent enters a `Child` and calls `ask`; the child answers from `serve`. The channel is a socket. Its number is in
the environment variable SHADOWLLM_CHANNEL, so that output of libraries never mixes with the messages. Without that
variable, for example if a worker is run by hand, requests come from stdin and messages go to stdout.

A request is any JSON value. The answer is any number of ``{"progress": ...}``, then ``{"result": ...}``,
``{"problem": str, "remedy": str}`` for a `UserError`, or ``{"traceback": str}`` for another exception.

This module imports nothing heavy, because workers of other toolkits run it under their own interpreters.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import IO, Any, Self, TextIO

from shadowllm.errors import UserError

CHANNEL = "SHADOWLLM_CHANNEL"
LAST_WORDS = 20  # lines of a child's output that are kept for errors

_SIGNALS = {number.value: number.name for number in signal.Signals}

Progress = Callable[[Any], None]


def module_command(module: str, *arguments: str) -> tuple[str, ...]:
    """Return the command that runs a module with this interpreter."""
    # -P keeps the current folder off the path, because it may contain another "shadowllm".
    return (sys.executable, "-P", "-m", module, *arguments)


class ChildError(RuntimeError):
    """A child ended without an answer or failed after it, by a signal or by an exception that is a bug.

    Attributes:
        status: exit status, or minus the number of the signal.
        signal: name of the signal, as "SIGKILL"; None if no signal ended it.
        said: its last lines that are not empty: its output, if that was kept, then its traceback.
    """

    def __init__(self, name: str, status: int, said: Sequence[str]) -> None:
        self.status, self.said = status, list(said)
        self.signal = _SIGNALS.get(-status, f"signal {-status}") if status < 0 else None
        ending = f"died of {self.signal}" if self.signal else f"failed (exit status {status})"
        hint = "; the machine may have run out of memory" * (self.signal == "SIGKILL")
        super().__init__("\n".join([f"{name} {ending}{hint}" + ":" * bool(said), *said]))


class Child:
    """A running child process. Leaving the context always ends it.

    It has its own session, so Ctrl-C reaches only this process, which then ends its children in order. On Linux,
    a child that runs `serve` also ends when the thread that started it ends, even if that is killed.

    Args:
        command: the program and its arguments; see `module_command`.
        name: its name in errors, as "the engine worker".
        environment: its environment variables.
        keep_output: keep its last output lines for errors. Otherwise its stdout and stderr go to our stderr.
        grace: seconds for its clean-up when it is ended early; 0 kills it at once.

    Attributes:
        process: the process, once entered.

    Raises:
        OSError: on entering, if the program cannot be started.
    """

    process: subprocess.Popen[bytes]

    def __init__(
        self,
        command: Sequence[str],
        name: str,
        *,
        environment: Mapping[str, str] = os.environ,
        keep_output: bool = True,
        grace: float = 2.0,
    ) -> None:
        self._command, self._name, self._environment = command, name, environment
        self._keep_output, self._grace = keep_output, grace
        self._traceback: list[str] = []

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._log: IO[str] | None = None
            if self._keep_output:
                self._log = undo.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace"))
            self._channel, child_end = socket.socketpair()
            undo.enter_context(self._channel)
            self._messages = undo.enter_context(self._channel.makefile("r", encoding="utf-8"))
            with child_end:
                number = child_end.fileno()
                self.process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=self._log or 2,
                    stderr=self._log,
                    env={**self._environment, CHANNEL: str(number)},
                    pass_fds=(number,),
                    start_new_session=True,
                )
            undo.callback(self._end)
            self._resources = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    def ask(self, request: Any, progress: Progress = lambda _: None, timeout: float | None = None) -> Any:
        """Send a request and wait for its result.

        Args:
            request: a JSON value.
            progress: called with each progress value that the child reports.
            timeout: seconds to wait for each message. After a timeout the child cannot be used any more.

        Raises:
            UserError: the child raised it.
            ChildError: the child raised another exception, or ended without an answer.
            TimeoutError: no message came in time.
        """
        line = json.dumps(request) + "\n"
        self._channel.settimeout(timeout)
        with suppress(ConnectionError):  # the child has already ended; its status tells why
            self._channel.sendall(line.encode())
        while (line := self._receive()).endswith("\n"):  # an incomplete line means that the child died
            match json.loads(line):
                case {"progress": value}:
                    progress(value)
                case {"result": value}:
                    return value
                case {"problem": problem, "remedy": remedy}:
                    raise UserError(problem, remedy)
                case {"traceback": text}:
                    self._traceback = [line for line in text.splitlines() if line.strip()]
        raise self._death(timeout)

    def finish(self, timeout: float | None = None) -> None:
        """Tell the child that no more requests come, and wait until it ends.

        Raises:
            ChildError: its exit status is not 0.
            TimeoutError: it does not end in time.
        """
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)
        if self._wait(timeout):
            raise self._death(timeout)

    def _receive(self) -> str:
        try:
            return self._messages.readline()
        except ConnectionError:
            return ""

    def _wait(self, timeout: float | None) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self._name} does not end") from None

    def _death(self, timeout: float | None) -> ChildError:
        status, printed = self._wait(timeout), []
        if self._log:
            self._log.seek(0)
            printed = [line for line in self._log.read().splitlines() if line.strip()]
        return ChildError(self._name, status, [*printed[-LAST_WORDS:], *self._traceback])

    def _end(self) -> None:
        try:
            if self._grace:
                self.process.terminate()
                self.process.wait(self._grace)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also after a second Ctrl-C
            self.process.kill()
            self.process.wait()


def call(child: Child, request: Any, progress: Progress = lambda _: None, timeout: float | None = None) -> Any:
    """Run a child for one request and wait until it ends. Arguments and errors are those of `Child.ask`."""
    with child:
        result = child.ask(request, progress, timeout)
        child.finish(timeout)
        return result


def serve(answer: Callable[[Any, Progress], Any]) -> int:
    """Answer requests in the child until the parent sends no more, or one fails.

    From here on SIGTERM raises `SystemExit`, so that open resources are closed.

    Args:
        answer: called with a request and a function that reports progress from any thread; returns the result.
            Requests, progress and results are JSON values.

    Returns:
        The exit status: 1 when a request failed.
    """
    end_with_parent()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    has_parent, lock = CHANNEL in os.environ, threading.Lock()
    requests, messages = _open_channel()

    def send(**message: Any) -> None:
        line = json.dumps(message) + "\n"
        with lock:
            messages.write(line)
            messages.flush()

    for line in requests:
        if has_parent and _has_ended(requests):
            return 1
        try:
            send(result=answer(json.loads(line), lambda value: send(progress=value)))
        except UserError as error:
            send(problem=error.problem, remedy=error.remedy)
            return 1
        except Exception:
            if not has_parent:
                raise
            send(traceback=traceback.format_exc())
            return 1
    return 0


def _has_ended(channel: TextIO) -> bool:
    """Return whether the parent has ended, for example because it was killed before `end_with_parent`."""
    poll = select.poll()
    poll.register(channel, 0)  # reports only that the other end was closed
    return bool(poll.poll(0))


def end_with_parent() -> None:
    """Make Linux end this process when its parent is killed, because no one would collect the result."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _open_channel() -> tuple[TextIO, TextIO]:
    """Return the files from which requests are read and to which messages are written."""
    number = os.environ.pop(CHANNEL, None)
    if number is None:
        # Libraries may print to file descriptor 1. Keep a copy of it for messages, and redirect it to stderr.
        messages = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        return sys.stdin, messages
    with socket.socket(fileno=int(number)) as channel:  # the two files keep it open
        channel.set_inheritable(False)  # a process that outlives this one must not keep it open
        return channel.makefile("r", encoding="utf-8"), channel.makefile("w", encoding="utf-8")
