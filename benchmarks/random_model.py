"""Checkpoints of well-known shapes with random weights: speed and memory do not depend on what the numbers are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def write_random_model(shape: str, folder: Path, seed: int = 0) -> None:
    """Write a checkpoint with random float16 weights into ``folder``, in shards, tensor by tensor.

    Args:
        shape: a key of `SHAPES`.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[shape], dtype="float16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = "lm_head.weight" if config.tie_word_embeddings else None
    shapes = {name: value.shape for name, value in model.state_dict().items() if name != tied}
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
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
