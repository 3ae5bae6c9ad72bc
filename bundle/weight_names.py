"""Names of stored tensors, made from the canonical name of a matrix (see `models.weights`)."""

from __future__ import annotations

from shadowllm.models.spec import ModelSpec

_INTEGERS, _SCALES, _TRANSPOSED, _COPY, _NORMS = ".q", ".scales", ".T", "copy.", "down_norms"


def integers(matrix: str) -> str:
    """The integers of a quantised matrix, uint8 ``(rows, bytes)``."""
    return matrix + _INTEGERS


def scales(matrix: str) -> str:
    """The scales of a quantised matrix, float32 ``(rows, blocks)``."""
    return matrix + _SCALES


def scales_beside(integers_name: str) -> str:
    """The name of the scales that belong to integers."""
    return integers_name.removesuffix(_INTEGERS) + _SCALES


def transposed(matrix: str) -> str:
    """The same matrix with rows and columns exchanged, as ``MatMulNBits`` reads ``o_proj`` and ``down_proj``."""
    return matrix + _TRANSPOSED


def low_bit_copy(matrix: str) -> str:
    """The low-bit copy of a matrix, with which a quantised shadow scores neurons."""
    return _COPY + matrix


def down_norms(layer: int) -> str:
    """``||w_down||`` of each neuron of a layer, stored with the low-bit copy; float32 ``(intermediate_size,)``."""
    return f"{_COPY}layers.{layer}.{_NORMS}"


def copied(spec: ModelSpec, layer: int) -> list[str]:
    """Return the canonical names of a layer's matrices with a low-bit copy, in storage order."""
    parts = ("gate_proj", "up_proj") if spec.gated else ("up_proj",)
    return [f"layers.{layer}.{part}.weight" for part in parts]


def base(name: str) -> str:
    """Return the canonical name behind a name of integers or scales, transposed or not; others unchanged."""
    for suffix in (_INTEGERS, _SCALES, _TRANSPOSED):
        name = name.removesuffix(suffix)
    return name


def is_integers(name: str) -> bool:
    """Whether the name was made by `integers`."""
    return name.endswith(_INTEGERS)


def is_scales(name: str) -> bool:
    """Whether the name was made by `scales`."""
    return name.endswith(_SCALES)


def is_transposed(name: str) -> bool:
    """Whether the name was made with `transposed`."""
    return name.removesuffix(_INTEGERS).removesuffix(_SCALES).endswith(_TRANSPOSED)


def is_copy(name: str) -> bool:
    """Whether the name was made by `low_bit_copy` or `down_norms`."""
    return name.startswith(_COPY)


def is_down_norms(name: str) -> bool:
    """Whether the name was made by `down_norms`."""
    return is_copy(name) and name.endswith(f".{_NORMS}")


def copy_source(name: str) -> str:
    """Return the canonical name behind a `low_bit_copy` name; for `down_norms`, the matrix of the norms."""
    return name.removeprefix(_COPY).replace(f".{_NORMS}", ".down_proj.weight")


def rows_are_inputs(name: str) -> bool:
    """Whether the rows of a canonical matrix are its inputs; in all other matrices they are outputs."""
    return name.endswith(("o_proj.weight", "down_proj.weight"))


def is_quantised(name: str) -> bool:
    """Whether a canonical weight is a matrix; norms, biases and position embeddings stay floats."""
    return name.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight"))
