"""The signature of ``DenseDecoderLayer``, which only the native library has; see `plugins.registry`."""

from __future__ import annotations

from shadowllm.plugins.ops.decoder_layer.schema import layer_schema
from shadowllm.plugins.ops.dense_mlp.schema import DENSE_MLP

DENSE_DECODER_LAYER = layer_schema("DenseDecoderLayer", DENSE_MLP)
