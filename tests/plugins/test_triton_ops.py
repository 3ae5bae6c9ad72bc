"""The Triton kernels against float64 arithmetic, on the GPU or, where there is none, in Triton's interpreter.

A kernel may err by twice what PyTorch errs in the same type, plus a floor of a rounding of the result and of
what lies between the kernels. (The interpreter truncates to bfloat16 where a GPU rounds.)
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from shadowllm.bundle.quantisation import Quantisation, quantise
from shadowllm.models.decoder import ACTIVATIONS
from shadowllm.plugins import reference
from shadowllm.plugins.triton.ops import score_neurons, select_topk, sparse_attention, sparse_mlp
from shadowllm.plugins.triton.schedule import tiers

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def assert_as_exact_as(found: Tensor, same_type: Tensor, exact: Tensor) -> None:
    """``found`` errs at most twice as much as PyTorch in the same type, plus two roundings."""
    assert found.shape == exact.shape
    assert found.dtype == same_type.dtype
    floor = 2 * torch.finfo(found.dtype).eps * exact.abs().max()
    error = (found.cpu().double() - exact).abs().max()
    assert error <= 2 * (same_type.double() - exact).abs().max() + floor, f"{error} for results of {exact.abs().max()}"


def active(bound: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` ascending indices below ``bound``, then -1 up to ``bound``."""
    chosen = torch.randperm(bound, generator=generator)[:count].sort().values
    return F.pad(chosen, (0, bound - count), value=-1).int()


def on_device(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.to(DEVICE) for name, tensor in inputs.items()}


class TestSelectTopK:
    @pytest.mark.parametrize(
        ("width", "counts"),
        [(1, [0, 1]), (7, [7, 3]), (41, [0, 7, 41]), (123, [1, 122, 61]), (1000, [999]), (65536, [8192, 65536])],
    )
    def test_against_the_reference(self, width, counts):
        scores = np.random.default_rng(width).standard_normal((len(counts), width)).astype(np.float32)
        self.check(scores, counts, width)

    def test_ties_go_to_the_lower_index(self):
        self.check(np.array([[1, 2, 2, 1, 2, 1], [0, 0, 0, 0, 0, 0]], np.float32), [4, 3], 6)

    def test_ties_in_rows_of_several_blocks(self):
        scores = np.random.default_rng(0).integers(-3, 3, (2, 40000)).astype(np.float32)
        self.check(scores, [12345, 39999], 40000)

    def test_zeros_of_both_signs_infinities_and_nan(self):
        scores = np.array([[0.0, -0.0, np.inf, np.nan, -np.inf, -1e-38, 1e-38]], np.float32)
        for count in range(8):
            self.check(scores, [count], 7)

    def test_capacity_below_the_row(self):
        self.check(np.arange(10, dtype=np.float32)[None], [2], 3)

    def test_a_count_beyond_the_capacity_is_taken_for_it(self):
        scores = torch.arange(5, dtype=torch.float32, device=DEVICE)[None]
        for count, wanted in ((9, [2, 3, 4]), (-1, [-1, -1, -1])):
            assert select_topk(scores, torch.tensor([count], device=DEVICE).int(), 3).tolist() == [wanted]

    @staticmethod
    def check(scores: np.ndarray, counts: list[int], cap: int) -> None:
        wanted = reference.select_topk(scores, np.array(counts), cap)
        found = select_topk(torch.from_numpy(scores).to(DEVICE), torch.tensor(counts, device=DEVICE).int(), cap)
        np.testing.assert_array_equal(found.cpu().numpy(), wanted)


MLP_FORMS = {  # activation, gated, biases
    "llama": ("silu", True, False),
    "llama-biases": ("silu", True, True),
    "opt": ("relu", False, True),
    "galactica": ("gelu", False, True),
}
COPY = Quantisation(bits=4, block=64)
COPY_SIZES = [  # D, F, B, S
    (41, 7, 1, 1),
    (576, 88, 1, 1),
    (300, 33, 3, 1),
    (130, 20, 17, 1),
    (130, 40, 2, 37),
    (64, 33, 1, 70),
]


def copy_inputs(form: str, size: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    width, neurons, batch, seqlen = size
    _, gated, biases = MLP_FORMS[form]
    generator, rows = torch.Generator().manual_seed(width), (1 + gated) * neurons
    data, scales = quantise((torch.randn(rows, width, generator=generator) / width**0.5).numpy(), COPY)
    return {
        "x": torch.randn(batch, seqlen, width, generator=generator).to(dtype),
        "copy": torch.from_numpy(data).unflatten(1, (COPY.blocks(width), -1)),
        "scales": torch.from_numpy(scales),
        "b_gate": torch.randn(neurons, generator=generator).to(dtype) if biases and gated else None,
        "b_up": torch.randn(neurons, generator=generator).to(dtype) if biases else None,
        "lengths": torch.rand(neurons, generator=generator),
        "count": torch.tensor(neurons // 2).int(),
    }


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", COPY_SIZES, ids=str)
@pytest.mark.parametrize("form", MLP_FORMS)
def test_score_neurons(form, size, dtype):
    """The copy is exact in any type, and sums are in float32: as the reference, which starts from the same x."""
    activation = MLP_FORMS[form][0]
    inputs = copy_inputs(form, size, dtype)
    found = score_neurons(**on_device(inputs), activation=activation)
    numbers = {
        n: None if t is None else t.float().numpy() if t.is_floating_point() else t.numpy() for n, t in inputs.items()
    }
    del numbers["count"]
    wanted = reference.score_neurons(**numbers, activation=activation)
    np.testing.assert_allclose(found.cpu().numpy(), wanted, rtol=1e-5, atol=1e-5 * wanted.max())


@pytest.mark.parametrize("tokens", [(1, 1), (1, 20)])
def test_nothing_is_scored_where_all_are_kept(tokens):
    inputs = copy_inputs("llama", (130, 20, *tokens), torch.float32)
    inputs["copy"][:], inputs["scales"][:], inputs["count"] = 255, torch.nan, torch.tensor(20).int()
    scores = score_neurons(**on_device(inputs), activation="silu")
    assert select_topk(scores, inputs["count"].view(1).to(DEVICE), 20).tolist() == [list(range(20))]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"activation": "tanh"}, "no activation 'tanh'"),
        ({"lengths": torch.rand(21)}, "for 21 neurons"),
        ({"x": torch.rand(1, 1, 193)}, "for x"),
        ({"x": torch.rand(1, 1, 128)}, "for x"),
        ({"copy": torch.zeros(40, 3, 24, dtype=torch.uint8)}, "for 20 neurons"),
        ({"copy": torch.zeros(40, 3, 32, dtype=torch.int8)}, "copy is torch.int8"),
        ({"scales": torch.rand(40, 2)}, "scales has shape"),
    ],
    ids=str,
)
def test_what_no_scores_come_of(wrong, match):
    inputs = copy_inputs("llama", (130, 20, 1, 1), torch.float32) | {"activation": "silu"} | wrong
    with pytest.raises(ValueError, match=match):
        score_neurons(**{name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in inputs.items()})


MLP_SIZES = [  # D, F, B, S, count
    (41, 7, 1, 1, 7),
    (123, 88, 1, 1, 45),
    (123, 88, 1, 1, 0),
    (300, 700, 1, 1, 301),
    (123, 88, 3, 1, 41),
    (41, 123, 17, 1, 123),
    (41, 88, 2, 3, 1),
    (123, 300, 1, 70, 123),
    (64, 88, 2, 5, 0),
]


def mlp_inputs(form: str, size: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    width, neurons, batch, seqlen, count = size
    _, gated, biases = MLP_FORMS[form]
    generator = torch.Generator().manual_seed(width)

    def normal(*shape: int, given: bool = True) -> Tensor | None:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype) if given else None

    return {
        "x": torch.randn(batch, seqlen, width, generator=generator).to(dtype),
        "indices": active(neurons, count, generator),
        "count": torch.tensor(count).int(),
        "w_gate": normal(neurons, width, given=gated),
        "b_gate": normal(neurons, given=gated and biases),
        "w_up": normal(neurons, width),
        "b_up": normal(neurons, given=biases),
        "w_down": normal(neurons, width),
        "b_down": normal(width, given=biases),
    }


def dense_mlp(inputs: dict[str, Tensor | None], activation: str, dtype: torch.dtype) -> Tensor:
    """The op in plain PyTorch, in a type of choice."""
    rows = inputs["indices"][: int(inputs["count"])]
    rows = rows[rows >= 0].long()
    x = inputs["x"].to(dtype)

    def project(part: str) -> Tensor:
        bias = inputs[f"b_{part}"]
        return F.linear(x, inputs[f"w_{part}"][rows].to(dtype), None if bias is None else bias[rows].to(dtype))

    act = ACTIVATIONS[activation]
    hidden = act(project("up")) if inputs["w_gate"] is None else act(project("gate")) * project("up")
    y = hidden @ inputs["w_down"][rows].to(dtype)
    return y if inputs["b_down"] is None else y + inputs["b_down"].to(dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("size", MLP_SIZES, ids=str)
@pytest.mark.parametrize("form", MLP_FORMS)
def test_mlp(form, size, dtype):
    activation = MLP_FORMS[form][0]
    inputs = mlp_inputs(form, size, dtype)
    found = sparse_mlp(**on_device(inputs), activation=activation)
    assert_as_exact_as(found, dense_mlp(inputs, activation, dtype), dense_mlp(inputs, activation, torch.float64))


@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (1, 20)])
def test_mlp_skips_indices_out_of_range(tokens):
    inputs = mlp_inputs("llama", (41, 88, *tokens, 3), torch.float32)
    inputs["indices"][:5] = torch.tensor([4, 88, -7, 2**31 - 1, 9])
    inputs["count"] = torch.tensor(5).int()
    valid = inputs | {"indices": torch.tensor([4, 9]), "count": torch.tensor(2)}
    found = sparse_mlp(**on_device(inputs), activation="silu")
    exact = dense_mlp(valid, "silu", torch.float64)
    assert_as_exact_as(found, dense_mlp(valid, "silu", torch.float32), exact)


@pytest.mark.parametrize("count", [-3, 89])
def test_mlp_takes_a_count_out_of_range_for_the_nearest(count):
    inputs = mlp_inputs("opt", (41, 88, 1, 1, 88), torch.float32)
    valid = inputs | {"count": torch.tensor(min(88, max(0, count)))}
    found = sparse_mlp(**on_device(inputs | {"count": torch.tensor(count).int()}), activation="relu")
    assert_as_exact_as(found, dense_mlp(valid, "relu", torch.float32), dense_mlp(valid, "relu", torch.float64))


def test_mlp_hides_no_nan():
    inputs = mlp_inputs("opt", (41, 7, 1, 1, 7), torch.float32)
    inputs["x"][0, 0, 3] = float("nan")
    assert sparse_mlp(**on_device(inputs), activation="relu").isnan().all()


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
    # Rows of different lengths: the shortest holds this step alone, the longest fills the cache.
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


def dense_attention(inputs: dict[str, Tensor | None], n_heads: int, dtype: torch.dtype) -> Tensor:
    """The op in plain PyTorch, in a type of choice."""
    wide = {name: t.to(dtype) for name, t in inputs.items() if t is not None and t.is_floating_point()}
    x, head_dim = wide["x"], wide["key"].shape[-1]
    batch, seqlen, _ = x.shape
    query = F.linear(x, wide["w_q"], wide.get("b_q")).view(batch, seqlen, n_heads, head_dim)
    if "cos" in wide:
        cos, sin = wide["cos"][:, :, None], wide["sin"][:, :, None]
        first, second = query.chunk(2, dim=-1)
        query = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    last = inputs["lengths"][:, None] - seqlen + torch.arange(seqlen)
    visible = torch.arange(wide["key"].shape[2]) <= last[..., None]
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
    found = sparse_attention(**on_device(inputs), n_heads=n_heads)
    exact = dense_attention(inputs, n_heads, torch.float64)
    assert_as_exact_as(found, dense_attention(inputs, n_heads, dtype), exact)


@pytest.mark.parametrize("seqlen", [1, 5])
def test_attention_skips_heads_out_of_range(seqlen):
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, seqlen, 4, True, True), torch.float32)
    inputs["indices"] = torch.tensor([4, 1, -9, 2**31 - 1]).int()
    found = sparse_attention(**on_device(inputs), n_heads=4)
    exact = dense_attention(inputs, 4, torch.float64)
    assert_as_exact_as(found, dense_attention(inputs, 4, torch.float32), exact)


def test_attention_reads_nothing_past_the_cache():
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, 1, 4, True, True), torch.float32)
    full = sparse_attention(**on_device(inputs), n_heads=4)
    beyond = sparse_attention(**on_device(inputs | {"lengths": torch.tensor([10**6]).int()}), n_heads=4)
    torch.testing.assert_close(beyond, full, rtol=0, atol=0)


@pytest.mark.parametrize("seqlen", [1, 5])
def test_attention_reads_nothing_that_an_earlier_text_left(seqlen):
    inputs = attention_inputs((48, 4, 2, 12, 31, 1, seqlen, 4, True, True), torch.float32)
    inputs["lengths"] = torch.tensor([9]).int()
    clean = sparse_attention(**on_device(inputs), n_heads=4)
    for name in ("key", "value"):
        inputs[name][:, :, 9:] = float("nan")
    torch.testing.assert_close(sparse_attention(**on_device(inputs), n_heads=4), clean, rtol=0, atol=0)


def test_results_do_not_depend_on_the_run():
    inputs = on_device(mlp_inputs("llama", (300, 700, 1, 1, 301), torch.float16))
    first, second = (sparse_mlp(**inputs, activation="silu") for _ in range(2))
    assert torch.equal(first, second)


class TestChecks:
    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"w_up": torch.zeros(88, 41, dtype=torch.float16)}, "w_up is torch.float16, expected torch.float32"),
            ({"count": torch.tensor(3)}, "count is torch.int64"),
            ({"w_down": torch.zeros(41, 88).T}, "w_down must be contiguous"),
            ({"w_down": torch.zeros(87, 41)}, "w_down has shape"),
            ({"b_up": torch.zeros(88, 1)}, "b_up has shape"),
            ({"x": torch.zeros(1, 1, 41, dtype=torch.float64)}, "x is torch.float64"),
        ],
    )
    def test_mlp_refuses(self, wrong, message):
        inputs = mlp_inputs("llama", (41, 88, 1, 1, 3), torch.float32) | wrong
        with pytest.raises(ValueError, match=message):
            sparse_mlp(**on_device(inputs), activation="silu")

    def test_mlp_refuses_an_activation(self):
        inputs = mlp_inputs("llama", (41, 88, 1, 1, 3), torch.float32)
        with pytest.raises(ValueError, match="no activation 'tanh'"):
            sparse_mlp(**on_device(inputs), activation="tanh")

    def test_attention_refuses_heads_that_do_not_divide(self):
        inputs = attention_inputs((48, 4, 2, 12, 31, 1, 1, 4, True, True), torch.float32)
        with pytest.raises(ValueError, match="5 heads"):
            sparse_attention(**on_device(inputs), n_heads=5)

    def test_attention_refuses_half_a_rotation(self):
        inputs = attention_inputs((48, 4, 2, 12, 31, 1, 1, 4, True, True), torch.float32)
        with pytest.raises(ValueError, match="both cos and sin"):
            sparse_attention(**on_device(inputs | {"sin": None}), n_heads=4)

    def test_topk_refuses_more_than_there_are(self):
        with pytest.raises(ValueError, match="7 of 6"):
            select_topk(torch.zeros(1, 6, device=DEVICE), torch.tensor([1], device=DEVICE).int(), 7)


@pytest.mark.parametrize(("batch", "seqlen"), [(1, 1), (5, 1), (16, 1), (17, 1), (1, 9), (4, 300)])
def test_tiers_cover_every_call(batch, seqlen):
    found = tiers(batch, seqlen)
    for b in range(1, batch + 1):
        for s in (1, seqlen):
            tier = next(t for t in found if b <= t.max_batch and s <= t.max_seqlen)
            assert tier.size(b, s) == b * s
            assert tier.tiles(b, s) * tier.block >= b * s
