"""Forms, weights and inputs of a native ``SparseAttention``, and its exact result."""

from __future__ import annotations

import math

import numpy as np

from shadowllm.plugins.ops.sparse_attention.reference import rotate
from tests.plugins.native_model import pick

ATTENTION_WEIGHTS = ("w_q", "b_q", "w_o", "b_o")


ATTENTION_FORMS = {"llama": (True, False), "llama-biases": (True, True), "opt": (False, True)}  # rope, biases


def attention_inputs(form: str, size: tuple, seed: int = 0) -> dict[str, np.ndarray | None]:
    hidden, heads, kv_heads, head_dim, capacity, batch, seqlen, lengths, count = size
    rope, biases = ATTENTION_FORMS[form]
    rng = np.random.default_rng(seed)

    def normal(*shape: int, given: bool = True) -> np.ndarray | None:
        return rng.standard_normal(shape).astype(np.float32) if given else None

    cache = (batch, kv_heads, capacity, head_dim)
    angles = rng.uniform(0, 7, (batch, seqlen, head_dim // 2))
    inputs = {
        "x": normal(batch, seqlen, hidden),
        "key": normal(*cache),
        "value": normal(*cache),
        "lengths": np.asarray(lengths, dtype=np.int32),
        "indices": pick(rng, heads, count, heads),
        "count": np.asarray(count, dtype=np.int32),
        "w_q": normal(heads * head_dim, hidden),
        "b_q": normal(heads * head_dim, given=biases),
        "w_o": normal(heads * head_dim, hidden),
        "b_o": normal(hidden, given=biases),
        "cos": np.cos(angles).astype(np.float32) if rope else None,
        "sin": np.sin(angles).astype(np.float32) if rope else None,
    }
    inputs["w_q"] /= math.sqrt(hidden)  # scores of a few units: neither uniform nor one-hot attention
    return inputs


def exact_attention(inputs: dict[str, np.ndarray | None], heads: int, window: int = 0) -> np.ndarray:
    wide = {k: v.astype(np.float64) for k, v in inputs.items() if v is not None and v.dtype != np.int32}
    batch, seqlen, hidden = inputs["x"].shape
    d, group = inputs["key"].shape[3], heads // inputs["key"].shape[1]
    y = np.zeros((batch, seqlen, hidden)) + wide.get("b_o", 0)
    for head in inputs["indices"][: int(inputs["count"])]:
        rows = slice(head * d, (head + 1) * d)
        for b in range(batch):
            for s in range(seqlen):
                query = wide["w_q"][rows] @ wide["x"][b, s] + (wide["b_q"][rows] if "b_q" in wide else 0)
                if "cos" in wide:
                    query = rotate(query, wide["cos"][b, s], wide["sin"][b, s])
                end = inputs["lengths"][b] - seqlen + s + 1
                seen = np.s_[b, head // group, max(0, end - window) if window else 0 : end]
                scores = wide["key"][seen] @ query / math.sqrt(d)
                weights = np.exp(scores - scores.max())
                y[b, s] += weights / weights.sum() @ wide["value"][seen] @ wide["w_o"][rows]
    return y
