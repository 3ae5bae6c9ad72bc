"""Models of well-known shapes with random weights: speed and memory do not depend on the values."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shadowllm.bundle.predictor_file import Kind, Predictor
    from shadowllm.models.sparsity import SparseLayers
    from shadowllm.models.spec import ModelSpec

SHAPES: dict[str, dict[str, Any]] = {
    "opt-1.3b": {
        "model_type": "opt",
        "hidden_size": 2048,
        "ffn_dim": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 2048,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
    },
    "llama-1.1b": {  # TinyLlama's
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}

# Shapes that need a GPU; below, tiny shapes for quick tests.
GPU_SHAPES: dict[str, dict[str, Any]] = {
    "opt-1.3b": SHAPES["opt-1.3b"],
    "opt-6.7b": SHAPES["opt-1.3b"]
    | {
        "hidden_size": 4096,
        "ffn_dim": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "word_embed_proj_dim": 4096,
    },
    "opt-13b": SHAPES["opt-1.3b"]
    | {
        "hidden_size": 5120,
        "ffn_dim": 20480,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "word_embed_proj_dim": 5120,
    },
    "llama-2-7b": SHAPES["llama-1.1b"]
    | {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
}
TINY_SHAPES: dict[str, dict[str, Any]] = {
    "tiny-opt": SHAPES["opt-1.3b"]
    | {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 32,
        "vocab_size": 64,
    },
    "tiny-llama": SHAPES["llama-1.1b"]
    | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "vocab_size": 64,
    },
}
# The published configurations of models, cut to two layers, and to more if layers are small: every size is real, and an
# export takes seconds.
_LLAMA_2 = GPU_SHAPES["llama-2-7b"] | {"num_hidden_layers": 2}
PUBLISHED: dict[str, dict[str, Any]] = {
    "relullama-7b": _LLAMA_2 | {"hidden_act": "relu"},
    "prosparse-7b": _LLAMA_2 | {"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 0.01},
    "minicpm-s-1b": {
        "model_type": "minicpm",
        "hidden_size": 1536,
        "intermediate_size": 3840,
        "num_hidden_layers": 12,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "vocab_size": 73440,
        "tie_word_embeddings": True,
        "hidden_act": "fatrelu",
        "hidden_act_param": 0.01,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "mistral-7b": _LLAMA_2
    | {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096},
}
ALL_SHAPES = SHAPES | GPU_SHAPES | TINY_SHAPES | PUBLISHED


def shape_spec(shape: str) -> ModelSpec:
    """The `ModelSpec` of a shape.

    Args:
        shape: a key of `ALL_SHAPES`.
    """
    from transformers import AutoConfig

    from shadowllm.models.registry import FAMILIES

    config = AutoConfig.for_model(**ALL_SHAPES[shape])
    return FAMILIES[config.model_type].spec(config)


class RandomWeights(Mapping[str, "Tensor"]):
    """Random canonical tensors, each drawn on request, directly on the device.

    Args:
        dtype: type of all tensors.
    """

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
        from shadowllm.bundle.weight_layout import model_groups

        self._spec, self._dtype, self._device = spec, dtype, device
        self._names = [name for group in model_groups(spec, "float32") for name, _, _ in group]

    def __getitem__(self, name: str) -> Tensor:
        import torch

        from shadowllm.models.weights import tensor_shape

        if name not in self._names:
            raise KeyError(name)
        shape = tensor_shape(self._spec, name)
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        return torch.randn(shape, dtype=self._dtype, device=self._device) * 0.02

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class RandomCopies(Mapping[str, "Tensor"]):
    """Random tensors of `bundle.weight_layout.copy_groups`, each drawn on request, directly on the device."""

    def __init__(self, layers: SparseLayers, device: torch.device) -> None:
        from shadowllm.bundle.weight_layout import copy_groups

        self._shapes = {name: shape for group in copy_groups(layers, rest=True) for name, shape, _ in group}
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        import torch

        shape = self._shapes[name]
        from shadowllm.bundle.weight_names import is_integers

        if is_integers(name):
            return torch.randint(256, shape, dtype=torch.uint8, device=self._device)
        return torch.rand(shape, device=self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def write_random_model(shape: str, folder: Path, seed: int = 0) -> None:
    """Write a checkpoint with random float16 weights into ``folder``, in shards, tensor by tensor.

    Args:
        shape: a key of `ALL_SHAPES`.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from shadowllm.models.activations import override_activation
    from shadowllm.models.files.config import RELATIVES

    family = ALL_SHAPES[shape]["model_type"]
    config = AutoConfig.for_model(**ALL_SHAPES[shape] | {"model_type": RELATIVES.get(family, family)}, dtype="float16")
    empty = copy.deepcopy(config)
    override_activation(empty, "relu")  # transformers does not know every model's own
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(empty)
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    shapes = {name: value.shape for name, value in model.state_dict().items() if name != tied}
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    if family in RELATIVES:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": family}))
    generator = torch.Generator().manual_seed(seed)
    where: dict[str, str] = {}
    names = list(shapes)
    for number, part in enumerate(names[i : i + 64] for i in range(0, len(names), 64)):
        file = f"model-{number:05d}.safetensors"
        save_file(
            {name: torch.randn(shapes[name], generator=generator).mul_(0.02).half() for name in part}, folder / file
        )
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def untrained(
    kind: Kind, spec: ModelSpec, fingerprint: str, dense_layers: int = 1, rank: int | None = None
) -> Predictor:
    """An untrained predictor, of the default size unless a network's ``rank`` is given.

    The output of a network still depends on its input.
    """
    import torch

    from shadowllm.bundle.predictor_file import Predictor
    from shadowllm.models.sparsity import SparseLayers, layer_units
    from shadowllm.predictor.networks import default_rank, initial_tensors

    generator = torch.Generator().manual_seed(0)
    layers = SparseLayers(spec, dense_layers)
    tensors = {
        f"{unit}.scores": torch.rand(layers.count, width, generator=generator)
        for unit, width in layer_units(spec).items()
    }
    if kind in ("shadow", "layerwise"):
        rank, biases = (
            rank or default_rank(layers, kind),
            (tensors["heads.scores"], tensors["neurons.scores"]),
        )
        tensors |= initial_tensors(kind, layers, rank, *biases, seed=0)
        for name in [name for name in tensors if name.endswith(("heads.weight", "neurons.weight"))]:
            tensors[name].normal_(generator=generator)
    if kind in ("layerwise", "quantized-shadow"):
        heads = layers.count * spec.n_heads
        tensors["layers.heads.weight"] = torch.randn(heads, spec.hidden_size, generator=generator)
        tensors["layers.heads.bias"] = torch.zeros(heads)
    sizes = (layers.count, dense_layers, spec.n_heads, spec.intermediate_size, spec.hidden_size)
    return Predictor(kind, *sizes, tensors, fingerprint)
