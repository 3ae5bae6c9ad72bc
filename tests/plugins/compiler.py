"""Runs Triton's compiler in a child process: a process can use either it or the interpreter, which tests use."""

from __future__ import annotations

import os
import subprocess
import sys

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def child(*arguments: str) -> str:
    ended = subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout
