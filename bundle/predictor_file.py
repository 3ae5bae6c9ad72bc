"""A trained predictor on disk: one safetensors file with its record in the header."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shadowllm.errors import UserError
from shadowllm.models.spec import ModelSpec

Kind = Literal["static", "shadow", "layerwise", "quantized-shadow", "relu"]
FORMAT = "shadowllm-predictor"
VERSION = 1
FINAL_SQUARES = "final.squares"


@dataclass(frozen=True)
class Predictor:
    """Scores for every head and neuron of a model's sparse layers.

    Attributes:
        kind: "static" (a ranking), "shadow" (one network, and the ranking it started from), "layerwise"
            (one network per layer for neurons, a linear map of the layer's input for heads) or
            "quantized-shadow" (the same map for heads, a low-bit copy of the weights for neurons; the
            copy is made when a bundle is written) or "relu" (the same map for heads; neurons need no predictor, as
            those whose gate is zero contribute nothing).
        n_sparse, dense_layers, n_heads, intermediate_size, hidden_size: sizes of the model it scores.
        tensors: float32. All kinds: ``heads.scores (n_sparse, n_heads)`` and ``neurons.scores
            (n_sparse, intermediate_size)``. A shadow adds ``trunk.weight (rank, hidden_size)``,
            ``trunk.bias (rank,)``, ``heads.weight (n_sparse * n_heads, rank)``, ``heads.bias``,
            ``neurons.weight (n_sparse * intermediate_size, rank)`` and ``neurons.bias``. Per-layer kinds
            add ``layers.heads.weight (n_sparse * n_heads, hidden_size)`` and ``layers.heads.bias``; other
            kinds may have these too, for evaluation. Layerwise also adds its networks, with the rows
            of all layers concatenated: ``layers.trunk.weight (n_sparse * rank, hidden_size)``,
            ``layers.trunk.bias``, ``layers.neurons.weight (n_sparse * intermediate_size, rank)`` and
            ``layers.neurons.bias``. All kinds may have ``final.squares (hidden_size,)``, see `final_squares`.
        base_fingerprint: `Weights.fingerprint` of the model it was trained on.
        record: training settings and results; JSON types.
        normed: whether the networks see the layer norm of their input, see `networks.scores`; PowerInfer's do not.

    Raises:
        UserError: tensors are missing or have other shapes.
    """

    kind: Kind
    n_sparse: int
    dense_layers: int
    n_heads: int
    intermediate_size: int
    hidden_size: int
    tensors: dict[str, Tensor]
    base_fingerprint: str
    record: dict[str, Any] = field(default_factory=dict)
    normed: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"unknown predictor kind {self.kind!r}", f"known: {', '.join(get_args(Kind))}")
        found = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        fit = self._fit_shapes()
        optional = fit if self.per_layer or fit.keys() & found else {}
        if FINAL_SQUARES in found:
            optional[FINAL_SQUARES] = (self.hidden_size,)
        if found != self._shapes() | optional:
            raise UserError("the predictor's tensors do not fit its description", "train it again")

    @property
    def rank(self) -> int:
        """Width of a network's trunk; 0 if there is no network."""
        if "layers.trunk.weight" in self.tensors:
            return len(self.tensors["layers.trunk.weight"]) // self.n_sparse
        return len(self.tensors["trunk.weight"]) if "trunk.weight" in self.tensors else 0

    @property
    def per_layer(self) -> bool:
        """Whether each layer selects for itself, instead of one selection at the first sparse layer."""
        return self.kind in ("layerwise", "quantized-shadow", "relu")

    @property
    def final_squares(self) -> Tensor | None:
        """Mean squares of the inputs of the output table, float32 ``(hidden_size,)``; None without calibration text.

        The certificate of a shortlist is calibrated on them, see `certificate.best_weighting`.
        """
        return self.tensors.get(FINAL_SQUARES)

    def rounded(self, dtype: torch.dtype) -> Predictor:
        """Return the predictor as in a graph of this type: its network is rounded, and stays float32."""
        networks = {name: self.tensors[name].to(dtype).float() for name in self.learned}
        return replace(self, tensors=self.tensors | networks)

    @property
    def is_random(self) -> bool:
        """Whether the ranking is random: right in shape and cost, for measuring speed only."""
        return self.record.get("ranking") == "random"

    @property
    def learned(self) -> tuple[str, ...]:
        """Names of the network's tensors. Training changes them, and a bundle stores them like weights."""
        return tuple(self._network_shapes())

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        rankings: dict[str, tuple[int, ...]] = {
            "heads.scores": (self.n_sparse, self.n_heads),
            "neurons.scores": (self.n_sparse, self.intermediate_size),
        }
        return rankings | self._network_shapes()

    def _network_shapes(self) -> dict[str, tuple[int, ...]]:
        heads, neurons = self.n_sparse * self.n_heads, self.n_sparse * self.intermediate_size
        sizes = {
            "shadow": {
                "trunk": (self.rank, self.hidden_size),
                "heads": (heads, self.rank),
                "neurons": (neurons, self.rank),
            },
            "layerwise": {
                "layers.trunk": (self.n_sparse * self.rank, self.hidden_size),
                "layers.neurons": (neurons, self.rank),
            },
        }.get(self.kind, {})
        return {f"{name}.weight": size for name, size in sizes.items()} | {
            f"{name}.bias": size[:1] for name, size in sizes.items()
        }

    def _fit_shapes(self) -> dict[str, tuple[int, ...]]:
        heads = self.n_sparse * self.n_heads
        return {"layers.heads.weight": (heads, self.hidden_size), "layers.heads.bias": (heads,)}

    def check_base(self, spec: ModelSpec, fingerprint: str) -> None:
        """Check that the predictor belongs to a model.

        Raises:
            UserError: it was trained on other weights, with another adapter or activation, or for other sizes.
        """
        mine = (self.dense_layers + self.n_sparse, self.n_heads, self.intermediate_size, self.hidden_size)
        theirs = (spec.n_layers, spec.n_heads, spec.intermediate_size, spec.hidden_size)
        if mine != theirs or self.base_fingerprint != fingerprint:
            raise UserError(
                "predictor of another model: its base weights, adapter or activation differ from the ones given",
                "train a predictor for this model, or give the model and the --activation that it was trained with",
            )

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        description = {
            "format": FORMAT,
            "version": VERSION,
            "kind": self.kind,
            "n_sparse": self.n_sparse,
            "dense_layers": self.dense_layers,
            "n_heads": self.n_heads,
            "intermediate_size": self.intermediate_size,
            "hidden_size": self.hidden_size,
            "base_fingerprint": self.base_fingerprint,
            "record": self.record,
        } | ({} if self.normed else {"normed": False})
        write_tensors(path, self.tensors, description)

    @classmethod
    def load(cls, path: Path) -> Predictor:
        """Read a file that `save` wrote.

        Raises:
            UserError: the file is missing, damaged, or not a predictor.
        """
        tensors, description = read_tensors(path, FORMAT, VERSION)
        try:
            return cls(tensors=tensors, **description)
        except TypeError as error:
            raise UserError(f"{path} is not a readable predictor ({error})", "train it again") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
    """Write tensors and a JSON description as one safetensors file, atomically.

    Raises:
        UserError: the folder does not exist.
        OSError: the file cannot be written, for example to a full disk.
    """
    path = Path(path)
    description = description | {"sha256": _digest(tensors)}
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except FileNotFoundError as error:
        raise UserError(f"cannot write {path} ({error.strerror})", "name a file in a folder that exists") from error
    os.close(handle)
    try:
        save_file(
            {key: tensor.contiguous() for key, tensor in tensors.items()},
            name,
            metadata={"shadowllm": json.dumps(description, sort_keys=True)},
        )
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files private
        os.replace(name, path)
    except SafetensorError as error:
        # The Rust library reports system errors only as text.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    finally:
        Path(name).unlink(missing_ok=True)


def read_tensors(path: Path, kind: str, version: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `write_tensors` wrote; return tensors and description, without the format's fields.

    Raises:
        UserError: the file is missing, damaged, of another kind or of another version, or holds NaN or infinity.
    """
    if not Path(path).is_file():
        raise UserError(f"no such file: {path}", "check the name")
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("shadowllm", "{}"))
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or no safetensors file", "make it again") from error
    if not isinstance(description, dict) or description.pop("format", None) != kind:
        raise UserError(f"{path} is not a {kind} file", "give the file that shadowllm wrote")
    if description.pop("version", None) != version:
        raise UserError(f"{path} was written by another version of shadowllm", "make it again")
    if description.pop("sha256", None) != _digest(tensors):
        raise UserError(f"{path} is damaged: its checksum does not match", "make it again")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"tensor {name} of {path} holds NaN or infinity", "make it again")
    return tensors, description


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()
