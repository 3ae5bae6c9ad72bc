"""Rotary position embedding (Su et al., arXiv 2104.09864), read from a Hugging Face config.

``transformers`` computes the frequencies of every scaling. Its float32 values are kept as they are: at position 40,000,
one other rounding of a frequency moves an angle by 0.002.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from shadowllm.errors import UserError, foreign_reader

# The parameters that a scaling needs, by Hugging Face's names.
NEEDED = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "dynamic": ("rope_theta", "factor"),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings"),
    "longrope": ("rope_theta", "short_factor", "long_factor", "original_max_position_embeddings"),
    "llama3": (
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
# Parameters that are positive numbers if they are given, beside the needed ones.
OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "partial_rotary_factor")
LISTS = ("short_factor", "long_factor")  # one number for each pair of dimensions
CHECK_CONFIG = "check the RoPE parameters in its config.json"


@dataclass(frozen=True)
class RopeSpec:
    """Which pairs of a head's dimensions are rotated, and how fast.

    Dimension i forms a pair with dimension ``i + head_dim / 2``. The first pairs are rotated, and the others are not.
    If a model rotates a part of each head, the rows of q and k are reordered for that (see `rotated_first`).

    Attributes:
        frequencies: angle per position of each rotated pair; empty in layers without RoPE.
        amplitude: factor of cosine and sine of the rotated pairs ("attention factor" of yarn and longrope).
    """

    frequencies: tuple[float, ...]
    amplitude: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "frequencies", tuple(self.frequencies))  # JSON has no tuples
        for value in (*self.frequencies, self.amplitude):
            if not is_positive(value):
                raise UserError(f"unsupported model: {value!r} is no frequency or factor of RoPE", CHECK_CONFIG)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Return the angle per position of each pair, float32 ``(head_dim / 2,)``; 0 if it is not rotated."""
        rest = head_dim // 2 - len(self.frequencies)
        return np.pad(np.array(self.frequencies, dtype=np.float32), (0, rest))

    def amplitudes(self, head_dim: int) -> np.ndarray:
        """Return the factor of each pair's cosine and sine, float32 ``(head_dim / 2,)``; 1 if it is not rotated."""
        return np.where(np.arange(head_dim // 2) < len(self.frequencies), np.float32(self.amplitude), np.float32(1))

    def tables(self, head_dim: int, max_seqlen: int) -> tuple[np.ndarray, np.ndarray]:
        """Return cosine and sine per position, float32 ``(max_seqlen, head_dim / 2)`` each."""
        # float32 angles as in transformers, so that both agree at long positions too.
        angles = np.arange(max_seqlen, dtype=np.float32)[:, None] * self.inverse_frequencies(head_dim)
        factors = self.amplitudes(head_dim)
        return np.cos(angles) * factors, np.sin(angles) * factors


def rotated_first(head_dim: int, rotary_dim: int) -> list[int] | None:
    """Return the order of a head's rows in which `RopeSpec` rotates the first ``rotary_dim`` stored dimensions.

    Stored dimension i is rotated with ``i + rotary_dim / 2``. Each half of the new order has one half of the rotated
    dimensions and one half of the others. Both q and k are reordered, so their products do not change.

    Returns:
        The stored row of each row; None if all dimensions are rotated.
    """
    if rotary_dim == head_dim:
        return None
    half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    rotated, others = list(range(rotary_dim)), list(range(rotary_dim, head_dim))
    return rotated[:half] + others[:rest] + rotated[half:] + others[rest:]


def rotary_dim(config: Any, layer_type: str | None) -> int:
    """Return how many dimensions of a head are rotated, from ``partial_rotary_factor``."""
    _, parameters = _checked(config, layer_type)
    return int(config.head_dim * (parameters.get("partial_rotary_factor") or 1.0))


def read_rope(config: Any, layer_type: str | None = None) -> RopeSpec:
    """Read the RoPE parameters of a config, in their old (``rope_scaling``) or new (``rope_parameters``) spelling.

    The scalings ``dynamic`` and ``longrope`` depend on the length of the text. The result is right for texts of up to
    `position_limit` tokens.

    Args:
        config: a Hugging Face config with ``head_dim``.
        layer_type: the type of layer whose parameters are read, if the config has several types.

    Raises:
        UserError: the scaling is unknown, or a parameter is missing or not usable.
    """
    scaling, parameters = _checked(config, layer_type)
    rotated = config.head_dim * (parameters.get("partial_rotary_factor") or 1.0)
    if int(rotated) % 2 or int(rotated) < 2 or config.head_dim % 2:
        raise UserError(
            f"unsupported model: {int(rotated)} of {config.head_dim} dimensions of a head are rotated: "
            "RoPE rotates pairs",
            "check head_dim and partial_rotary_factor in its config.json",
        )
    frequencies, amplitude = _frequencies(config, layer_type, scaling, parameters, int(rotated))
    return RopeSpec(tuple(frequencies), float(amplitude))


def position_limit(config: Any, layer_type: str | None) -> int | None:
    """Return the longest text for which the frequencies of `read_rope` are right; None if they always are."""
    scaling, parameters = _checked(config, layer_type)
    if scaling == "longrope":  # longer texts use other frequencies
        return int(parameters["original_max_position_embeddings"])
    return int(config.max_position_embeddings) if scaling == "dynamic" else None


def trained_positions(config: Any, layer_type: str | None) -> int:
    """Return ``max_position_embeddings``, or what ``yarn`` extends it to, if the config still has the number before."""
    scaling, parameters = _checked(config, layer_type)
    trained: int = config.max_position_embeddings
    if scaling != "yarn":
        return trained
    return max(trained, int(parameters["factor"] * parameters["original_max_position_embeddings"]))


def changes_beyond(config: Any, layer_type: str | None) -> bool:
    """Return whether texts beyond ``max_position_embeddings`` are meant to be read, with other frequencies."""
    return _checked(config, layer_type)[0] == "dynamic"


def _checked(config: Any, layer_type: str | None) -> tuple[str, dict[str, Any]]:
    """Return the scaling and its parameters."""
    # Moves some keys from the top level of the config into rope_parameters, as transformers does to build the model.
    config.standardize_rope_params()
    found = config.rope_parameters
    parameters = dict(found if layer_type is None else found[layer_type])
    scaling = parameters.get("rope_type", "default")
    if not isinstance(scaling, str) or scaling not in NEEDED:
        raise UserError(f"RoPE scaling {scaling!r} is not supported", f"supported: {', '.join(NEEDED)}")
    _check(scaling, parameters)
    return scaling, parameters


def _check(scaling: str, parameters: dict[str, Any]) -> None:
    missing = [name for name in NEEDED[scaling] if parameters.get(name) is None]
    if missing:
        raise UserError(
            f"RoPE scaling {scaling!r} needs {missing[0]}", "config.json does not give it: correct it there"
        )
    for name in (*NEEDED[scaling], *OPTIONAL):
        value = parameters.get(name)
        values = value if name in LISTS and isinstance(value, list) else [value]
        if value is not None and not all(map(is_positive, values)):
            raise UserError(f"unsupported model: RoPE {name} must be a positive number, got {value!r}", CHECK_CONFIG)
    if scaling == "llama3" and not parameters["high_freq_factor"] > parameters["low_freq_factor"]:
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        raise UserError(
            f"unsupported model: RoPE high_freq_factor {high} is not above low_freq_factor {low}", CHECK_CONFIG
        )
    if (parameters.get("partial_rotary_factor") or 1) > 1:
        raise UserError("unsupported model: RoPE partial_rotary_factor is above 1", CHECK_CONFIG)


def _frequencies(
    config: Any, layer_type: str | None, scaling: str, parameters: dict[str, Any], rotated: int
) -> tuple[list[float], float]:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if scaling == "default":
        powers = torch.arange(0, rotated, 2, dtype=torch.float32) / rotated
        return (1.0 / (parameters["rope_theta"] ** powers)).tolist(), 1.0
    with foreign_reader(f"transformers cannot compute RoPE scaling {scaling!r}", CHECK_CONFIG):
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[scaling](config, layer_type=layer_type)
    return frequencies.tolist(), amplitude


def is_positive(value: object) -> bool:
    """Return whether a value from a config is a positive, finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
