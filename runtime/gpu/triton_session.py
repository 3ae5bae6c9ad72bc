"""Runs a bundle on a GPU with PyTorch and the Triton kernels; a decode step is one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from shadowllm.bundle import selection_names as names
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.quantised_tensors import INSTEAD_OF_PLAIN_INTEGERS, CopyTensors, dequantised_predictor
from shadowllm.errors import UserError
from shadowllm.limits import LONGEST_DRAFT
from shadowllm.models.decoder import KVCache
from shadowllm.models.sparsity import UNITS, Budget, Rest, SparseLayers, Unit, check_neuron_budget
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.networks import scores
from shadowllm.runtime.generation.sampling import Sampling
from shadowllm.runtime.gpu.cuda_graph import WARMUP, captured, kernel_device
from shadowllm.runtime.gpu.device_sampling import DeviceSampler
from shadowllm.runtime.gpu.device_weights import merged, nested
from shadowllm.runtime.gpu.nested_rows import NestedRows
from shadowllm.runtime.gpu.pipelined_decode import SLOTS, PipelinedDecode
from shadowllm.runtime.gpu.rest import RestInputs, chosen_inside, rest_inputs
from shadowllm.runtime.gpu.selection import PerLayerSelection, UpfrontSelection, choose, device_copies
from shadowllm.runtime.gpu.triton_step import StepDecoder
from shadowllm.runtime.gpu.triton_verification import Verification
from shadowllm.runtime.inputs import budget_scalars, check_batch, check_tokens, check_verified, pad_prompts
from shadowllm.runtime.session import Decodes

# The cache grows by this many positions. Each growth needs a new CUDA graph.
CACHE_BLOCK = 1024


class TritonSession(PipelinedDecode):
    """A `VerifyingSession` and `SamplingSession` on one GPU.

    Prefill is dense. A decode step reads its tokens and positions on the device and writes the most probable next
    ones there, so greedy decoding only replays one CUDA graph. Budgets are counts that the kernels read, so a new
    budget writes only a few numbers.

    Args:
        spec: the model.
        weights: canonical tensors of one dtype, in which the session computes; or those of a bundle with nested
            integers. They are moved to the device at entering. Sessions that share float weights are given those from
            `device_weights.merged`.
        predictor: selects heads and neurons, upfront or per layer; None decodes dense.
        budget: initial fractions to keep.
        cache_block: number of positions by which the cache grows.
        copies: low-bit copy, by its names in a bundle; None makes it from the weights.
        rest: "shadow" if the copy is of all matrices, so that what is not active is computed from it.

    Attributes:
        decodes: "sparse", or "dense" without a predictor.

    Raises:
        UserError: no GPU.
    """

    longest_draft = LONGEST_DRAFT
    memory = None  # PyTorch manages the device memory

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        predictor: Predictor | None,
        budget: Budget | None = None,
        cache_block: int = CACHE_BLOCK,
        copies: Mapping[str, Tensor] | None = None,
        rest: Rest = "drop",
    ) -> None:
        self.spec = spec
        self.device = kernel_device()
        self._source, self._predictor, self._block = weights, predictor, cache_block
        self._copies, self._rest = copies, rest
        self._layers = SparseLayers(spec, predictor.dense_layers if predictor else spec.n_layers)
        self.decodes: Decodes = "sparse" if predictor else "dense"
        self._counts: dict[Unit, Tensor] = {
            unit: torch.zeros(self._layers.count, dtype=torch.int32, device=self.device) for unit in UNITS
        }
        self._scalars = {name: torch.zeros((), dtype=torch.int32, device=self.device) for name in names.SCALARS}
        self.set_budget(budget or Budget())

    @classmethod
    def open(cls, bundle: Path, kind: Literal["sparse", "dense"] = "sparse") -> TritonSession:
        """Make a session for a bundle.

        Raises:
            UserError: as the constructor, no bundle, a damaged file in it, or integer weights that are not nested.
        """
        # Imported here, because a session without a bundle does not need ONNX.
        from shadowllm.bundle.manifest import read_manifest
        from shadowllm.bundle.weights import map_copies, map_weights

        manifest = read_manifest(bundle)
        q = manifest.quantisation
        if q and not q.residual_bits:
            raise UserError(
                f"the triton backend does not run {manifest.weight_dtype} weights without a low-bit copy",
                INSTEAD_OF_PLAIN_INTEGERS,
            )
        kernel_device()  # fails here if there is no GPU, before gigabytes are hashed
        weights, predictor = map_weights(bundle, manifest)
        predictor = dequantised_predictor(predictor, q) if q else predictor
        if kind == "dense":
            return cls(manifest.spec, weights, None, rest=manifest.rest)
        copied = manifest.rest == "shadow" or predictor.kind == "quantized-shadow"
        copies = map_copies(bundle, manifest) if copied else None
        return cls(manifest.spec, weights, predictor, manifest.budget, copies=copies, rest=manifest.rest)

    def __enter__(self) -> Self:
        weights = merged(self.spec, self._source, self.device)
        matrices = nested(self._layers, self._source, self.device)
        self.dtype = weights["final_norm.weight"].dtype
        if self._predictor:
            # As in a bundle, a network has the model's dtype, and a ranking or a fit is float32.
            learned, tensors = self._predictor.learned, self._predictor.tensors
            kinds = {name: self.dtype if name in learned else torch.float32 for name in tensors}
            tensors = {name: tensor.to(self.device, kinds[name]) for name, tensor in tensors.items()}
            self._predictor = replace(self._predictor, tensors=tensors)
            rest = self._rest_inputs(self._predictor, weights, matrices) if self._rest == "shadow" else None
            self._per_layer = self._chooser(self._predictor, weights, rest) if self._predictor.per_layer else None
            self._decoder = StepDecoder(self._layers, weights, matrices, rest)
        else:
            self._decoder = StepDecoder(self._layers, weights, matrices)
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        tensors = (
            "_replay",
            "_replay_sampled",
            "_sampler",
            "_verifications",
            "_decoder",
            "cache",
            "_tokens",
            "_positions",
            "_logits",
            "_host_logits",
            "_slots",
        )
        self._forget(*tensors, "_source", "_predictor", "_copies", "_per_layer")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def reset(self, batch: int = 1) -> None:
        """See `Session.reset`. Nothing is allocated if ``batch`` is the same as before."""
        self._lengths = np.zeros(check_batch(batch), dtype=np.int64)
        if "cache" not in self.__dict__ or len(self._tokens) != batch:
            self._allocate(min(self._block, self.spec.max_seqlen))
        else:
            # Dense attention masks what an earlier text left, and NaN is still NaN behind a mask.
            for tensor in (*self.cache.keys, *self.cache.values):
                tensor.zero_()

    def set_budget(self, budget: Budget) -> None:
        """See `Session.set_budget`."""
        check_neuron_budget(self._predictor.kind if self._predictor else "", budget)
        counts, scalars = budget.counts(self._layers), budget_scalars(self.spec, budget, self._rest)
        self._budgets_set += 1
        for unit, on_device in self._counts.items():
            on_device.copy_(torch.from_numpy(counts[unit]))
        for name, number in scalars.items():
            self._scalars[name].fill_(number)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Session.prefill`."""
        padded = pad_prompts(prompts, len(self._lengths), self.spec)
        input_ids, positions, lengths = (torch.from_numpy(array).to(self.device) for array in padded)
        self._reserve(input_ids.shape[1])
        decoder = self._decoder
        decoder.begin(positions)
        x = decoder.embed(input_ids, positions)
        for layer in range(self.spec.n_layers):
            x = decoder.layer(layer, x, positions, self.cache)
        self._logits.copy_(decoder.logits(x[torch.arange(len(lengths), device=self.device), lengths - 1]))
        self._lengths[:] = padded[-1]
        return self._fetched()

    def verify(self, tokens: np.ndarray) -> np.ndarray:
        """See `VerifyingSession.verify`. Each number of tokens has its own CUDA graph, captured at its first use."""
        self._reserve(check_verified(tokens, self._lengths, self.spec))
        seqlen = tokens.shape[1]
        if seqlen not in self._verifications:
            self._verifications[seqlen] = Verification(self._decoder, self.cache, seqlen, self.device)
        logits = self._verifications[seqlen](tokens, self._lengths)
        self._lengths += seqlen
        return logits

    def _start(self, tokens: np.ndarray, steps: int) -> None:
        """Grow the cache for the steps, and write the first step's tokens and positions to the device."""
        self._reserve(check_tokens(tokens, self._lengths, self.spec, steps))
        self._tokens.copy_(torch.from_numpy(tokens)[:, None])
        self._positions.copy_(torch.from_numpy(self._lengths)[:, None])

    def _send(self, slot: int) -> None:
        self._slots[slot].copy_(self._tokens, non_blocking=True)
        if self._events:
            self._events[slot].record()

    def _received(self, slot: int) -> np.ndarray:
        if self._events:
            self._events[slot].synchronize()
        return self._slots[slot, :, 0].numpy().copy()

    def _fetched(self) -> np.ndarray:
        self._host_logits.copy_(self._logits)  # waits for the step
        return self._host_logits.numpy()

    def _reserve(self, length: int) -> None:
        """Grow the cache to at least ``length`` positions and keep its contents."""
        before = self.cache
        if length <= before.keys[0].shape[2]:
            return
        self._allocate(min(-(-length // self._block) * self._block, self.spec.max_seqlen))
        for old, new in ((before.keys, self.cache.keys), (before.values, self.cache.values)):
            for short, long in zip(old, new, strict=True):
                long[:, :, : short.shape[2]] = short

    @torch.no_grad()
    def _allocate(self, capacity: int) -> None:
        """Allocate everything whose size depends on batch or capacity, and capture the CUDA graph.

        The capture runs steps at position 0 of the cache, which is still empty.
        """
        self._forget("_replay", "_replay_sampled", "_verifications", "cache")
        batch = len(self._lengths)
        self.cache = KVCache.empty(self.spec, batch, capacity, self.dtype, self.device)
        self._tokens, self._positions = (
            torch.zeros((batch, 1), dtype=torch.int64, device=self.device) for _ in range(2)
        )
        self._logits = torch.zeros((batch, self.spec.vocab_size), device=self.device)
        cuda = self.device.type == "cuda"
        self._host_logits = torch.zeros(self._logits.shape, pin_memory=cuda)
        self._slots = torch.zeros((SLOTS, batch, 1), dtype=torch.int64, pin_memory=cuda)
        self._events = [torch.cuda.Event() for _ in self._slots] if cuda else []
        self._sampler = DeviceSampler(batch, capacity, self.device)
        self._replay = captured(self._step, self.device)
        self._replay_sampled: Callable[[], Any] | None = None
        self._verifications: dict[int, Verification] = {}

    def _forget(self, *names: str) -> None:
        """Wait for the GPU, then drop tensors and the CUDA graph."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for name in names:
            self.__dict__.pop(name, None)

    def decode_sampled(
        self, tokens: np.ndarray, steps: int, sampling: Sampling, uniforms: np.ndarray
    ) -> Iterator[np.ndarray] | None:
        """See `SamplingSession.decode_sampled`. Its CUDA graph is captured at the first use.

        The runs before the capture write cache entries after the texts, which nothing reads. If the model has no
        positions for them, the result is None.
        """
        self._start(tokens, steps)
        if self._replay_sampled is None:
            if self._lengths.max() + WARMUP >= self.spec.max_seqlen:
                return None
            self._replay_sampled = captured(partial(self._step, sampled=True), self.device)
            self._start(tokens, steps)
        self._sampler.begin(sampling, uniforms, self._lengths)
        return self._ahead(tokens, steps, self._replay_sampled)

    @torch.no_grad()
    def _step(self, sampled: bool = False) -> None:
        """Run one decode step, from the tokens and positions on the device to the next ones."""
        decoder = self._decoder
        decoder.begin(self._positions, self.cache.keys[0].shape[2])
        # A token that the sampler could not draw is -1. The host refuses it later.
        x = decoder.embed(self._tokens.clamp(min=0) if sampled else self._tokens, self._positions)
        for layer in range(self._layers.dense_layers):
            x = decoder.layer(layer, x, self._positions, self.cache)
        if self._predictor is None:
            logits = decoder.logits(x)
        else:
            logits = decoder.sparse_logits(x, self._positions, self.cache, self._per_layer or self.select(x))
        self._logits.copy_(logits[:, -1])
        if sampled:
            self._tokens.copy_(self._sampler.choose(self._logits, self._positions))
        else:
            self._tokens.copy_(self._logits.argmax(dim=-1, keepdim=True))
        self._positions += 1

    def select(self, hidden: Tensor) -> UpfrontSelection:
        """Run an upfront predictor with the current counts.

        Args:
            hidden: input of the first sparse layer, ``(batch, 1, hidden_size)`` on the device.
        """
        assert self._predictor is not None
        counts = self._counts
        found = zip(counts, scores(self._predictor, hidden.flatten(0, 1)), strict=True)
        chosen = {unit: choose(self.spec, unit, one.mean(dim=0).float(), counts[unit]) for unit, one in found}
        return UpfrontSelection(chosen, counts)

    def _rest_inputs(
        self, predictor: Predictor, weights: Mapping[str, Tensor], matrices: Mapping[str, NestedRows]
    ) -> RestInputs:
        copies = self._copies or CopyTensors(self._source, final_squares=predictor.final_squares)
        return rest_inputs(self._layers, copies, predictor, weights, matrices, self._scalars)

    def _chooser(
        self, predictor: Predictor, weights: Mapping[str, Tensor], rest: RestInputs | None
    ) -> PerLayerSelection:
        copies = None
        if predictor.kind == "quantized-shadow" and rest is None:
            source = self._copies or CopyTensors(weights)
            copies = device_copies(self._layers, source, weights, self.device)
        inside = rest.inside if rest else chosen_inside(predictor, rest=False)
        return PerLayerSelection(self.spec, predictor, self._counts, copies, inside)
