"""Compares the Triton kernels with float64 arithmetic; see `triton_ops`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from shadowllm.plugins.ops.sparse_attention.launcher import sparse_attention
from tests.plugins.triton_ops import DTYPES, active, assert_as_exact_as, on_device

pytestmark = pytest.mark.slow

ATTENTION_SIZES = [  # D, H, n_kv, d, C, B, S, count, rotated, biases
    (48, 4, 4, 12, 31, 1, 1, 4, False, True),
    (48, 4, 2, 12, 31, 1, 1, 3, True, False),
    (41, 6, 1, 10, 600, 1, 1, 5, True, True),
    (41, 3, 3, 7, 40, 1, 1, 0, False, False),
    (64, 9, 3, 64, 300, 3, 1, 6, True, False),
    (48, 6, 2, 8, 64, 2, 5, 4, True, True),
    (41, 4, 4, 20, 150, 1, 70, 2, False, True),
    (40, 2, 1, 5, 33, 2, 9, 0, False, True),
]


def attention_inputs(size: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    width, n_heads, n_kv, head_dim, capacity, batch, seqlen, count, rotated, biases = size
    generator = torch.Generator().manual_seed(width + capacity)

    def normal(*shape: int, given: bool = True) -> Tensor | None:
        return torch.randn(shape, generator=generator).to(dtype) if given else None

    angles = torch.rand(batch, seqlen, head_dim // 2, generator=generator) * 7
    # Rows of different lengths: the shortest has only this step, and the longest fills the cache.
    lengths = torch.linspace(capacity, seqlen, batch).int()
    return {
        "x": normal(batch, seqlen, width),
        "key": normal(batch, n_kv, capacity, head_dim),
        "value": normal(batch, n_kv, capacity, head_dim),
        "lengths": lengths,
        "indices": active(n_heads, count, generator),
        "count": torch.tensor(count).int(),
        "w_q": normal(n_heads * head_dim, width) / width**0.5,
        "b_q": normal(n_heads * head_dim, given=biases),
        "w_o": normal(n_heads * head_dim, width) / (n_heads * head_dim) ** 0.5,
        "b_o": normal(width, given=biases),
        "cos": angles.cos().to(dtype) if rotated else None,
        "sin": angles.sin().to(dtype) if rotated else None,
    }


def dense_attention(inputs: dict[str, Tensor | None], n_heads: int, dtype: torch.dtype, window: int = 0) -> Tensor:
    """The op in plain PyTorch, in a given type."""
    wide = {name: t.to(dtype) for name, t in inputs.items() if t is not None and t.is_floating_point()}
    x, head_dim = wide["x"], wide["key"].shape[-1]
    batch, seqlen, _ = x.shape
    query = F.linear(x, wide["w_q"], wide.get("b_q")).view(batch, seqlen, n_heads, head_dim)
    if "cos" in wide:
        cos, sin = wide["cos"][:, :, None], wide["sin"][:, :, None]
        first, second = query.chunk(2, dim=-1)
        query = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    last = inputs["lengths"][:, None] - seqlen + torch.arange(seqlen)
    slots = torch.arange(wide["key"].shape[2])
    visible = (slots <= last[..., None]) & (slots > last[..., None] - (window or len(slots)))
    context = F.scaled_dot_product_attention(
        query.transpose(1, 2), wide["key"], wide["value"], attn_mask=visible[:, None], enable_gqa=True
    ).transpose(1, 2)
    chosen = inputs["indices"][: int(inputs["count"])].long()
    kept = torch.zeros(n_heads, dtype=dtype).index_fill(0, chosen[(chosen >= 0) & (chosen < n_heads)], 1)
    y = (context * kept[:, None]).flatten(2) @ wide["w_o"]
    return y + wide["b_o"] if "b_o" in wide else y


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", ATTENTION_SIZES, ids=str)
def test_attention(size, dtype):
    inputs, n_heads = attention_inputs(size, dtype), size[1]
    found, _ = sparse_attention(**on_device(inputs), n_heads=n_heads)
    exact = dense_attention(inputs, n_heads, torch.float64)
    assert_as_exact_as(found, dense_attention(inputs, n_heads, dtype), exact)


@pytest.mark.parametrize("window", [1, 33, 64, 500])
@pytest.mark.parametrize("size", ATTENTION_SIZES[2:7:2] + ATTENTION_SIZES[5:6], ids=str)
def test_attention_with_a_window(size, window):
    """The last tokens see several spans of the cache, one, or a part of one."""
    inputs, n_heads = attention_inputs(size, torch.float32), size[1]
    exact, same = (dense_attention(inputs, n_heads, dtype, window) for dtype in (torch.float64, torch.float32))
    for row, length in enumerate(inputs["lengths"].tolist()):  # what no query sees must not be read
        for name in ("key", "value"):
            inputs[name][row, :, : max(0, length - size[6] + 1 - window)] = float("nan")
    found, _ = sparse_attention(**on_device(inputs), n_heads=n_heads, window=window)
    assert_as_exact_as(found, same, exact)


@pytest.mark.parametrize("seqlen", [1, 5])
def test_attention_skips_heads_out_of_range(seqlen):
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, seqlen, 4, True, True), torch.float32)
    inputs["indices"] = torch.tensor([4, 1, -9, 2**31 - 1]).int()
    found, _ = sparse_attention(**on_device(inputs), n_heads=4)
    exact = dense_attention(inputs, 4, torch.float64)
    assert_as_exact_as(found, dense_attention(inputs, 4, torch.float32), exact)


@pytest.mark.parametrize("seqlen", [1, 5])
@pytest.mark.parametrize("count", [-3, 1 - 2**30, -(2**31)])  # 12 times the second is 12 in int32, as for one head
def test_attention_takes_a_negative_count_for_none(count, seqlen):
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, seqlen, 4, True, True), torch.float32)
    found, _ = sparse_attention(**on_device(inputs | {"count": torch.tensor(count).int()}), n_heads=4)
    torch.testing.assert_close(found.cpu(), inputs["b_o"].expand(1, seqlen, -1), rtol=0, atol=0)


@pytest.mark.parametrize(("seqlen", "capacity"), [(1, 31), (1, 150), (5, 31), (70, 150)])  # one span, two; tiles
@pytest.mark.parametrize("length", [0, -3, -(2**31)])
def test_attention_over_an_empty_cache_is_zero(length, seqlen, capacity):
    """Alone, and in a batch where the other sequence is not empty."""
    inputs = attention_inputs((48, 4, 2, 12, capacity, 2, seqlen, 4, True, True), torch.float32)
    full, _ = sparse_attention(**on_device(inputs), n_heads=4)
    inputs["lengths"][1] = length
    found, _ = sparse_attention(**on_device(inputs), n_heads=4)
    torch.testing.assert_close(found[0], full[0], rtol=0, atol=0)
    own = {name: inputs[name][1:] for name in ("x", "key", "value", "lengths", "cos", "sin")}
    alone, _ = sparse_attention(**on_device(inputs | own), n_heads=4)
    for one in (found[1], alone[0]):
        torch.testing.assert_close(one.cpu(), inputs["b_o"].expand(seqlen, -1), rtol=0, atol=0)


@pytest.mark.parametrize("length", [10**6, 2**31 - 1])
def test_attention_reads_nothing_past_the_cache(length):
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, 1, 4, True, True), torch.float32)
    full, _ = sparse_attention(**on_device(inputs), n_heads=4)
    beyond, _ = sparse_attention(**on_device(inputs | {"lengths": torch.tensor([length]).int()}), n_heads=4)
    torch.testing.assert_close(beyond, full, rtol=0, atol=0)
    prompt = attention_inputs((48, 4, 2, 12, 31, 1, 5, 4, True, True), torch.float32)
    beyond, _ = sparse_attention(**on_device(prompt | {"lengths": torch.tensor([length]).int()}), n_heads=4)
    assert beyond.isfinite().all()


@pytest.mark.parametrize("seqlen", [1, 5])
def test_attention_reads_nothing_that_an_earlier_text_left(seqlen):
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, seqlen, 4, True, True), torch.float32)
    inputs["lengths"] = torch.tensor([9]).int()
    clean, _ = sparse_attention(**on_device(inputs), n_heads=4)
    for name in ("key", "value"):
        inputs[name][:, :, 9:] = float("nan")
    torch.testing.assert_close(sparse_attention(**on_device(inputs), n_heads=4)[0], clean, rtol=0, atol=0)


def test_attention_refuses_heads_that_do_not_divide():
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, 1, 4, True, True), torch.float32)
    with pytest.raises(ValueError, match="5 heads"):
        sparse_attention(**on_device(inputs), n_heads=5)


def test_attention_refuses_a_negative_window():
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, 1, 4, True, True), torch.float32)
    with pytest.raises(ValueError, match="window of -1"):
        sparse_attention(**on_device(inputs), n_heads=4, window=-1)


def test_attention_refuses_half_a_rotation():
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, 1, 4, True, True), torch.float32)
    with pytest.raises(ValueError, match="both cos and sin"):
        sparse_attention(**on_device(inputs | {"sin": None}), n_heads=4)
