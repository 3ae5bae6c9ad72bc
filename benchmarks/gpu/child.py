"""Runs parts of the benchmark in child processes: they may crash, and need one process per flavour of TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shadowllm.child import Child, ChildError, call
from shadowllm.errors import UserError


def answer(name: str, command: Sequence[str], request: Any, *, timeout: float) -> dict[str, Any]:
    """Send one request to a child process, and return its answer.

    Args:
        name: name for error messages.
        command: command of a program that serves requests (`shadowllm.child.serve`).
        timeout: seconds to wait for the answer.

    Returns:
        The answer, or ``{"error": ...}``: one line that begins with the name.
    """
    try:
        return dict(call(Child(command, name), request, timeout=timeout))
    except TimeoutError:
        return {"error": f"{name}: no answer within {timeout:g} s"}
    except UserError as error:
        return {"error": f"{name}: {error}"}
    except ChildError as death:
        reason = f"killed by {death.signal}" if death.signal else f"exit status {death.status}"
        words = " | ".join(line.strip() for line in death.said[-5:])
        return {"error": f"{name}: {reason}: {words[:2000]}"}
