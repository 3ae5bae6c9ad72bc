"""The keys in a GGUF file that describe its architecture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shadowllm.errors import UserError
from shadowllm.limits import LARGEST

USE_SAFETENSORS = "use the safetensors checkpoint of this model"
# READ are used for every architecture; HARMLESS do not change the computation.
READ = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
)
HARMLESS = ("rope.scaling.finetuned", "attention.causal", "tensor_data_layout", "use_parallel_residual")
# Keys that would change the model with any value except this neutral one, unless the architecture reads them.
NEUTRAL = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.sliding_window": 0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.scale": 0.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
}


class Keys:
    """The keys of the architecture, without its name as prefix."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str) -> None:
        prefix = self.prefix = f"{architecture}."
        self._values = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def size(self, key: str, default: int | None = None, most: int = LARGEST) -> int:
        """Return a whole number above 0.

        Raises:
            UserError: it is missing and there is no default, it is above ``most``, or it is something else.
        """
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise UserError(says(f"{self.prefix}{key}", value), f"it must be one number; {USE_SAFETENSORS}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number; raises as `size` does."""
        value = self._values.get(key, default)
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise UserError(says(f"{self.prefix}{key}", value), USE_SAFETENSORS)
        return float(value)

    def factor(self, key: str, default: float | None = None) -> float:
        """Return a number above 0; raises as `size` does. As in llama.cpp, 0 counts as missing."""
        value = self.number(key, default) or default
        if value is None or value <= 0:
            raise UserError(says(f"{self.prefix}{key}", self.get(key)), f"it must be above 0; {USE_SAFETENSORS}")
        return value

    def refuse_unread(self, read: Sequence[str]) -> None:
        """Refuse keys that change the model, and warn about unknown keys.

        Args:
            read: keys that the architecture reads, beside those that every architecture reads.
        """
        unknown = []
        for key, value in self._values.items():
            if key in read:
                continue
            if key in NEUTRAL and value != NEUTRAL[key]:
                raise UserError(
                    f"the GGUF file sets {self.prefix}{key} to {value!r}, which is not supported", USE_SAFETENSORS
                )
            if key not in (*READ, *HARMLESS, *NEUTRAL):
                unknown.append(f"{self.prefix}{key}")
        if self._values.get("attention.causal") is False:
            raise UserError("the GGUF file holds a model without causal attention", "use a model that generates text")
        if unknown:
            warnings.warn(f"keys of the GGUF file that are not read: {', '.join(unknown)}", stacklevel=4)


def says(key: str, value: object) -> str:
    """Say what a file gives for a key."""
    return f"the GGUF file has no {key}" if value is None else f"the GGUF file gives {key} as {value!r}"
