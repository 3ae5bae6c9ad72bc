"""The activation functions of MLPs, and their names in checkpoints.

``first`` is the output of gate or, in an MLP without a gate, of up. An MLP computes ``act(first) * up`` or
``act(first)``; dReLU computes ``relu(first) * relu(up)``.
"""

from __future__ import annotations

from typing import Any, Literal

from shadowllm.errors import UserError
from shadowllm.models.files.config import declares

# relu2      relu(x) ** 2 (So et al., arXiv 2109.08668)
# fatrelu    x if x > threshold, else 0: FATReLU (Kurtz et al., ICML 2020); MiniCPM-S and ProSparse have it
# drelu      relu of gate and of up (Song et al., TurboSparse, arXiv 2406.05955)
# gelu_tanh  the tanh approximation of GELU (Hendrycks and Gimpel, arXiv 1606.08415)
# quick_gelu x * sigmoid(1.702 x)
Activation = Literal["relu", "relu2", "fatrelu", "drelu", "silu", "gelu", "gelu_tanh", "quick_gelu"]
# Activations that are exactly zero for many inputs, so that the neuron contributes nothing.
RELU_LIKE: tuple[Activation, ...] = ("relu", "relu2", "fatrelu", "drelu")
# The names in configs (those of transformers, "fatrelu" of MiniCPM-S, and "drelu") -> ours. The configs of TurboSparse
# say "relu", and its code applies it twice.
NAMES: dict[str, Activation] = {
    "relu": "relu",
    "relu2": "relu2",
    "fatrelu": "fatrelu",
    "drelu": "drelu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
}
GELU_SQRT = 0.7978845608028654  # sqrt(2 / pi)
GELU_CUBIC = 0.044715
QUICK_GELU_SLOPE = 1.702
THRESHOLD = "hidden_act_param"  # its name in configs


def read_activation(config: Any) -> tuple[Activation, float]:
    """Read the activation from a Hugging Face config, and the threshold of FATReLU (``hidden_act_param``).

    Raises:
        UserError: the activation is not supported, or FATReLU has no threshold.
    """
    name, threshold = stated_activation(config)
    if not isinstance(name, str) or name not in NAMES:
        raise UserError(f"activation {name!r} is not supported", f"supported: {', '.join(NAMES)}")
    activation = NAMES[name]
    if activation != "fatrelu":
        return activation, 0.0
    if threshold is None:
        raise UserError("activation 'fatrelu' without a threshold (hidden_act_param)", "give the activation threshold")
    return activation, threshold


def stated_activation(config: Any) -> tuple[Any, Any]:
    """Return the name of the activation and the threshold that a config states; None for what it does not."""
    return getattr(config, _key(config), None), getattr(config, THRESHOLD, None)


def override_activation(config: Any, name: str, threshold: float | None = None) -> None:
    """Write another activation into a config."""
    setattr(config, _key(config), name)
    if threshold is not None:
        setattr(config, THRESHOLD, threshold)


def _key(config: Any) -> str:
    """OPT and Gemma 3 have other names for it than other families. ``transformers`` ignores the names of others."""
    known = ("activation_function", "hidden_act", "hidden_activation")
    return next((key for key in known if declares(config, key)), "hidden_act")
