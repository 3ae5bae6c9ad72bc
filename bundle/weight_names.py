"""Names of stored tensors, made from the canonical name of a matrix (see `models.weights`)."""

from __future__ import annotations

from shadowllm.models.sparsity import SparseLayers
from shadowllm.models.spec import ModelSpec

_INTEGERS, _SCALES, _TRANSPOSED, _COPY, _NORMS, _ERRORS = ".q", ".scales", ".T", "copy.", "down_norms", ".errors"
_WEIGHTING, _RESIDUAL = ".weighting", ".residual"


def integers(matrix: str) -> str:
    """The integers of a quantised matrix, uint8 ``(rows, bytes)``."""
    return matrix + _INTEGERS


def scales(matrix: str) -> str:
    """The scales of a quantised matrix, float32 ``(rows, blocks)``."""
    return matrix + _SCALES


def residual(matrix: str) -> str:
    """The residual of a matrix of nested integers, uint8 ``(rows, bytes)``; `low_bit_copy` names the rest of them."""
    return matrix + _RESIDUAL


def transposed(matrix: str) -> str:
    """The same matrix with rows and columns exchanged, as ``MatMulNBits`` reads ``o_proj`` and ``down_proj``."""
    return matrix + _TRANSPOSED


def low_bit_copy(matrix: str) -> str:
    """The low-bit copy of a matrix, with which neurons are scored, and the rest of a layer is computed."""
    return _COPY + matrix


def down_norms(layer: int) -> str:
    """``||w_down||`` of each neuron of a layer, stored with the low-bit copy; float32 ``(intermediate_size,)``."""
    return f"{_COPY}layers.{layer}.{_NORMS}"


def copy_errors(table: str) -> str:
    """How far the logits of the copy may be from the exact ones; float32 ``(vocab_size,)``, see `certificate`."""
    return f"{_COPY}{table}{_ERRORS}"


def copy_weighting(table: str) -> str:
    """The weighting of these errors; float32 ``(hidden_size,)``, see `certificate`."""
    return f"{_COPY}{table}{_WEIGHTING}"


def copied(spec: ModelSpec, layer: int) -> list[str]:
    """Return the canonical names of a layer's matrices that score neurons, in storage order: gate and up."""
    parts = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
    return [f"layers.{layer}.{part}.weight" for part in parts]


def copied_for_rest(spec: ModelSpec, layer: int) -> list[str]:
    """Return the canonical names of a layer's other matrices from which the rest is computed, in storage order."""
    parts = ("down", "q", "o") if spec.selects_heads else ("down",)
    return [f"layers.{layer}.{part}_proj.weight" for part in parts]


def copied_names(layers: SparseLayers, rest: bool) -> list[str]:
    """Return the canonical names of all matrices with a low-bit copy, in storage order.

    Args:
        rest: whether the rest of a layer is computed from the copy. Then down, q and o of each sparse layer and the
            output table are copied too.
    """
    found = []
    for layer in layers.layers:
        found += copied(layers.spec, layer) + (copied_for_rest(layers.spec, layer) if rest else [])
    return found + ([layers.spec.output_table] if rest else [])


def base(name: str) -> str:
    """Return the canonical name behind a name of a part of a matrix, transposed or not; others unchanged."""
    return matrix(name).removesuffix(_TRANSPOSED)


def matrix(name: str) -> str:
    """Like `base`, but a transposed matrix keeps its name."""
    if not is_part(name):
        return name
    for suffix in (_INTEGERS, _SCALES, _RESIDUAL):
        name = name.removesuffix(suffix)
    return name.removeprefix(_COPY)


def is_part(name: str) -> bool:
    """Whether the name was made by `integers`, `scales` or `residual`."""
    return name.endswith((_INTEGERS, _SCALES, _RESIDUAL))


def is_integers(name: str) -> bool:
    """Whether the name was made by `integers`."""
    return name.endswith(_INTEGERS)


def is_transposed(name: str) -> bool:
    """Whether the name was made with `transposed`."""
    return matrix(name).endswith(_TRANSPOSED)


def is_copy(name: str) -> bool:
    """Whether the name was made by `low_bit_copy`, `down_norms`, `copy_errors` or `copy_weighting`."""
    return name.startswith(_COPY)


def is_down_norms(name: str) -> bool:
    """Whether the name was made by `down_norms`."""
    return is_copy(name) and name.endswith(f".{_NORMS}")


def is_copy_errors(name: str) -> bool:
    """Whether the name was made by `copy_errors`."""
    return is_copy(name) and name.endswith(_ERRORS)


def is_copy_weighting(name: str) -> bool:
    """Whether the name was made by `copy_weighting`."""
    return is_copy(name) and name.endswith(_WEIGHTING)


def copy_source(name: str) -> str:
    """Return the canonical name behind a name of a copy; for norms, errors and weighting, their matrix."""
    return (
        name.removeprefix(_COPY)
        .removesuffix(_ERRORS)
        .removesuffix(_WEIGHTING)
        .replace(f".{_NORMS}", ".down_proj.weight")
    )


def rows_are_inputs(name: str) -> bool:
    """Whether the rows of a canonical matrix are its inputs; in all other matrices they are outputs."""
    return name.endswith(("o_proj.weight", "down_proj.weight"))


def is_quantised(name: str) -> bool:
    """Whether a canonical weight is a matrix; norms, biases and position embeddings stay floats."""
    return name.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight"))
