"""Model families as one `ModelSpec` and one set of canonical weights."""

from shadowllm.models.checkpoint import Checkpoint
from shadowllm.models.decoder import Decoder, KVCache
from shadowllm.models.registry import load_model
from shadowllm.models.spec import ModelSpec, RopeSpec
from shadowllm.models.weights import Weights

__all__ = ["Checkpoint", "Decoder", "KVCache", "ModelSpec", "RopeSpec", "Weights", "load_model"]
