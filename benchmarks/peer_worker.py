"""Runs the graphs and generation loops of other toolkits, each with the interpreter that has the toolkit.

Run it by path: ``PYTHON -P benchmarks/peer_worker.py``. It imports only the speed worker of this package. So
``pip install --no-deps`` of this package, which has no benchmarks, is enough for that interpreter.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import onnxruntime as ort

from shadowllm.evaluation.speed.worker import Commands, Loop, LoopTimer, StepTimer, serve


def open_graph(folder: Path, threads: int) -> ort.InferenceSession:
    """The folder's ``model.onnx`` on the CPU provider with ``threads`` threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


class CacheGraph:
    """A decoder graph with ``past_key_values.N.key/value`` in and ``present.N.key/value`` out.

    Batch 1. Subclasses decide how the cache is passed.
    """

    memory = step_seconds = fired = recomputed = None  # not known

    def __init__(self, session: ort.InferenceSession, capacity: int) -> None:
        self._session = session
        self._capacity = capacity
        self._inputs = {value.name for value in session.get_inputs()}
        self._pasts = [name for name in self._inputs if name.startswith("past_key_values.")]
        self._shape = next(value.shape for value in session.get_inputs() if value.name in self._pasts)
        self.length = 0

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        return self._step(np.array([prompts[0]], dtype=np.int64))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        return self._step(tokens.reshape(1, 1))

    def reset(self, batch: int = 1) -> None:
        if batch != 1:
            raise ValueError(f"batch {batch}: peers run one sequence")
        self.length = 0

    def _step(self, ids: np.ndarray) -> np.ndarray:
        """Run ``(1, seqlen)`` ids; return the last position's logits ``(1, vocab_size)``."""
        raise NotImplementedError

    def _feeds(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        end = self.length + ids.shape[1]
        feeds = {
            "input_ids": ids,
            "attention_mask": np.ones((1, end), dtype=np.int64),
            "position_ids": np.arange(self.length, end, dtype=np.int64)[None],
        }
        self.length = end
        return {name: value for name, value in feeds.items() if name in self._inputs}

    def _present(self, past: str) -> str:
        return past.replace("past_key_values", "present")

    def _empty(self, capacity: int) -> np.ndarray:
        head_dim = self._shape[3] if isinstance(self._shape[3], int) else 64
        return np.zeros((1, self._shape[1], capacity, head_dim), dtype=np.float32)


class Run(CacheGraph):
    """Plain ``session.run`` with the cache as arrays, as optimum runs its exports on a CPU."""

    def reset(self, batch: int = 1) -> None:
        super().reset(batch)
        self._cache = {name: self._empty(0) for name in self._pasts}
        self._outputs = [value.name for value in self._session.get_outputs()]

    def _step(self, ids: np.ndarray) -> np.ndarray:
        values = dict(zip(self._outputs, self._session.run(self._outputs, self._feeds(ids) | self._cache), strict=True))
        self._cache = {name: values[self._present(name)] for name in self._pasts}
        return values["logits"][:, -1]


class Bound(CacheGraph):
    """IO binding; the cache outputs of a step are inputs of the next one, without a copy into Python."""

    def reset(self, batch: int = 1) -> None:
        super().reset(batch)
        self._cache = {name: ort.OrtValue.ortvalue_from_numpy(self._empty(0)) for name in self._pasts}

    def _step(self, ids: np.ndarray) -> np.ndarray:
        binding = self._session.io_binding()
        for name, array in self._feeds(ids).items():
            binding.bind_cpu_input(name, array)
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        for value in self._session.get_outputs():
            binding.bind_output(value.name)
        self._session.run_with_iobinding(binding)
        found = dict(zip((value.name for value in self._session.get_outputs()), binding.get_outputs(), strict=True))
        self._cache = {name: found[self._present(name)] for name in self._pasts}
        return found["logits"].numpy()[:, -1]


class Shared(CacheGraph):
    """IO binding; past and present share one buffer of fixed capacity, which attention updates in place."""

    def reset(self, batch: int = 1) -> None:
        super().reset(batch)
        self._binding = self._session.io_binding()
        for name in self._pasts:
            value = ort.OrtValue.ortvalue_from_numpy(self._empty(self._capacity))
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(self._present(name), value)

    def _step(self, ids: np.ndarray) -> np.ndarray:
        for name, array in self._feeds(ids).items():
            self._binding.bind_cpu_input(name, array)
        vocab_size = self._session.get_outputs()[0].shape[-1]
        logits = np.empty((1, ids.shape[1], vocab_size), dtype=np.float32)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        self._session.run_with_iobinding(self._binding)
        return logits[:, -1]


def genai_loop(folder: Path, capacity: int) -> Loop:
    """The greedy generator of onnxruntime-genai; ``genai_config.json`` in the folder sets the threads.

    Args:
        capacity: its ``max_length``, which sets the size of the cache.
    """
    import onnxruntime_genai as og  # pyright: ignore[reportMissingImports]

    model = og.Model(str(folder))

    def loop(prompt: list[int], new_tokens: int) -> Iterator[int]:
        parameters = og.GeneratorParams(model)
        # The minimum prevents an end-of-text token from ending a run early.
        shortest = len(prompt) + new_tokens
        parameters.set_search_options(min_length=shortest, max_length=max(capacity, shortest), do_sample=False)
        generator = og.Generator(model, parameters)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return loop


def main() -> int:
    """Serve one peer: ``run``, ``bound`` or ``shared`` over a graph, or the ``genai`` loop."""
    parser = argparse.ArgumentParser(prog="python benchmarks/peer_worker.py", description=__doc__)
    parser.add_argument("how", choices=["run", "bound", "shared", "genai"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--capacity", type=int, required=True)
    arguments = parser.parse_args()

    def load() -> AbstractContextManager[Commands]:
        if arguments.how == "genai":
            return nullcontext(LoopTimer(genai_loop(arguments.folder, arguments.capacity)).commands())
        kind = {"run": Run, "bound": Bound, "shared": Shared}[arguments.how]
        session = open_graph(arguments.folder, arguments.threads)
        return nullcontext(StepTimer(kind(session, arguments.capacity)).commands())

    return serve(load)


if __name__ == "__main__":
    sys.exit(main())
