"""The manifest: the contents of a bundle, and the checks of its files before use."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Never, TypedDict

from shadowllm.bundle import op_domain
from shadowllm.bundle.quantisation import Quantisation, bundle_format
from shadowllm.draft_config import TunedDrafts
from shadowllm.errors import UserError, in_one_line
from shadowllm.json_types import check_type
from shadowllm.limits import check_path
from shadowllm.models.sparsity import Budget, Fractions, Rest, SparseLayers
from shadowllm.models.spec import ModelSpec

NAME = "manifest.json"
# Version 2 is still read. It differs in bundles with integer weights and a low-bit copy, which was stored beside them.
SCHEMA_VERSION, OLDER_VERSION = 3, 2
DATA_FILE = "model.onnx.data"
BODY, BODY_ALL_HEADS = BODIES = "body", "body_all_heads"  # graphs of the sparse layers
# Not in the checksum: what `tune` and `export` write later, what a user may write by hand, and hashes of files.
CHANGEABLE = {"budgets", "allocation", "drafting", "dense", "validation", "files"}
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
Empty = dict[str, Never]


class FractionsRecord(TypedDict):
    """Entries of the manifest's ``budgets`` that all bundles have."""

    heads: Fractions
    neurons: Fractions


class BudgetRecord(FractionsRecord, total=False):
    """Type of the manifest's ``budgets``: the fields of a `Budget`."""

    shortlist: int | None
    rest: Rest | None
    certify: bool


class TrainingRecord(TypedDict, total=False):
    """Optional entries of the manifest's ``predictor`` that readers use. Training may record more."""

    criterion: str
    text: str
    text_seed: int
    tokens: int
    held_out_tokens: int
    fired: tuple[float, ...]
    held_out: dict[str, dict[str, float]]


class PredictorRecord(TrainingRecord):
    """Type of the manifest's ``predictor``."""

    kind: str
    rank: int


class ErrorRecord(TypedDict):
    """Errors of one output in the manifest's ``validation``."""

    output: str
    max_abs: float
    max_rel: float
    greedy_agreement: float | None


class ValidationRecord(TypedDict):
    """Type of the manifest's ``validation``, if the bundle was validated."""

    tolerance: float
    selection_agreement: float
    errors: tuple[ErrorRecord, ...]


class AllocationRecord(TypedDict):
    """Type of the manifest's ``allocation``, if the budgets were tuned."""

    target: dict[str, float]
    measured: dict[str, float]


class DraftTimesRecord(TypedDict):
    """Type of what ``tune --lossless`` measured of the best drafts."""

    acceptance: float
    speedup: float
    draft_ms: float
    verify_ms: float
    dense_ms: float


class DraftingRecord(TypedDict):
    """Type of the manifest's ``drafting``, if ``tune --lossless`` chose it."""

    budget: BudgetRecord
    draft_length: int
    measured: DraftTimesRecord


class _Contents(TypedDict):
    """Types that readers rely on, stricter than those of `Manifest`."""

    dtype: Literal["float32", "float16", "bfloat16"]
    selector: Literal["upfront", "per-layer"]
    rest: Rest
    budgets: BudgetRecord
    predictor: PredictorRecord
    validation: ValidationRecord | Empty
    allocation: AllocationRecord | Empty
    drafting: DraftingRecord | Empty


@dataclass(frozen=True)
class Manifest:
    """Contents of ``manifest.json``.

    Attributes:
        model: name the model was exported under.
        spec: sizes and options of the model.
        dtype: of weights and activations ("float32", "float16", "bfloat16").
        weight_dtype: of matrices, if it differs from ``dtype`` ("int8", "int6", "int4"); else None.
        dense_layers: leading layers that stay dense.
        selector: "upfront": the graph ``predictor`` selects, and the indices are inputs of ``body``;
            "per-layer": each layer of ``body`` selects for itself.
        rest: "shadow" if the bundle has a low-bit copy of all matrices of the sparse layers and of the output table;
            "drop" if units that are not active can only be left out.
        budgets: the default `Budget` as a dict; fractions are lists if layers differ.
        predictor: kind, criterion and training record.
        base_fingerprint: `Weights.fingerprint` of the model the predictor was trained on, with its adapter if any.
        adapter_fingerprint: SHA-256 of the LoRA adapter that was merged into the weights; None without one.
        op_domain_version: version of the custom ops in the graphs.
        tools: versions of the packages that wrote the bundle.
        allocation: target and measurements of the budget tuning; empty if the budgets were given.
        drafting: budget and length of the drafts of lossless decoding, and what was measured of them on the machine
            that chose them; empty if they were not chosen.
        dense: by layer, the reason why it is dense, or should be, at these budgets.
        validation: errors against the reference, measured after the export.
        files: SHA-256 of each file, by its path inside the bundle.
    """

    model: str
    spec: ModelSpec
    dtype: str
    dense_layers: int
    budgets: dict[str, Any]
    predictor: dict[str, Any]
    base_fingerprint: str
    op_domain_version: int
    tools: dict[str, str]
    files: dict[str, str]
    weight_dtype: str | None = None
    adapter_fingerprint: str | None = None
    selector: str = "upfront"
    rest: Rest = "drop"
    allocation: dict[str, Any] = field(default_factory=dict)
    drafting: dict[str, Any] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)

    @property
    def itemsize(self) -> float:
        """Bytes of a stored matrix element; for integers, including the share of a scale."""
        return self.quantisation.itemsize if self.quantisation else ITEMSIZE[self.dtype]

    @property
    def itemsize_beside_copy(self) -> float:
        """The same for an element of a row whose low-bit copy is read too, see `Quantisation`."""
        return self.quantisation.itemsize_beside_copy if self.quantisation else self.itemsize

    @property
    def sparse_layers(self) -> SparseLayers:
        """The layers whose units are selected."""
        return SparseLayers(self.spec, self.dense_layers)

    @property
    def sparse_pieces(self) -> tuple[str, ...]:
        """The graphs of a sparse decode step, in execution order."""
        return ("stem", BODY) if self.selector == "per-layer" else ("stem", "predictor", BODY)

    @property
    def has_body_all_heads(self) -> bool:
        """Whether there is a graph of the sparse layers for budgets with all heads."""
        return f"{BODY_ALL_HEADS}.onnx" in self.files

    @property
    def budget(self) -> Budget:
        """The default budget."""
        return Budget(**self.budgets)

    @property
    def draft_budget(self) -> Budget:
        """The budget of the drafts of lossless decoding."""
        return Budget(**self.drafting["budget"]) if self.drafting else self.budget

    @property
    def tuned_drafts(self) -> TunedDrafts | None:
        """What was measured of the drafts of lossless decoding; None if they were not tuned."""
        if not self.drafting:
            return None
        found: dict[str, float] = self.drafting["measured"]
        draft, verify = found["draft_ms"] / found["dense_ms"], found["verify_ms"] / found["dense_ms"]
        return TunedDrafts(self.drafting["draft_length"], found["acceptance"], draft, verify)

    @property
    def quantisation(self) -> Quantisation | None:
        """How integer weights are stored; None if the weights are floats.

        Raises:
            UserError: the weight type is unknown, or does not go with `rest`.
        """
        return bundle_format(self.weight_dtype, self.rest)

    def digests(self, *names: str) -> dict[str, str]:
        """Return the SHA-256 of some of the bundle's files.

        Raises:
            UserError: the manifest does not list one of them.
        """
        for name in names:
            if name not in self.files:
                raise UserError(f"the manifest does not list {name}", "export the model again")
        return {name: self.files[name] for name in names}

    @property
    def checksum(self) -> str:
        """SHA-256 of what the graphs and weights were made for."""
        fixed = {name: value for name, value in self._to_dict().items() if name not in CHANGEABLE}
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` atomically.

        Raises:
            OSError: it cannot be written, for example to a full disk; the error names the folder.
        """
        data = {"schema_version": SCHEMA_VERSION} | self._to_dict() | {"checksum": self.checksum}
        temporary = folder / f".{NAME}.partial"
        try:
            temporary.write_text(json.dumps(data, indent=2) + "\n")
            os.replace(temporary, folder / NAME)
        except OSError as error:
            error.filename = str(folder)  # users know the bundle, not the temporary file
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def _to_dict(self) -> dict[str, Any]:
        return vars(self) | {"spec": self.spec.to_dict()}


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read and check ``manifest.json``. `verify_files` checks the files it names.

    Raises:
        UserError: there is no bundle, its manifest is not readable, was changed or has another schema version, or
            a path leaves the bundle.
    """
    path, remedy = check_path("the bundle", folder) / NAME, "export the model again"
    if not path.is_file():
        raise UserError(f"{folder} is not a bundle (no {NAME})", "make one with: shadowllm export MODEL OUT")
    try:
        data = json.loads(path.read_text())
        version, checksum = data.pop("schema_version"), data.pop("checksum", None)  # earlier versions wrote none
        check_type(version, int, "its schema version")
        manifest = _manifest(data) if version in (SCHEMA_VERSION, OLDER_VERSION) else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({in_one_line(error)})", remedy) from error
    except UserError as error:
        raise UserError(f"{path} is damaged ({error.problem})", remedy) from error
    if manifest is None:
        known = f"{OLDER_VERSION} and {SCHEMA_VERSION}"
        raise UserError(f"{path} has schema version {version}, this program reads {known}", remedy)
    if version == OLDER_VERSION and manifest.weight_dtype and manifest.rest == "shadow":
        raise UserError(
            f"{folder} has a low-bit copy beside its {manifest.weight_dtype} weights, not inside them", remedy
        )
    for name in manifest.files:
        _check_inside(path, name)
    if DATA_FILE not in manifest.files:
        raise UserError(f"{path} is damaged (it does not list {DATA_FILE})", remedy)
    if checksum not in (None, manifest.checksum):
        raise UserError(f"{path} is damaged (its checksum is that of other contents)", remedy)
    if manifest.op_domain_version != op_domain.VERSION:
        ops = f"version {manifest.op_domain_version} of the sparse ops, and this program has {op_domain.VERSION}"
        raise UserError(f"{folder} has {ops}", remedy)
    return manifest


def _manifest(data: dict[str, Any]) -> Manifest:
    """Make a manifest from JSON data, after checking its types."""
    # Names in bundles of earlier versions.
    data["selector"] = {"ahead": "upfront", "in place": "per-layer"}.get(data["selector"], data["selector"])
    data.pop("head_unit", None)  # it is in the spec now; here it was always a query head
    spec = ModelSpec.from_dict(data["spec"])
    check_type(data, Manifest, "the manifest")
    manifest = Manifest(**data | {"spec": spec})
    check_type(vars(manifest), _Contents, "the manifest")
    if not 0 < manifest.dense_layers < spec.n_layers:
        raise ValueError(f"{manifest.dense_layers} dense layers of {spec.n_layers}")
    fired = manifest.predictor.get("fired", [])
    if fired and (len(fired) != manifest.sparse_layers.count or not all(0 <= share <= 1 for share in fired)):
        raise ValueError(f"{len(fired)} shares of neurons that fired")
    if manifest.drafting:
        measured = manifest.drafting["measured"]
        times = (measured["draft_ms"], measured["verify_ms"], measured["dense_ms"])
        if not 0 <= measured["acceptance"] <= 1 or min(times) <= 0:
            raise ValueError(f"measurements of drafts that cannot be: {measured}")
    _ = manifest.quantisation  # raises if the type is unknown
    for budget in (manifest.budget, manifest.draft_budget):
        budget.counts(manifest.sparse_layers)
    return manifest


def _check_inside(manifest: Path, name: str) -> None:
    path, remedy = PurePosixPath(name), "do not use this bundle: export the model again"
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise UserError(f"{manifest} names {name!r}, which lies outside the bundle", remedy)
    if not path.parts or "\0" in name:
        raise UserError(f"{manifest} names {name!r}, which is no file", remedy)


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """Compare files of a bundle with the SHA-256 their manifest gives.

    Links are followed, because every file in the hub's cache is a link. The hash alone decides what may be read.

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
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
