"""The manifest: what a bundle holds, and the checks a file passes before it is used."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Never, TypedDict

from shadowllm.bundle.quantisation import WEIGHT_DTYPES, Quantisation
from shadowllm.errors import UserError
from shadowllm.json_types import check_type
from shadowllm.models.sparsity import Budget, Fractions, SparseLayers
from shadowllm.models.spec import ModelSpec

NAME = "manifest.json"
SCHEMA_VERSION = 2
DATA_FILE = "model.onnx.data"
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


Empty = dict[str, Never]


class BudgetRecord(TypedDict):
    """Of the manifest's ``budgets``."""

    heads: Fractions
    neurons: Fractions


class TrainingRecord(TypedDict, total=False):
    """Of the manifest's ``predictor``: what readers make use of where training left it, among other things."""

    criterion: str
    tokens: int
    held_out: dict[str, dict[str, float]]


class PredictorRecord(TrainingRecord):
    """Of the manifest's ``predictor``."""

    kind: str
    rank: int


class ErrorRecord(TypedDict):
    """Of an output in the manifest's ``validation``."""

    output: str
    max_abs: float
    max_rel: float
    greedy_agreement: float | None


class ValidationRecord(TypedDict):
    """Of the manifest's ``validation``, where there was one."""

    tolerance: float
    selection_agreement: float
    errors: tuple[ErrorRecord, ...]


class AllocationRecord(TypedDict):
    """Of the manifest's ``allocation``, where budgets were tuned."""

    target: dict[str, float]
    measured: dict[str, float]


class _Contents(TypedDict):
    """What readers rely on beyond the types of `Manifest`."""

    dtype: Literal["float32", "float16", "bfloat16"]
    selector: Literal["upfront", "per-layer"]
    budgets: BudgetRecord
    predictor: PredictorRecord
    validation: ValidationRecord | Empty
    allocation: AllocationRecord | Empty


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``.

    Attributes:
        model: name the model was exported under.
        spec: its sizes and options.
        dtype: of weights and activations ("float32", "float16", "bfloat16").
        weight_dtype: of matrices, where it is another one ("int8", "int4"); else None.
        dense_layers: leading layers that stay dense.
        selector: "upfront": ``predictor`` chooses, and indices are inputs of ``body``; "per-layer": ``body``
            chooses by itself, layer by layer.
        budgets: default fractions, ``{"heads": ..., "neurons": ...}``; lists where layers differ.
        predictor: kind, criterion and training record.
        base_fingerprint: SHA-256 of the checkpoint the predictor was trained on.
        op_domain_version: version of the custom ops in the graphs.
        tools: versions of the packages that wrote the bundle.
        allocation: what the budgets were chosen for and what was measured then; empty where they were given.
        dense: why layers are dense, or better were, at these budgets; by layer.
        validation: errors against the reference, as measured after the export.
        files: SHA-256 per file, by its path inside the bundle.
    """

    model: str
    spec: ModelSpec
    dtype: str
    dense_layers: int
    budgets: dict[str, Fractions]
    predictor: dict[str, Any]
    base_fingerprint: str
    op_domain_version: int
    tools: dict[str, str]
    files: dict[str, str]
    weight_dtype: str | None = None
    selector: str = "upfront"
    allocation: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)

    @property
    def itemsize(self) -> float:
        """Bytes of an element of a matrix as it is stored; of integers, its share of a scale included."""
        return self.quantisation.itemsize if self.quantisation else ITEMSIZE[self.dtype]

    @property
    def sparse_layers(self) -> SparseLayers:
        """The layers whose units are chosen."""
        return SparseLayers(self.spec, self.dense_layers)

    @property
    def sparse_pieces(self) -> tuple[str, ...]:
        """The graphs of a sparse decode step, in their order."""
        return ("stem", "body") if self.selector == "per-layer" else ("stem", "predictor", "body")

    @property
    def quantisation(self) -> Quantisation | None:
        """How integer weights are stored; None where they are floats.

        Raises:
            UserError: a weight type this program does not know.
        """
        if self.weight_dtype is None:
            return None
        if self.weight_dtype not in WEIGHT_DTYPES:
            raise UserError(f"the bundle has weights of type {self.weight_dtype!r}", "export the model again")
        return WEIGHT_DTYPES[self.weight_dtype]

    def digests(self, *names: str) -> dict[str, str]:
        """SHA-256 of some of the bundle's files.

        Raises:
            UserError: the manifest does not list one.
        """
        for name in names:
            if name not in self.files:
                raise UserError(f"the manifest does not list {name}", "export the model again")
        return {name: self.files[name] for name in names}

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``, replacing an older one in a single step."""
        data = {"schema_version": SCHEMA_VERSION} | {k: v for k, v in vars(self).items() if k != "spec"}
        temporary = folder / f".{NAME}.partial"
        temporary.write_text(json.dumps(data | {"spec": self.spec.to_dict()}, indent=2) + "\n")
        os.replace(temporary, folder / NAME)


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``; the files it names are checked by `verify_files`.

    Raises:
        UserError: no bundle there, an unreadable manifest, another schema version, or a path that
            leaves the bundle.
    """
    path = folder / NAME
    if not path.is_file():
        raise UserError(f"{folder} is not a bundle (no {NAME})", "make one with: shadowllm export MODEL OUT")
    remedy = "export the model again"
    try:
        data = json.loads(path.read_text())
        version = data.pop("schema_version")
        manifest = _manifest(data) if version == SCHEMA_VERSION else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error})", remedy) from error
    except UserError as error:
        raise UserError(f"{path} is damaged ({error.problem})", remedy) from error
    if manifest is None:
        raise UserError(f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}", remedy)
    for name in manifest.files:
        _check_inside(path, name)
    return manifest


def _manifest(data: dict[str, Any]) -> Manifest:
    """A manifest of JSON types, once they are those that its readers rely on."""
    # Bundles of earlier versions.
    data["selector"] = {"ahead": "upfront", "in place": "per-layer"}.get(data["selector"], data["selector"])
    data.pop("head_unit", None)  # now of the spec; where it stood here it was always a query head
    spec = ModelSpec.from_dict(data["spec"])
    check_type(data, Manifest, "the manifest")
    manifest = Manifest(**data | {"spec": spec})
    check_type(vars(manifest), _Contents, "the manifest")
    if not 0 < manifest.dense_layers < spec.n_layers:
        raise ValueError(f"{manifest.dense_layers} dense layers of {spec.n_layers}")
    _ = manifest.quantisation  # refuses a type it does not know
    Budget(**manifest.budgets).counts(manifest.sparse_layers)
    return manifest


def _check_inside(manifest: Path, name: str) -> None:
    path = PurePosixPath(name)
    remedy = "do not use this bundle: export the model again"
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(f"{manifest} names {name!r}, which lies outside the bundle", remedy)
    if not path.parts or "\0" in name:
        raise UserError(f"{manifest} names {name!r}, which is no file", remedy)


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compare files of a bundle with the SHA-256 their manifest gives.

    Links are followed, as in the hub's cache, where every file is one: what may be read, the hash alone decides.

    Raises:
        UserError: a file is missing or has other contents.
    """
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing from the bundle, or is no file", "export the model again")
        if file_hash(path) != expected:
            raise UserError(f"{path} is damaged: its SHA-256 is not the one in {NAME}", "export the model again")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
