"""Runs and quantises GGUF files with llama.cpp, under the interpreter that has ``llama-cpp-python``.

Run it by path: ``PYTHON -P benchmarks/llama_cpp_worker.py``. Like `peer_worker`, it needs ``pip install --no-deps`` of
this package. It calls llama.cpp's C functions directly, so that no Python code of the other package is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np

from shadowllm.evaluation.speed.worker import Commands, StepTimer, serve

FILE_TYPES = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}


class LlamaCpp:
    """A model and one sequence, with the methods of a session that are timed."""

    memory = step_seconds = fired = recomputed = None  # not known

    def __init__(self, path: Path, threads: int, positions: int) -> None:
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        sizes = llama_cpp.llama_context_default_params()
        sizes.n_ctx = sizes.n_batch = positions
        sizes.n_threads = sizes.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, sizes)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def close(self) -> None:
        """Free the memory."""
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def reset(self, batch: int = 1) -> None:
        """Forget all tokens."""
        assert batch == 1
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Run a prompt; the logits after it, float32 ``(1, vocab_size)``."""
        return self._step(prompts[0])

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token; the logits after it, float32 ``(1, vocab_size)``."""
        return self._step(tokens.tolist())

    def _step(self, tokens: Sequence[int]) -> np.ndarray:
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self._context, llama_cpp.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError("llama.cpp cannot decode")
        found = llama_cpp.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(found, (1, self._vocabulary))


def quantise(source: Path, kind: str, out: Path, threads: int) -> None:
    """Write a quantised copy of a float32 GGUF file."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = FILE_TYPES[kind], threads
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp cannot quantise {source}")


def main() -> int:
    """Serve a model, or quantise a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="GGUF file")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--quantise", nargs=2, metavar=("TYPE", "OUT"), help="write a quantised copy instead")
    arguments = parser.parse_args()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # must live as long as the model
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    llama_cpp.llama_backend_init()
    if arguments.quantise:
        kind, out = arguments.quantise
        quantise(arguments.model, kind, Path(out), arguments.threads)
        return 0

    @contextmanager
    def load() -> Iterator[Commands]:
        session = LlamaCpp(arguments.model, arguments.threads, arguments.positions)
        try:
            yield StepTimer(session).commands()
        finally:
            session.close()

    return serve(load)


if __name__ == "__main__":
    sys.exit(main())
