"""The reference session: plain PyTorch in float32, with the selection applied as masks.

It reads all weights and sets to zero what is not selected. It is slow and exact, and the other backends are
compared with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.weights import read_weights
from shadowllm.errors import UserError
from shadowllm.limits import LONGEST_DRAFT, check_threads
from shadowllm.models.decoder import Decoder, KVCache
from shadowllm.models.sparse_decoder import Certificate, CopyDecoder, SparseDecoder
from shadowllm.models.sparsity import UNITS, Budget, Rest, SparseLayers, Unit, check_neuron_budget
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.networks import scores
from shadowllm.predictor.per_layer import per_layer_scores
from shadowllm.predictor.topk import active_mask
from shadowllm.runtime.inputs import check_batch, check_rewind, check_tokens, check_verified, pad_prompts
from shadowllm.runtime.session import Decodes

# Selections as bool ``(n_sparse, R, n_units)``: R is 1 if the sequences share one, and otherwise the batch.
Masks = dict[Unit, Tensor]


class _Closed(Mapping[str, Tensor]):
    """The weights of a session that was left."""

    def __getitem__(self, name: str) -> Tensor:
        raise UserError("the session was closed", "open the bundle again")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


class TorchSession:
    """A `VerifyingSession` over the reference decoder.

    Args:
        spec: the model.
        weights: canonical float32 tensors.
        predictor: scores heads and neurons; None decodes dense.
        budget: initial fractions to keep.
        dense_weights: weights for prefill, dense steps and dense layers, if integer weights are rounded
            differently there; None uses ``weights``.
        copies: values of `low_bit_copies` for the rest of the layers and the logits outside of a shortlist.
        certificate: of the largest logit, for budgets with ``certify``.

    Attributes:
        decodes: "sparse", or "dense" without a predictor.
        chosen: the predictor's selection in the last step; empty if it was dense.
        forced: a selection to use instead of ``chosen``, to compare backends under the same selection.
        shares_selection: whether the sequences of a batch share one selection, as on a GPU. It is chosen by the mean of
            their scores. By default each has its own.
        recomputed: see `Session.recomputed`.
    """

    longest_draft = LONGEST_DRAFT
    memory = None
    step_seconds = None

    def __init__(
        self,
        spec: ModelSpec,
        weights: Mapping[str, Tensor],
        predictor: Predictor | None,
        budget: Budget | None = None,
        dense_weights: Mapping[str, Tensor] | None = None,
        copies: Mapping[str, Tensor] | None = None,
        certificate: Certificate | None = None,
    ) -> None:
        self.spec, self._certificate = spec, certificate
        self._copy = CopyDecoder(spec, weights, copies) if copies else None
        self.recomputed: np.ndarray | None = None
        self.chosen: Masks = {}
        self.forced: Masks | None = None
        self.shares_selection = False
        self._per_layer = (
            per_layer_scores(predictor.kind, spec, weights, predictor, self._copy)
            if predictor and predictor.per_layer
            else None
        )
        self._weights, self._predictor = weights, predictor
        self._layers = SparseLayers(spec, predictor.dense_layers if predictor else spec.n_layers)
        self.decodes: Decodes = "sparse" if predictor else "dense"
        self.set_budget(budget or Budget())
        self._decoder = Decoder(spec, weights if dense_weights is None else dense_weights)
        self.reset()

    @classmethod
    def open(
        cls, bundle: Path, kind: Literal["sparse", "dense"] = "sparse", threads: int | None = None
    ) -> TorchSession:
        """Make the reference session of a bundle, with the bundle's weights.

        Args:
            bundle: folder written by ``shadowllm export``.
            kind: whether decode steps are sparse or dense.
            threads: threads of PyTorch's operators in the whole process; None is PyTorch's default.

        Raises:
            UserError: no bundle, or a damaged file in it.
        """
        if threads is not None:
            torch.set_num_threads(check_threads(threads))
        manifest = read_manifest(bundle)
        read = read_weights(bundle, manifest)
        if kind == "dense":
            return cls(manifest.spec, dict(read.dense), None)
        read = read.kept()
        copies = read.copies
        return cls(manifest.spec, read.sparse, read.predictor, manifest.budget, read.dense, copies, read.certificate)

    @property
    def fired(self) -> list[float] | None:
        """See `Session.fired`."""
        if self._per_layer is None or not self._per_layer.gate_first or not self.chosen:
            return None
        shares: list[float] = self.chosen["neurons"].double().mean(dim=(1, 2)).tolist()
        return shares

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._weights, self._copy = _Closed(), None
        self._decoder = Decoder(self.spec, self._weights)

    def reset(self, batch: int = 1) -> None:
        """See `Session.reset`."""
        self._lengths, self.chosen = np.zeros(check_batch(batch), dtype=np.int64), {}
        self.cache = KVCache.empty(self.spec, batch, 0)

    def set_budget(self, budget: Budget) -> None:
        """See `Session.set_budget`."""
        counts = budget.counts(self._layers)
        check_neuron_budget(self._predictor.kind if self._predictor else "", budget)
        sparse = self._predictor is not None  # a dense session takes the budget of a sparse one
        self._rest: Rest = budget.rest_with(self._copy is not None) if sparse else "drop"
        self._shortlist, self._certify = budget.shortlist if sparse else None, budget.certify
        self._counts: dict[Unit, list[int]] = {unit: counts[unit].tolist() for unit in UNITS}

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Session.prefill`."""
        padded = pad_prompts(prompts, len(self._lengths), self.spec)
        input_ids, positions, lengths = map(torch.from_numpy, padded)
        self._reserve(input_ids.shape[1])
        logits = self._decoder(input_ids, positions, self.cache)
        self._lengths[:], self.chosen = lengths, {}
        return logits[torch.arange(len(lengths)), lengths - 1].numpy()

    @torch.no_grad()
    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Session.decode`."""
        self._reserve(check_tokens(tokens, self._lengths, self.spec))
        input_ids, positions = torch.from_numpy(tokens)[:, None], torch.from_numpy(self._lengths.copy())[:, None]
        logits = (
            self._decoder(input_ids, positions, self.cache)
            if self._predictor is None
            else self._sparse_step(input_ids, positions, self._predictor)
        )
        self._lengths += 1
        return logits[:, -1].numpy()

    def decode_greedy(self, tokens: np.ndarray, steps: int) -> None:
        """Return None, see `Session.decode_greedy`: every step needs the host."""

    @torch.no_grad()
    def verify(self, tokens: np.ndarray) -> np.ndarray:
        """See `VerifyingSession.verify`."""
        self._reserve(check_verified(tokens, self._lengths, self.spec))
        positions = self._lengths[:, None] + np.arange(tokens.shape[1])
        logits = self._decoder(torch.from_numpy(tokens), torch.from_numpy(positions), self.cache)
        self._lengths += tokens.shape[1]
        self.chosen = {}
        return logits.numpy()

    def rewind(self, lengths: np.ndarray) -> None:
        """See `VerifyingSession.rewind`."""
        self._lengths = check_rewind(lengths, self._lengths)

    def _sparse_step(self, input_ids: Tensor, positions: Tensor, predictor: Predictor) -> Tensor:
        x = self._stem(input_ids, positions)
        self.chosen = self._select(predictor, x)
        selection = self.forced or self.chosen

        def input_hook(layer: int, unit: Unit, normed: Tensor) -> None:
            if self._per_layer is not None:
                found, row = self._per_layer.scores(layer, unit, normed), self._layers.row(layer)
                if unit == "neurons" and self._per_layer.gate_first:
                    self.chosen[unit][row] = self._shared(found.ne(0).float()).ne(0)
                else:
                    scores = self._shared(found)
                    self.chosen[unit][row] = active_mask(self.spec, unit, scores, self._counts[unit][row])

        def select(layer: int, unit: Unit, _activation: Tensor) -> Tensor:
            return selection[unit][self._layers.row(layer)][:, None]

        body = SparseDecoder(
            self.spec,
            self._weights,
            select,
            input_hook,
            self._copy,
            self._rest,
            self._shortlist,
            self._certificate if self._certify else None,
        )
        for layer in self._layers.layers:
            x = body.layer(layer, x, positions, self.cache)
        logits = body.logits(x)
        assert body.recomputed is not None
        self.recomputed = body.recomputed[:, -1].numpy()
        return logits

    def _stem(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        x = self._decoder.embed(input_ids, positions)
        for layer in range(self._layers.dense_layers):
            x = self._decoder.layer(layer, x, positions, self.cache)
        return x

    def _select(self, predictor: Predictor, hidden: Tensor) -> Masks:
        tokens = hidden.shape[:2]
        found = (self._shared(s.unflatten(0, tokens)).unbind(1) for s in scores(predictor, hidden.flatten(0, 1)))
        return {
            unit: torch.stack(
                [active_mask(self.spec, unit, row, n) for row, n in zip(rows, self._counts[unit], strict=True)]
            )
            for unit, rows in zip(UNITS, found, strict=True)
        }

    def _shared(self, scores: Tensor) -> Tensor:
        """Scores ``(batch, seqlen, ...)`` of each selection, ``(R, ...)``: the mean of the tokens that share it."""
        mean = scores.mean(dim=1)
        return mean.mean(dim=0, keepdim=True) if self.shares_selection else mean

    def _reserve(self, length: int) -> None:
        grown = KVCache.empty(self.spec, len(self._lengths), length)
        for old, new in ((self.cache.keys, grown.keys), (self.cache.values, grown.values)):
            for before, after in zip(old, new, strict=True):
                after[:, :, : before.shape[2]] = before[:, :, :length]
        self.cache = grown
