"""Runs a bundle's TensorRT engines on one stream with shared buffers; a decode step is one CUDA graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from shadowllm.bundle import selection_names
from shadowllm.bundle.engine_record import EngineRecord, check_sidecar
from shadowllm.bundle.manifest import read_manifest
from shadowllm.config import Flavour
from shadowllm.errors import UserError
from shadowllm.models.sparsity import UNITS, Budget, SparseLayers, check_neuron_budget
from shadowllm.plugins.tensorrt.load_tensorrt import gpu_capability, load
from shadowllm.runtime.gpu.cuda import Cuda
from shadowllm.runtime.gpu.engine_buffers import Limits, buffers, constants, layout, memory_of
from shadowllm.runtime.gpu.kernel_cache import kernel_file
from shadowllm.runtime.gpu.pipelined_decode import SLOTS, PipelinedDecode
from shadowllm.runtime.gpu.trt_engine import TrtEngine, load_plugins, logger_class
from shadowllm.runtime.inputs import budget_scalars, check_batch, check_tokens, check_verified, pad_prompts
from shadowllm.runtime.session import Memory

Kind = Literal["sparse", "dense"]


class TrtSession(PipelinedDecode):
    """A `VerifyingSession` over the engines of one flavour.

    Prefill runs ``stem`` and ``body`` with the engines' first profile and with everything exact. A decode step runs
    ``stem``, ``predictor`` (if there is one) and ``body`` with the second profile, and picks the next tokens. It is
    captured as one CUDA graph if TensorRT allows it, and its last copies write the inputs of the next step. Budgets are
    numbers on the device.

    Args:
        bundle: folder with engines of that flavour.
        trt: the TensorRT module.
        cuda: makes the `Cuda` object, after the files are checked.
        kind: "dense" runs ``dense.engine``, for comparison.

    Attributes:
        spec: the model, with at most as many positions as the engines' cache.
        decodes: as ``kind``.
        longest_draft: as the engines are built.
        memory: device memory in use since `reset`; None before it.

    Raises:
        UserError: no bundle or engines, or an engine that cannot be deserialised here.
    """

    def __init__(
        self, bundle: Path, flavour: Flavour, trt: Any, cuda: Callable[[], Cuda] = Cuda, kind: Kind = "sparse"
    ) -> None:
        manifest, self._records = check_engines(bundle, flavour, trt.__version__, kind)
        self._folder, self._trt = bundle / "engines" / flavour, trt
        self._limits = Limits.of(list(self._records.values()))
        self.longest_draft = min(self._limits.kept, self._limits.seqlen) - 1
        self.spec = replace(manifest.spec, max_seqlen=min(manifest.spec.max_seqlen, self._limits.capacity))
        self._dtype, self._rest = manifest.dtype, manifest.rest
        self._selects_by: str = manifest.predictor["kind"]
        self._layers = SparseLayers(self.spec, self.spec.n_layers if kind == "dense" else manifest.dense_layers)
        self._batch = 0
        self.decodes: Kind = kind
        self.memory: Memory | None = None
        self.set_budget(manifest.budget)
        self._pieces: dict[str, TrtEngine] = {}
        self._cuda = cuda()

    @classmethod
    def open(cls, bundle: Path, flavour: Flavour, kind: Kind = "sparse") -> TrtSession:
        """Make a session on this machine's GPU.

        Raises:
            UserError: as the constructor, or the package or a GPU is missing.
        """
        return cls(bundle, flavour, load(flavour), kind=kind)

    def __enter__(self) -> Self:
        try:
            logger = logger_class(self._trt)()
            load_plugins(self._trt)
            self._runtime = self._trt.Runtime(logger)
            for name, record in self._records.items():
                path = self._folder / f"{name}.engine"
                kernels = kernel_file(record.version, gpu_capability(), record.engine_sha256)
                self._pieces[name] = TrtEngine(self._trt, self._runtime, path, logger, self._cuda.stream, kernels)
            self.reset()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._cuda.release()
        for piece in self._pieces.values():
            piece.close()
        self._pieces.clear()
        self._cuda.close()
        self._batch, self.memory = 0, None

    def reset(self, batch: int = 1) -> None:
        """See `Session.reset`. Nothing is allocated if ``batch`` is the same as before.

        Raises:
            UserError: more sequences than the engines are built for, or too little device memory.
        """
        if check_batch(batch) > self._limits.batch:
            raise UserError(
                f"{batch} sequences, the engines serve {self._limits.batch}", self._limits.rebuilt(batch=batch)
            )
        self._lengths = np.zeros(batch, dtype=np.int64)
        if batch != self._batch:
            self._batch = 0
            self._allocate(batch)
            self._batch = batch
        else:
            # Attention masks what an earlier text left, and NaN is still NaN behind a mask.
            for name, buffer in self._buffers.items():
                if name.startswith("cache."):
                    self._cuda.clear(self._address(name), buffer.nbytes)

    def set_budget(self, budget: Budget) -> None:
        """See `Session.set_budget`."""
        check_neuron_budget(self._selects_by, budget)
        self._counts, self._scalars = budget.counts(self._layers), budget_scalars(self.spec, budget, self._rest)
        self._budgets_set += 1
        if self._batch:
            self._write_budget()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Session.prefill`.

        Raises:
            UserError: also for a prompt that is longer than the engines support.
        """
        ids, positions, lengths = pad_prompts(prompts, len(self._lengths), self.spec, self._limits.prompt_length)
        self._run_dense(ids, positions, lengths[:, None] - 1)
        self._lengths[:] = lengths
        return self._fetched()

    def verify(self, tokens: np.ndarray) -> np.ndarray:
        """See `VerifyingSession.verify`; it runs as a prefill, after the tokens that are in the cache.

        Raises:
            UserError: also if the engines do not return the logits after so many tokens.
        """
        check_verified(tokens, self._lengths, self.spec)
        batch, seqlen = tokens.shape
        if seqlen > self.longest_draft + 1:
            raise UserError(
                f"the engines verify {self.longest_draft} drafted tokens at once, {seqlen - 1} are asked for",
                self._limits.rebuilt(kept=seqlen),
            )
        steps = np.tile(np.arange(seqlen), (batch, 1))
        self._run_dense(tokens, self._lengths[:, None] + steps, steps)
        self._lengths += seqlen
        return self._read_logits(seqlen)

    def _run_dense(self, ids: np.ndarray, positions: np.ndarray, kept: np.ndarray) -> None:
        """Launch a dense step; all are int64, ``(batch, seqlen)`` and, of the tokens with logits, ``(batch, kept)``."""
        for name, contents in (("prompt_ids", ids), ("prompt_positions", positions), ("kept_tokens", kept)):
            self._write(name, contents.astype(np.int64))
        for name, piece in self._pieces.items():
            if name != "predictor":
                piece.shape("prefill", self._buffers, ids.shape[1], kept.shape[1])
                piece.run("prefill", self._cuda.stream)

    def _start(self, tokens: np.ndarray, steps: int) -> None:
        check_tokens(tokens, self._lengths, self.spec, steps)
        self._write("tokens", tokens[:, None].astype(np.int64))
        self._write("positions", self._lengths[:, None])

    def _send(self, slot: int) -> None:
        self._cuda.read(self._slots[slot], self._address("tokens"))
        self._cuda.record(self._events[slot])

    def _received(self, slot: int) -> np.ndarray:
        self._cuda.wait_for(self._events[slot])
        return self._slots[slot, :, 0].copy()

    def _fetched(self) -> np.ndarray:
        return self._read_logits(1)[:, 0]

    def _read_logits(self, kept: int) -> np.ndarray:
        """Wait for the logits after ``kept`` tokens, float32 ``(batch, kept, vocab_size)``."""
        shape = (len(self._lengths), kept, self.spec.vocab_size)
        there = self._logits[: math.prod(shape)]
        self._cuda.read(there, self._address("logits"))
        self._cuda.wait()
        return there.reshape(shape).copy()  # a copy, because the pinned memory is freed when the session ends

    def _allocate(self, batch: int) -> None:
        """Allocate all memory, bind it and capture the CUDA graph for a number of sequences.

        The first step and the capture use position 0 of the cache, which is still empty.
        """
        cuda = self._cuda
        cuda.release()
        self._buffers = buffers(self._layers, self._dtype, batch, self._limits)
        self._offsets, size = layout(self._buffers)
        self._arena = cuda.allocate(size)
        workspace = max(piece.workspace for piece in self._pieces.values())
        scratch = cuda.allocate(workspace)
        self.memory = memory_of(list(self._records.values()), self._buffers, workspace)
        for name, contents in constants(self._buffers).items():
            self._write(name, contents)
        self._write_budget()
        self._logits = cuda.pinned((math.prod(self._buffers["logits"].shape),), np.float32)
        self._slots = cuda.pinned((SLOTS, batch, 1), np.int64)
        self._events = [cuda.event() for _ in self._slots]
        addresses = {name: self._address(name) for name in self._buffers}
        for piece in self._pieces.values():
            piece.bind(self._buffers, addresses, scratch)
            piece.shape("decode", self._buffers, 1)
        self._step()  # before the capture, because TensorRT prepares for a shape in its first run
        cuda.wait()
        stuck = [name for name, piece in self._pieces.items() if not piece.capturable(cuda.stream)]
        if stuck:
            warnings.warn(
                f"TensorRT cannot capture {', '.join(stuck)} in a CUDA graph: every step is launched kernel by kernel, "
                "which takes longer",
                RuntimeWarning,
                stacklevel=2,
            )
        self._replay = self._step if stuck else cuda.capture(self._step)

    def _step(self) -> None:
        """Launch one decode step, from the tokens and positions on the device to the next ones."""
        for piece in self._pieces.values():
            piece.run("decode", self._cuda.stream)
        for target, source in (("tokens", "next_tokens"), ("positions", "next_position_ids")):
            self._cuda.copy(self._address(target), self._address(source), self._buffers[target].nbytes)

    def _write_budget(self) -> None:
        if self._layers.count:
            for unit in UNITS:
                self._write(selection_names.counts(unit), self._counts[unit])
            for name, number in self._scalars.items():
                self._write(name, np.array(number, dtype=np.int32))

    def _write(self, name: str, contents: np.ndarray) -> None:
        self._cuda.write(self._address(name), np.ascontiguousarray(contents))

    def _address(self, name: str) -> int:
        return self._arena + self._offsets[name]


def check_engines(bundle: Path, flavour: str, version: str, kind: str) -> tuple[Any, dict[str, EngineRecord]]:
    """Read the manifest and the record of each engine of a step, and check them before an engine is deserialised.

    Raises:
        UserError: no bundle or engines, or an engine of another version, GPU or bundle.
    """
    manifest = read_manifest(bundle)
    folder = bundle / "engines" / flavour
    if not folder.is_dir():
        raise UserError(f"{bundle} has no {flavour} engines", f"shadowllm build {bundle} --engine {flavour}")
    pieces = ("dense",) if kind == "dense" else manifest.sparse_pieces
    gpu = gpu_capability()
    return manifest, {
        piece: check_sidecar(folder / f"{piece}.engine", flavour, version, compute_capability=gpu, files=manifest.files)
        for piece in pieces
    }
