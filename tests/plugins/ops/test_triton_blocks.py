"""Compares whole blocks of a layer with float64 arithmetic: the op, its sum with the hidden states, and the norm."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from shadowllm.bundle.quantisation import NESTED
from shadowllm.plugins.ops.sparse_attention.launcher import sparse_attention
from shadowllm.plugins.ops.sparse_mlp.launcher import sparse_mlp
from shadowllm.plugins.triton.launch import BlockInputs
from tests.plugins.ops.sparse_attention.test_triton import attention_inputs, dense_attention
from tests.plugins.ops.sparse_attention.test_triton_rest import rest_inputs as attention_rest_inputs
from tests.plugins.ops.sparse_mlp.test_triton import dense_mlp, mlp_inputs
from tests.plugins.ops.sparse_mlp.test_triton_rest import rest_inputs as mlp_rest_inputs
from tests.plugins.triton_ops import (
    DEVICE,
    DTYPES,
    assert_as_exact_as,
    on_device,
    with_residuals,
    with_types,
)

pytestmark = pytest.mark.slow

EPS = 1e-5
NORMS = ["rms", "layer", "output"]
ATTENTION = [  # D, H, n_kv, d, C, B, S, count, rotated, biases
    ("rms", (48, 4, 2, 12, 31, 1, 1, 3, True, False)),
    ("layer", (41, 6, 1, 10, 600, 1, 1, 5, True, True)),
    ("output", (41, 3, 3, 7, 40, 1, 1, 0, False, False)),
    ("rms", (64, 9, 3, 64, 300, 3, 1, 6, True, False)),
    ("layer", (41, 4, 4, 20, 530, 17, 1, 2, False, True)),
]


def block_inputs(x: Tensor, norm: str) -> BlockInputs:
    generator, width = torch.Generator().manual_seed(1), x.shape[-1]
    weight, bias, output = (torch.randn(width, generator=generator).to(x.dtype) for _ in range(3))
    return BlockInputs(
        skip=3 * torch.randn(x.shape, generator=generator).to(x.dtype) + 1,
        norm_weight=weight,
        norm_bias=bias if norm == "layer" else None,
        norm_eps=EPS,
        normed=torch.full_like(x, float("nan")),
        output_norm_weight=output if norm == "output" else None,
    )


def moved(block: BlockInputs) -> BlockInputs:
    numbers = {name: value.to(DEVICE) for name, value in vars(block).items() if isinstance(value, Tensor)}
    return replace(block, **numbers)


def normed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    weight = weight.to(x.dtype)
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, EPS)
    return F.layer_norm(x, weight.shape, weight, bias.to(x.dtype), EPS)


def ended(y: Tensor, block: BlockInputs) -> tuple[Tensor, Tensor]:
    """Hidden states after a block with the result y, and their norm, in the type of y."""
    if block.output_norm_weight is not None:
        y = normed(y, block.output_norm_weight)
    x = block.skip.to(y.dtype) + y
    return x, normed(x, block.norm_weight, block.norm_bias)


def assert_block(found: tuple[Tensor, Tensor], same_type: Tensor, exact: Tensor, block: BlockInputs) -> None:
    for one, own, wanted in zip(found, ended(same_type, block), ended(exact, block), strict=True):
        assert_as_exact_as(one, own, wanted)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("norm", "size"), ATTENTION, ids=str)
def test_attention_writes_the_step_into_the_cache(norm, size, dtype):
    inputs, (_, n_heads, n_kv, head_dim, _, batch, *_) = attention_inputs(size, dtype), size
    block, generator = block_inputs(inputs["x"], norm), torch.Generator().manual_seed(2)
    rows = 2 * n_kv * head_dim
    w_kv = (torch.randn(rows, size[0], generator=generator) / size[0] ** 0.5).to(dtype)
    b_kv = torch.randn(rows, generator=generator).to(dtype) if size[-1] else None
    block, place = replace(block, w_kv=w_kv, b_kv=b_kv), inputs["lengths"].long() - 1
    before = {name: inputs[name].clone() for name in ("key", "value")}
    for cache in before.values():
        cache[torch.arange(batch), :, place] = float("nan")  # the step replaces what is there
    given = on_device(inputs | before)
    there = moved(block)
    y, _ = sparse_attention(**given, n_heads=n_heads, block=there)

    def cached(kind: torch.dtype) -> dict[str, Tensor]:
        both = F.linear(inputs["x"].to(kind), w_kv.to(kind), None if b_kv is None else b_kv.to(kind))
        key, value = both[:, 0].unflatten(-1, (2, n_kv, head_dim)).unbind(1)
        if inputs["cos"] is not None:
            first, second = key.chunk(2, dim=-1)
            cos, sin = inputs["cos"].to(kind), inputs["sin"].to(kind)
            key = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        found = {name: cache.to(kind) for name, cache in before.items()}
        for name, step in (("key", key), ("value", value)):
            found[name][torch.arange(batch), :, place] = step
        return found

    own, exact = cached(dtype), cached(torch.float64)
    for name in ("key", "value"):
        assert_as_exact_as(given[name], own[name], exact[name])
    results = [dense_attention(inputs | caches, n_heads, t) for caches, t in ((own, dtype), (exact, torch.float64))]
    assert_block((y, there.normed), *results, block)


@pytest.mark.parametrize(
    ("size", "norm", "dtype"),
    with_types([(41, 7, 1, 1, 7), (300, 700, 1, 1, 301), (123, 88, 3, 1, 0)], NORMS),
)
def test_mlp(size, norm, dtype):
    inputs = mlp_inputs("llama-biases", size, dtype)
    block = block_inputs(inputs["x"], norm)
    there = moved(block)
    y, _ = sparse_mlp(**on_device(inputs), activation="silu", block=there)
    results = [dense_mlp(inputs, "silu", kind) for kind in (dtype, torch.float64)]
    assert_block((y, there.normed), *results, block)


@pytest.mark.parametrize(("batch", "q"), list(zip((1, 3), NESTED.values(), strict=True)), ids=str)
def test_blocks_of_nested_integers_are_those_of_their_values(batch, q):
    size, found = (41, 6, 2, 10, 40, batch, 1, 4, True, True), []
    attention = attention_rest_inputs(size, 6, torch.float32, 1)
    attention["w_kv"] = torch.randn(40, 41, generator=torch.Generator().manual_seed(2)) / 41**0.5
    mlp = mlp_rest_inputs("llama-biases", (41, 88, batch, 1, 30), torch.float32, 1)
    for inputs, given in zip(with_residuals(attention, q), with_residuals(mlp, q), strict=True):
        block = moved(block_inputs(inputs["x"], "rms"))
        inputs, given = on_device(inputs), on_device(given)
        own = {name: inputs.pop(name) for name in ("w_kv", "c_kv", "cs_kv")}
        own = own if own["w_kv"].dtype == torch.uint8 else {"w_kv": own["w_kv"]}
        y, _ = sparse_attention(**inputs, n_heads=6, block=replace(block, **own))
        outputs = [y, block.normed.clone(), inputs["key"], inputs["value"]]
        y, _ = sparse_mlp(**given, activation="silu", block=block)
        found.append([*outputs, y, block.normed])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


def test_an_mlp_that_chooses_by_gate_lists_no_neurons():
    inputs = mlp_inputs("opt", (123, 88, 1, 1, 88), torch.float32)
    block = block_inputs(inputs["x"], "layer")
    there = moved(block)
    y, chosen = sparse_mlp(**on_device(inputs | {"indices": None}), activation="relu", block=there)
    assert chosen is None
    assert_block((y, there.normed), *(dense_mlp(inputs, "relu", t) for t in (torch.float32, torch.float64)), block)


def test_a_position_past_the_cache_is_not_written():
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, 1, 4, True, False), torch.float32)
    block = replace(block_inputs(inputs["x"], "rms"), w_kv=torch.ones(48, 48))
    for length in (0, -7, 32, 2**31 - 1):
        given = on_device(inputs | {"lengths": torch.tensor([length]).int()})
        before = {name: given[name].clone() for name in ("key", "value")}
        sparse_attention(**given, n_heads=4, block=moved(block))
        assert all(torch.equal(given[name], cache) for name, cache in before.items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"w_kv": torch.ones(47, 48)}, r"w_kv \(47, 48\) and key"),
        ({"norm_weight": torch.ones(47)}, "norm_weight has shape"),
        ({"skip": torch.ones(1, 2, 48)}, "skip has shape"),
    ],
)
def test_what_a_block_refuses(wrong, message):
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, 1, 4, True, False), torch.float32)
    block = replace(block_inputs(inputs["x"], "rms"), w_kv=torch.ones(48, 48))
    with pytest.raises(ValueError, match=message):
        sparse_attention(**on_device(inputs), n_heads=4, block=moved(replace(block, **wrong)))


def test_a_prompt_is_no_block():
    inputs = mlp_inputs("llama", (41, 88, 1, 2, 3), torch.float32)
    with pytest.raises(ValueError, match="no block of a layer"):
        sparse_mlp(**on_device(inputs), activation="silu", block=moved(block_inputs(inputs["x"], "rms")))
