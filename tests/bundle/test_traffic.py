"""Bytes per decode step against counts done by hand, and against the parameters there are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shadowllm.bundle.traffic import Active, mean_traffic, step_traffic
from shadowllm.models.spec import ModelSpec, RopeSpec

LLAMA = ModelSpec(
    family="llama",
    vocab_size=11,
    hidden_size=6,
    intermediate_size=10,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=2,
    max_seqlen=16,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="silu",
    gated=True,
    positions="rope",
    rope=RopeSpec(),
    tied_embeddings=True,
)
OPT = replace(
    LLAMA,
    family="opt",
    n_kv_heads=4,
    norm="layernorm",
    activation="relu",
    gated=False,
    positions="learned",
    rope=None,
    position_offset=2,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
)


def test_dense_llama_by_hand():
    parts = step_traffic(LLAMA, 4, context=5).parts
    assert parts == {
        "embedding rows": 4 * 6,
        "norms": 4 * 7 * 6,
        "k/v projections": 4 * 3 * 2 * 4 * 6,  # 3 layers, K and V, 2 heads x 2 dims, hidden 6
        "dense layers": 4 * 3 * (2 * 8 * 6 + 3 * 10 * 6),  # q and o rows, gate/up/down rows
        "active q/o rows": 0,
        "active MLP rows": 0,
        "lm_head": 4 * 11 * 6,
        "KV cache": 4 * 3 * 2 * 2 * 5 * 2,  # 3 layers, 2 KV heads, K and V, 5 tokens, 2 dims
        "predictor": 0,
    }


def test_sparse_llama_by_hand():
    active = Active(heads=(1, 1), neurons=(2, 4), dense_layers=1, predictor_bytes=77)
    parts = step_traffic(LLAMA, 2, context=5, active=active).parts
    assert parts["dense layers"] == 2 * (2 * 8 * 6 + 3 * 10 * 6)
    assert parts["active q/o rows"] == 2 * 2 * (2 * 2 * 6)
    assert parts["active MLP rows"] == 2 * (2 + 4) * 3 * 6
    assert parts["KV cache"] == 2 * (2 + 1 + 1) * 2 * 5 * 2  # one active head reads one of the two KV heads
    assert parts["k/v projections"] == 2 * 3 * 2 * 4 * 6  # K and V stay exact
    assert parts["predictor"] == 77


def test_whole_groups_leave_their_caches_unread():
    active = Active(heads=(2, 2), neurons=(2, 4))
    found = [
        step_traffic(spec, 1, context=5, active=active).parts["KV cache"] / (2 * 5 * 2)
        for spec in (LLAMA, replace(LLAMA, head_unit="kv_group"))
    ]
    assert found == [2 + 2 + 2, 2 + 1 + 1]


@pytest.mark.parametrize("spec", [LLAMA, OPT], ids=["llama", "opt"])
def test_all_active_reads_what_dense_reads(spec):
    dense = step_traffic(spec, 4, context=9)
    sparse = step_traffic(spec, 4, context=9, active=Active([spec.n_heads] * 2, [spec.intermediate_size] * 2))
    assert sparse.total == dense.total


@pytest.mark.parametrize("spec", [LLAMA, OPT], ids=["llama", "opt"])
def test_dense_weights_are_all_parameters(spec):
    parts = step_traffic(spec, 1, context=0).parts
    unread_positions = (spec.max_seqlen + spec.position_offset) * spec.hidden_size if spec.positions == "learned" else 0
    # The tied embedding table is counted as lm_head; its one gathered row is read on top.
    assert sum(parts.values()) - parts["embedding rows"] == spec.n_parameters - unread_positions


def test_batch_shares_weights_but_not_caches():
    one, four = (step_traffic(LLAMA, 4, context=5, batch=batch).parts for batch in (1, 4))
    assert four["KV cache"] == 4 * one["KV cache"]
    assert four["embedding rows"] == 4 * one["embedding rows"]
    assert four["dense layers"] == one["dense layers"]


@pytest.mark.parametrize(("prompt_len", "new_tokens"), [(7, 4), (128, 128)])
def test_mean_over_a_generation(prompt_len, new_tokens):
    contexts = range(prompt_len + 1, prompt_len + new_tokens)
    mean = sum(step_traffic(LLAMA, 4, context).total for context in contexts) / len(contexts)
    assert mean_traffic(LLAMA, 4, prompt_len, new_tokens).total == mean
