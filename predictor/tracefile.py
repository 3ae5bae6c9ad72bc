"""The result of calibration: token windows, statistics and, up to a size limit, the traces.

A score is stored as one byte: its logarithm, relative to the largest score of its token and layer, with 16
steps per octave. Training needs only rankings and ratios. Steps of 4% keep both, in a quarter of the bytes of
float32. If the traces exceed the limit, they are not stored, and training computes them again. So the file
stays small even if the text is long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shadowllm.bundle.predictor_file import read_tensors, write_tensors
from shadowllm.errors import UserError
from shadowllm.models.sparsity import SparseLayers, layer_units
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.calibration import Windows
from shadowllm.predictor.linear_fit import LinearFit
from shadowllm.predictor.traces import CHUNK_TOKENS, Chunk, Tracer, scored_positions, windows_per_chunk
from shadowllm.progress import Advance, no_progress

FORMAT = "shadowllm-traces"
VERSION = 3
LIMIT_BYTES = 1 << 30
SAMPLE_TOKENS = 65536
AT_ONCE_TOKENS = 128  # traced at once: the traces of more tokens would be larger than the weights of a small model
STEPS = 16  # per octave
OCTAVES = 255 / STEPS


@dataclass(frozen=True)
class Traces:
    """The result of calibrating one model.

    Attributes:
        criterion, dense_layers: settings of the tracer.
        base_fingerprint: `Weights.fingerprint` of the model.
        windows: the tokens, int64.
        statistics: mean relative importance of each unit over the training tokens. Each token and layer is
            scaled to a mean of 1. ``heads (n_sparse, n_heads)`` and ``neurons (n_sparse,
            intermediate_size)``, float32.
        final_squares: mean squares of the inputs of the output table over the training tokens, float32
            ``(hidden_size,)``. A certificate of the largest logit is calibrated on them.
        fit: linear map from a layer's input to the importance of its heads, as `LinearFit.solve` returns it.
            Empty if none was fitted.
        stored: ``hidden`` float32, and uint8 codes ``heads`` and ``neurons``, of all tokens, or of the held-out ones.
            Held-out windows come first. Empty if those of all tokens exceed the limit.
    """

    criterion: str
    dense_layers: int
    base_fingerprint: str
    windows: Windows
    statistics: dict[str, Tensor]
    final_squares: Tensor
    fit: dict[str, Tensor]
    stored: dict[str, Tensor]

    def __post_init__(self) -> None:
        for measured in ({"squares": self.final_squares}, self.statistics, self.fit):
            if any(not tensor.isfinite().all() for tensor in measured.values()):
                raise UserError(
                    "the model computes NaN or infinite numbers on this text", "it is damaged, or its training diverged"
                )

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {"train": self.windows.train, "held_out": self.windows.held_out, "final_squares": self.final_squares}
        tensors |= {f"statistics.{key}": value for key, value in self.statistics.items()}
        tensors |= {f"fit.{key}": value for key, value in self.fit.items()}
        tensors |= {f"stored.{key}": value for key, value in self.stored.items()}
        write_tensors(
            path,
            tensors,
            {
                "format": FORMAT,
                "version": VERSION,
                "criterion": self.criterion,
                "dense_layers": self.dense_layers,
                "source": self.windows.source,
                "seed": self.windows.seed,
                "base_fingerprint": self.base_fingerprint,
            },
        )

    @classmethod
    def load(cls, path: Path) -> Traces:
        """Read a file that `save` wrote.

        Raises:
            UserError: the file is missing or damaged, or has no traces.
        """
        tensors, description = read_tensors(path, FORMAT, VERSION)
        try:
            seed = description.pop("seed", 0)  # earlier versions wrote none; 0 is the default
            windows = Windows(tensors["train"], tensors["held_out"], description.pop("source"), seed)
            return cls(
                windows=windows,
                statistics=_part(tensors, "statistics."),
                final_squares=tensors["final_squares"],
                fit=_part(tensors, "fit."),
                stored=_part(tensors, "stored."),
                **description,
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not a readable trace file ({error})", "calibrate again") from error

    def training(self, tracer: Tracer | None, order: Tensor) -> Iterator[Chunk]:
        """Yield traces of the training windows in a given order of indices, see `Chunk.scored`.

        A tracer computes them again. Without one, the stored traces are used.

        Raises:
            UserError: there is no tracer, and the traces were not stored.
        """
        return self._chunks(self.windows.train, len(self.windows.held_out), tracer, order, CHUNK_TOKENS)

    def held_out(self, tracer: Tracer | None) -> Iterator[Chunk]:
        """Yield traces of the held-out windows, as `training` does."""
        order = torch.arange(len(self.windows.held_out))
        return self._chunks(self.windows.held_out, 0, tracer, order, AT_ONCE_TOKENS)

    def _chunks(
        self, windows: Tensor, first: int, tracer: Tracer | None, order: Tensor, tokens: int
    ) -> Iterator[Chunk]:
        seqlen = windows.shape[1]
        if tracer is not None:
            for chunk in tracer.chunks(windows[order], tokens):
                yield chunk.scored(self.criterion, seqlen)
            return
        kept = len(self.stored.get("hidden", ())) // seqlen
        if len(order) and int(order.max()) + first >= kept:
            raise UserError("the traces were not kept", "give the model, so that training can trace anew")
        # The same windows per chunk as the tracer's, so that training steps mix texts in the same way.
        for part in (order + first).split(windows_per_chunk(seqlen, tokens)):
            rows = (part[:, None] * seqlen + torch.arange(seqlen)).flatten()
            chunk = Chunk(
                self.stored["hidden"][rows], decode(self.stored["heads"][rows]), decode(self.stored["neurons"][rows])
            )
            yield chunk.scored(self.criterion, seqlen)


def calibrate(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    windows: Windows,
    fingerprint: str,
    *,
    criterion: str = "l2norm",
    dense_layers: int = 1,
    limit_bytes: int = LIMIT_BYTES,
    fit_heads: bool = True,
    keep_train: bool = True,
    advance: Advance = no_progress,
) -> Traces:
    """Trace the windows once, for the statistics and, if they fit in ``limit_bytes``, for training.

    If the traces do not fit, training computes them again. Then `SAMPLE_TOKENS` training tokens are enough for
    the statistics, because the windows are in random order.

    Args:
        weights: canonical tensors, float32 when they are read.
        fingerprint: `Weights.fingerprint` of the model.
        fit_heads: also fit the linear map of the heads. Its moments take ``8 * n_sparse * hidden_size ** 2`` bytes.
        keep_train: also store the traces of the training windows. A predictor that is not trained needs only those of
            the held-out windows.
        advance: called with the number of tokens finished since the last call.

    Raises:
        UserError: no such criterion.
    """
    tracer = Tracer(spec, weights, criterion, dense_layers)
    tokens = torch.cat([windows.held_out, windows.train])
    storable = tokens.numel() * _token_bytes(tracer.sparse_layers) <= limit_bytes
    kept = (tokens if keep_train else windows.held_out).numel() if storable else 0
    stored = _allocate(tracer.sparse_layers, kept)
    sums: dict[str, Any] = {"heads": 0.0, "neurons": 0.0}
    n_sparse, seqlen = tracer.sparse_layers.count, tokens.shape[1]
    fits = [LinearFit(n_sparse, spec.hidden_size, spec.n_heads) for _ in range(2)] if fit_heads else []
    squares, start = torch.zeros(spec.hidden_size), 0
    sampled = windows.train if storable else windows.train[: max(1, SAMPLE_TOKENS // windows.train.shape[1])]
    for split in (windows.held_out, sampled):
        for chunk in tracer.chunks(split, AT_ONCE_TOKENS):
            end = start + len(chunk.hidden)
            if end <= kept:
                stored["hidden"][start:end] = chunk.hidden
                stored["heads"][start:end], stored["neurons"][start:end] = encode(chunk.heads), encode(chunk.neurons)
            scored = chunk.scored(criterion, seqlen)
            if split is sampled:
                sums = {unit: total + relative(getattr(scored, unit)).sum(dim=0) for unit, total in sums.items()}
                assert chunk.final is not None
                squares += chunk.final.square().sum(dim=0)
            if fits:
                fits[split is not sampled].add(scored.inputs["heads"], scored.heads)
            advance(end - start)
            start = end
    advance(tokens.numel() - start)
    means = {unit: total / (len(sampled) * scored_positions(criterion, seqlen)) for unit, total in sums.items()}
    fit = fits[0].solve(fits[1]) if fits else {}
    return Traces(criterion, dense_layers, fingerprint, windows, means, squares / sampled.numel(), fit, stored)


def relative(scores: Tensor) -> Tensor:
    """Divide scores by the mean of their token and layer. If all are zero, they stay zero."""
    tiny = torch.finfo(torch.float32).tiny
    return scores / scores.mean(dim=-1, keepdim=True).clamp_min(tiny)


def encode(scores: Tensor) -> Tensor:
    """Return uint8 codes of scores, relative to the largest of each row. Code 0 is about 16 octaves below, or less."""
    tiny = torch.finfo(torch.float32).tiny
    peak = scores.amax(dim=-1, keepdim=True).clamp_min(tiny)
    # In place, because the scores of a chunk are large.
    steps = (scores / peak).clamp_min_(tiny).log2_().mul_(STEPS).add_(255)
    return steps.round_().clamp_(0, 255).to(torch.uint8)


def decode(codes: Tensor) -> Tensor:
    """Return float32 scores of codes, relative to the largest of each row. Code 0 becomes the score 0."""
    return torch.exp2((codes.float() - 255) / STEPS).where(codes > 0, 0)


def _token_bytes(layers: SparseLayers) -> int:
    return 4 * layers.spec.hidden_size + layers.count * sum(layer_units(layers.spec).values())


def _allocate(layers: SparseLayers, tokens: int) -> dict[str, Tensor]:
    """Return empty traces of a number of tokens."""
    if not tokens:
        return {}
    return {"hidden": torch.empty(tokens, layers.spec.hidden_size)} | {
        unit: torch.empty(tokens, layers.count, width, dtype=torch.uint8)
        for unit, width in layer_units(layers.spec).items()
    }


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
