"""Parts of the benchmark in processes of their own: they may crash, and one process holds one flavour of TensorRT."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any


def answer(name: str, module: str, *arguments: str, timeout: float) -> dict[str, Any]:
    """What a module prints, run as a program.

    Args:
        name: of what it works on, for errors.
        timeout: seconds.

    Returns:
        The last JSON object on its stdout, or ``{"error": ...}``: one line that begins with the name.
    """
    # -P keeps the current folder off the path, where another "shadowllm" may lie.
    command = [sys.executable, "-P", "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"{name}: no answer within {timeout:g} s"}
    # Libraries print too, and some of it comes after the end.
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0 and said:
        return dict(json.loads(said[-1]))
    code = done.returncode
    reason = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return {"error": f"{name}: {reason}: {' | '.join(words[-5:])[:2000]}"}
