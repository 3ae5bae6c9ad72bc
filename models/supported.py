"""What is supported, by family: for ``shadowllm families`` and for the table in docs/families.md."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args, get_type_hints

from shadowllm.models.files.gguf_architectures import ARCHITECTURES
from shadowllm.models.registry import FAMILIES, REFUSED
from shadowllm.models.rope import NEEDED
from shadowllm.models.spec import ModelSpec


@dataclass(frozen=True)
class Row:
    """What is supported of one family.

    Attributes:
        family: ``model_type`` in config.json.
        models: well-known models.
        differences: how they differ from Llama.
        heads: whether heads can be selected, or all are always active.
        gguf: whether GGUF files of the family are read.
        engines: whether TensorRT engines are built.
    """

    family: str
    models: str
    differences: str
    heads: bool
    gguf: bool
    engines: bool


def rows() -> list[Row]:
    """Return a row for each family, in alphabetical order."""
    in_gguf = {architecture.family for architecture in ARCHITECTURES.values()}
    return [
        Row(name, family.models, family.differences, family.heads, name in in_gguf, engines=family.heads)
        for name, family in sorted(FAMILIES.items())
    ]


def describe() -> dict[str, Any]:
    """Return everything as plain JSON types."""
    return {
        "families": [asdict(row) for row in rows()],
        "rope_scalings": list(NEEDED),
        "activations": list(get_args(get_type_hints(ModelSpec)["activation"])),
        "refused": REFUSED,
    }


def markdown() -> str:
    """Return the table of families for the documentation."""
    head = "| `model_type` | models | beside Llama's layers | heads | GGUF | engines |\n|---|---|---|---|---|---|\n"
    return head + "".join(
        f"| `{row.family}` | {row.models} | {row.differences} | {'selected' if row.heads else 'all active'} "
        f"| {_yes(row.gguf)} | {_yes(row.engines)} |\n"
        for row in rows()
    )


def _yes(value: bool) -> str:
    return "yes" if value else "no"
