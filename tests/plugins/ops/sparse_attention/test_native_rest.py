"""The native op with a low-bit copy: the rest of the heads, and the choice inside the op; see `mixed_inputs`."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.bundle.quantisation import Quantisation
from tests.plugins.native_model import REFUSED, STORED, built, ints, run, run_all, scalar, stored, zeros
from tests.plugins.ops.sparse_attention.mixed_inputs import COPIES, MIXED_WEIGHTS, check, mixed_inputs, with_copy
from tests.plugins.ops.sparse_attention.native_inputs import ATTENTION_WEIGHTS, attention_inputs

pytestmark = built

SIZES = [  # D, H, n_kv, d, capacity, B, S, lengths, count; groups to choose from
    ((41, 1, 1, 2, 1, 1, 1, (1,), 1), 1),
    ((41, 1, 1, 2, 1, 1, 1, (1,), 0), 1),
    ((41, 6, 3, 6, 9, 1, 1, (9,), 4), 3),
    ((64, 4, 2, 16, 21, 1, 2, (20,), 0), 4),
    ((64, 4, 2, 16, 21, 1, 1, (20,), 3), 4),
    ((72, 9, 3, 8, 33, 3, 17, (17, 18, 33), 3), 3),
    ((72, 9, 3, 8, 33, 1, 1, (30,), 5), 9),
    ((123, 6, 3, 20, 40, 2, 5, (5, 31), 6), 6),
    ((576, 9, 3, 64, 300, 1, 1, (257,), 3), 9),
    ((576, 9, 3, 64, 300, 1, 1, (257,), 6), 3),
    ((576, 9, 3, 64, 64, 4, 1, (64, 1, 7, 40), 9), 9),
    ((576, 9, 3, 64, 64, 4, 1, (64, 1, 7, 40), 2), 9),
]
LLAMA = SIZES[5][0]


@pytest.mark.parametrize("choosing", [False, True], ids=["given", "chosen"])
@pytest.mark.parametrize(
    ("form", "size", "groups", "rest"),
    [("llama-biases", *case, rest) for case in SIZES for rest in (0, 1)]
    + [(form, *SIZES[place], 1) for form in ("llama", "opt") for place in (5, 8)],
    ids=str,
)
def test_mixed_attention(form, size, groups, rest, choosing, isa):
    inputs = mixed_inputs(form, size, rest=rest, groups=groups if choosing else 0)
    for batch, length in enumerate(size[7]):  # cache entries after the end of the sequence must not be read
        inputs["key"][batch, :, length:] = inputs["value"][batch, :, length:] = 1e30
    check(inputs, size[1], rounds=isa != "portable")


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("size", [LLAMA, (72, 9, 3, 8, 33, 1, 1, (30,), 3)], ids=str)
def test_full_rows_of_two_bytes(size, dtype, isa):
    inputs = stored(mixed_inputs("llama-biases", size, groups=9), ATTENTION_WEIGHTS, dtype)
    check(inputs, 9, rounds=isa != "portable")


@pytest.mark.parametrize("block", [32, 96, 128])
@pytest.mark.parametrize("size", [LLAMA, (72, 9, 3, 8, 33, 1, 1, (30,), 3)], ids=str)
def test_other_blocks_of_the_copy_are_not_rounded(size, block, isa):
    check(with_copy(attention_inputs("llama", size), q=Quantisation(4, block)), 9, rounds=False)


def test_one_result_with_any_threads_and_any_source(isa):
    inputs = mixed_inputs("llama-biases", (576, 9, 3, 64, 300, 1, 1, (257,), 3), groups=9)
    expected = run_all("SparseAttention", inputs, MIXED_WEIGHTS, 1, n_heads=9, layer=0)
    for weights, threads in ((MIXED_WEIGHTS, 2), (MIXED_WEIGHTS, 3), ((), 1)):
        found = run_all("SparseAttention", inputs, weights, threads, n_heads=9, layer=0)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("groups", [0, 9])
def test_everything_full_reads_no_copy(groups, isa):
    """The result is that of the op without a copy, bit for bit, and the copy may be spoilt."""
    size = (*LLAMA[:-1], 9)
    inputs = mixed_inputs("llama", size, groups=groups)
    inputs["cs_q"] = inputs["cs_o"] = np.full_like(inputs["cs_q"], np.nan)
    expected = run("SparseAttention", attention_inputs("llama", size), ATTENTION_WEIGHTS, n_heads=9, layer=0)
    found, chosen = run_all("SparseAttention", inputs, MIXED_WEIGHTS, n_heads=9, layer=0)
    np.testing.assert_array_equal(found, expected)
    assert chosen.tolist() == list(range(9))


@pytest.mark.parametrize("seqlen", [1, 3])
def test_ties_go_to_the_lower_group(seqlen, isa):
    inputs = mixed_inputs("llama", (64, 12, 3, 8, 33, 1, seqlen, (17,), 6), groups=6)
    inputs["score_weight"][:] = inputs["score_weight"][0]
    inputs["score_bias"] = np.asarray([0, 0, 0, 0, 1, 0], dtype=np.float32)
    _, chosen = run_all("SparseAttention", inputs, MIXED_WEIGHTS, n_heads=12, layer=0)
    assert chosen.tolist() == [0, 1, 2, 3, 8, 9] + 6 * [-1]


def test_repeated_indices_count_twice_and_hide_no_head(isa):
    inputs = mixed_inputs("llama", (72, 3, 3, 8, 33, 1, 2, (17,), 3))
    inputs |= {"indices": ints(2, 2, 0, 2, 1), "count": scalar(4)}
    y, chosen = run_all("SparseAttention", inputs, MIXED_WEIGHTS, n_heads=3, layer=0)
    apart = []
    for indices in ([0, 2], [2], [2]):
        one = inputs | {"indices": ints(*indices), "count": scalar(len(indices)), "rest": scalar(len(indices) - 1)}
        apart.append(run("SparseAttention", one, MIXED_WEIGHTS, n_heads=3, layer=0))
    np.testing.assert_allclose(y, sum(apart), atol=1e-5)
    assert chosen.tolist() == [2, 2, 0]


@pytest.mark.parametrize("groups", [0, 9], ids=["given", "chosen"])
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_no_number_is_not_hidden(value, count, groups, isa):
    inputs = mixed_inputs("llama", (128, 9, 3, 8, 33, 1, 1, (17,), count), groups=groups)
    inputs["x"][0, 0, 70] = value
    assert not np.isfinite(run("SparseAttention", inputs, MIXED_WEIGHTS, n_heads=9, layer=0)).any()


@pytest.mark.parametrize(("batch", "seqlen"), [(0, 3), (2, 0)])
def test_no_tokens(batch, seqlen):
    inputs = mixed_inputs("llama", (41, 6, 3, 8, 9, batch, seqlen, batch * (4,), 4), groups=3)
    y, chosen = run_all("SparseAttention", inputs, MIXED_WEIGHTS, n_heads=6, layer=0)
    assert y.shape == (batch, seqlen, 41)
    assert chosen.tolist() == [0, 1, 2, 3, -1, -1]


def refused(inputs, words):
    with pytest.raises(REFUSED, match=f"SparseAttention layer 11: {words}"):
        run("SparseAttention", inputs, MIXED_WEIGHTS, n_heads=6, layer=11)


SIZE = (123, 6, 3, 20, 40, 2, 5, (5, 31), 4)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("c_q",), "c_q and cs_q must stand together"),
        (("cs_o",), "c_o and cs_o must stand together"),
        (("c_o", "cs_o"), "c_q and c_o must stand together"),
        (COPIES, "rest is 1, but there is no low-bit copy"),
        (("score_weight",), "without indices, the heads are chosen with score_weight and score_bias"),
        (("score_bias",), "without indices, the heads are chosen with score_weight and score_bias"),
    ],
)
def test_parts_that_are_missing_are_named(names, words):
    refused(mixed_inputs("llama-biases", SIZE, groups=3) | dict.fromkeys(names), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"count": scalar(8)}, r"count 8 is outside 0\.\.6"),
        ({"count": scalar(-2)}, r"count -2 is outside 0\.\.6"),
        ({"count": scalar(3)}, "count 3 is no multiple of the 2 heads that are chosen together"),
        ({"count": ints(2, 2, 2)}, "count has 3 elements, not 1 or 2"),
        ({"rest": ints(1, 1)}, "rest has 2 elements, not 1"),
        ({"score_weight": zeros(4, 123)}, "6 heads do not divide among the 4 rows of score_weight"),
        ({"score_weight": zeros(0, 123)}, "6 heads do not divide among the 0 rows of score_weight"),
        ({"score_weight": zeros(3, 122)}, r"score_weight has shape \(3, 122\), not \(3, 123\)"),
        ({"score_bias": zeros(6)}, r"score_bias has shape \(6\), not \(3\)"),
        ({"cs_q": zeros(120, 1)}, r"cs_q has shape \(120, 1\), not \(120, 2\)"),
        ({"c_o": np.zeros((120, 3, 32), np.uint8)}, r"c_o has shape \(120, 3, 32\), not \(120, 2, 32\)"),
        ({"c_q": np.zeros((120, 64), np.uint8)}, r"c_q has shape \(120, 64\), not \(rows, blocks, bytes\)"),
    ],
)
def test_wrong_inputs_are_named(changes, words):
    refused(mixed_inputs("llama-biases", SIZE, groups=3) | changes, words)
