"""llama.cpp as a rival of the frontier: quantised files of a model, and the workers that run them.

It needs an environment of its own, which `make .peers/llamacpp` makes.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf

from shadowllm.errors import UserError
from shadowllm.evaluation.speed.harness import Contender

NAME = "llama.cpp"
TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")


@dataclass(frozen=True)
class Rival:
    """A contender of another toolkit.

    Attributes:
        bytes_per_token: bytes of all tensors of its file; the KV cache is not counted.
    """

    contender: Contender
    bytes_per_token: int


def llama_cpp_rivals(
    python: Path, model: Path, folder: Path, threads: int, tick: Callable[[], None] = lambda: None
) -> list[Rival]:
    """Return a rival for each of the `TYPES`. Quantised files that exist in the folder are used.

    Args:
        python: interpreter that has ``llama-cpp-python``.
        model: float32 GGUF file, which `gguf_model` writes.
        folder: where the quantised files are.
        tick: called after each file.

    Raises:
        UserError: a file or the interpreter does not exist, or llama.cpp fails.
    """
    if not model.is_file():
        raise UserError(f"no such file: {model}", "python -m shadowllm.benchmarks.gguf_model writes it")
    found = []
    for kind in TYPES:
        path = folder / f"{model.stem}-{kind}.gguf"
        if not path.exists():
            _quantise(python, model, kind, path, threads)
        size = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)
        found.append(Rival(Contender(f"{NAME} {kind}", _worker(python, path, threads)), size))
        tick()
    return found


def _worker(python: Path, model: Path, threads: int, *options: str) -> tuple[str, ...]:
    # By path, because the package that is installed there has no benchmarks.
    script = str(Path(__file__).resolve().with_name("llama_cpp_worker.py"))
    return str(python), "-P", script, str(model), "--threads", str(threads), *options


def _quantise(python: Path, model: Path, kind: str, path: Path, threads: int) -> None:
    partial = path.with_suffix(".partial")
    command = _worker(python, model, threads, "--quantise", kind, str(partial))
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(
            f"cannot run {python} ({error.strerror})", "make .peers/llamacpp, and name its python"
        ) from error
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(
            f"llama.cpp cannot make {kind} ({last[0][:200]})", "install llama-cpp-python in that environment"
        )
    partial.rename(path)
