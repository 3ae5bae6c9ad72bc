"""Runs a bundle on ONNX Runtime (CPU); buffers are bound once, so the KV cache is not copied per token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from shadowllm.limits import LONGEST_DRAFT
from shadowllm.models.sparsity import Budget, Unit
from shadowllm.runtime.inputs import check_batch, check_rewind, check_tokens, check_verified, pad_prompts
from shadowllm.runtime.ort.decode_step import DecodeStep
from shadowllm.runtime.ort.kv_cache import KVCache
from shadowllm.runtime.ort.loaded_bundle import DENSE, Kind, LoadedBundle, Plan
from shadowllm.runtime.ort.prompt_step import run_prompt
from shadowllm.runtime.ort.verification import Verification
from shadowllm.runtime.session import Decodes, Prefill


class OrtSession:
    """A `VerifyingSession` over ONNX Runtime.

    "dense" always runs ``dense.onnx``. "sparse" prefills with it and decodes with ``stem``, ``predictor`` and
    ``body``. "auto" does the same, unless the budget saves less than the predictor costs: then its steps are dense.

    Dense steps and `verify` run ``dense.onnx`` if its weights are packed or the native ops run it, else ``stem`` and
    ``body`` with everything active (see `LoadedBundle.all_active`).

    With ``prefill="sparse"``, these graphs also prefill, with everything active, and ``dense.onnx`` is not opened.
    Integer weights then need less memory, and their prompts take longer.

    Every sequence of a batch has its own selection.

    16-bit bundles are computed in float32, because ONNX Runtime's CPU kernels have no 16-bit arithmetic. Only the
    native ops read 16-bit rows.

    Args:
        bundle: folder written by ``shadowllm export``.
        kind: which graphs decode.
        threads: threads of each operator; None is ONNX Runtime's default.
        profile: whether to record the seconds of each part of the last step in ``step_seconds``.
        native: whether to run the custom ops with the native library, if it is built. Otherwise their function
            bodies run.
        prefill: which graphs prefill.
        exact: whether integer layers read float32 inputs, and not inputs rounded to 8 bits. This is slow, and meant
            for validation.
        prepack: whether a sparse session of float weights also keeps ONNX Runtime's packed copy of them for dense
            steps. Prefill and `verify` are then as fast as in a dense session, and the weights are in memory twice.

    Attributes:
        cache: float32 ``(batch, n_kv_heads, capacity, head_dim)`` by "layer.key" and "layer.value".
        selection: indices of the last step, by unit, int32 ``(n_sparse, batch, n_units)``, padded with -1; empty if the
            budget is decoded dense.
        step_seconds: seconds of each part of the last step; None without ``profile``.

    Raises:
        UserError: no bundle, a damaged file, a wrong number of threads, a dense session that is to prefill with sparse
            graphs, or a graph this ONNX Runtime cannot run.
    """

    memory = None
    longest_draft = LONGEST_DRAFT

    def __init__(
        self,
        bundle: Path,
        kind: Kind = "auto",
        threads: int | None = None,
        profile: bool = False,
        native: bool = True,
        exact: bool = False,
        prefill: Prefill = "dense",
        prepack: bool = False,
    ) -> None:
        self._bundle = LoadedBundle(bundle, kind, threads, native, exact, prefill, prepack)
        self.manifest, self.spec = self._bundle.manifest, self._bundle.spec
        self.step_seconds: dict[str, float] | None = {} if profile else None
        self._steps: dict[Plan, DecodeStep] = {}
        self._verifications: dict[int, Verification] = {}
        self._neurons: np.ndarray | None = None  # those of the last step, if it was sparse
        self.set_budget(self.manifest.budget)

    @property
    def selection(self) -> dict[Unit, np.ndarray]:
        """See the class."""
        return {} if self.decodes == "dense" else self._step().selections.indices

    @property
    def decodes(self) -> Decodes:
        """See `Session.decodes`."""
        return self._plan.decodes

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs of a decode step at the current budget, in their order."""
        return self._bundle.pieces(self._plan)

    @property
    def cache(self) -> dict[str, np.ndarray]:
        """See the class."""
        return self._cache.arrays

    @property
    def fired(self) -> list[float] | None:
        """See `Session.fired`."""
        if self.manifest.predictor["kind"] != "relu" or self._neurons is None:
            return None
        shares: list[float] = (self._neurons >= 0).mean(axis=(1, 2)).tolist()
        return shares

    def __enter__(self) -> Self:
        self._bundle.load(self._plan)
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        self._steps, self._verifications = {}, {}
        self._bundle.close()
        self._cache = KVCache(self.spec, 0)

    def reset(self, batch: int = 1) -> None:
        """See `Session.reset`."""
        self._batch, self._neurons = check_batch(batch), None
        self._lengths = np.zeros(batch, dtype=np.int64)
        self._cache = KVCache(self.spec, batch)
        self._reserve(1)

    def set_budget(self, budget: Budget) -> None:
        """See `Session.set_budget`."""
        self._plan = self._bundle.plan(budget)
        self._numbers = self._bundle.numbers(budget, self.decodes)
        if self._plan in self._steps:
            self._steps[self._plan].selections.ask([self._numbers] * self._batch)
        elif self._plan == DENSE and not (self._bundle.all_active or self._bundle.fast_dense):
            self._bundle.pack()
            self._verifications = {}  # they hold the former graph

    @property
    def recomputed(self) -> np.ndarray | None:
        """See `Session.recomputed`; None if the bundle has no low-bit copy of the output table."""
        known = self.manifest.rest == "shadow" and self.decodes == "sparse"
        return self._step().selections.recomputed if known else None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Session.prefill`."""
        input_ids, positions, lengths = pad_prompts(prompts, self._batch, self.spec)
        self._reserve(input_ids.shape[1])
        logits = run_prompt(self._bundle, input_ids, positions, lengths - 1, self._cache.buffers())
        self._lengths[:], self._neurons = lengths, None
        return logits

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Session.decode`."""
        self._reserve(check_tokens(tokens, self._lengths, self.spec))
        step = self._step()
        logits = step(tokens, self._lengths)
        if self.step_seconds is not None:
            self.step_seconds = dict(step.seconds)
        self._lengths += 1
        self._neurons = step.selections.indices["neurons"] if self.decodes == "sparse" else None
        return logits

    def decode_greedy(self, tokens: np.ndarray, steps: int) -> None:
        """Return None, see `Session.decode_greedy`: every step needs the host."""

    def verify(self, tokens: np.ndarray) -> np.ndarray:
        """See `VerifyingSession.verify`."""
        self._reserve(check_verified(tokens, self._lengths, self.spec))
        seqlen = tokens.shape[1]
        if seqlen not in self._verifications:
            self._verifications[seqlen] = Verification(self._bundle, self._batch, seqlen, self._cache.buffers())
        logits = self._verifications[seqlen](tokens, self._lengths)
        self._lengths += seqlen
        self._neurons = None
        return logits

    def rewind(self, lengths: np.ndarray) -> None:
        """See `VerifyingSession.rewind`."""
        self._lengths = check_rewind(lengths, self._lengths)

    def _reserve(self, length: int) -> None:
        """Grow the cache to at least ``length`` positions and keep its contents."""
        if self._cache.reserve(length, self._lengths):  # steps are bound to the former arrays
            self._steps, self._verifications = {}, {}

    def _step(self) -> DecodeStep:
        """The decode step at the current budget, with its buffers bound."""
        if self._plan not in self._steps:
            step = DecodeStep(self._bundle, self._plan, self._batch, self._cache.buffers())
            step.selections.ask([self._numbers] * self._batch)
            self._steps[self._plan] = step
        return self._steps[self._plan]
