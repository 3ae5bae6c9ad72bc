"""The native op with nested integers: residuals complete the low-bit copy; see `mixed_inputs`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowllm.bundle.quantisation import NESTED, Quantisation
from tests.plugins.native_model import REFUSED, built, run, run_all
from tests.plugins.ops.sparse_attention.mixed_inputs import MIXED_WEIGHTS, check, mixed_inputs

pytestmark = built
FORMATS = pytest.mark.parametrize("q", NESTED.values(), ids=NESTED)

SIZES = [  # D, H, n_kv, d, capacity, B, S, lengths, count; groups to choose from
    ((41, 1, 1, 2, 1, 1, 1, (1,), 0), 1),
    ((41, 6, 3, 6, 9, 1, 1, (9,), 4), 3),
    ((64, 4, 2, 16, 21, 1, 2, (20,), 0), 4),
    ((72, 9, 3, 8, 33, 3, 17, (17, 18, 33), 3), 3),
    ((123, 6, 3, 20, 40, 2, 5, (5, 31), 6), 6),
    ((576, 9, 3, 64, 300, 1, 1, (257,), 3), 9),
    ((576, 9, 3, 64, 64, 4, 1, (64, 1, 7, 40), 2), 9),
    ((576, 9, 3, 64, 64, 1, 1, (64,), 9), 9),
]


@FORMATS
@pytest.mark.parametrize("choosing", [False, True], ids=["given", "chosen"])
@pytest.mark.parametrize("rest", [0, 1])
@pytest.mark.parametrize(("size", "groups"), SIZES, ids=str)
def test_nested_attention(size, groups, rest, choosing, q, isa):
    form = "opt" if size[0] == 123 else "llama-biases"
    inputs = mixed_inputs(form, size, rest=rest, groups=groups if choosing else 0, q=q)
    check(inputs, size[1], rounds=isa != "portable")
    check(inputs, size[1], rounds=False, exact_copies=1)


@pytest.mark.parametrize(("size", "groups"), SIZES[-3:], ids=str)
def test_exact_products_of_blocks_of_32(size, groups, isa):
    """Residuals of 2 bits have no kernel that reads inputs of 16 bits, as other rows in such blocks have."""
    inputs = mixed_inputs("llama-biases", size, groups=groups, q=replace(NESTED["int6"], block=32))
    check(inputs, size[1], rounds=False, exact_copies=1)
    # Scales with more digits than bfloat16 has are not stored in 16 bits. Then no input is rounded either.
    scales = {name: value * np.float32(1.001) for name, value in inputs.items() if name.startswith("cs_")}
    check(inputs | scales, size[1], rounds=False)


@FORMATS
def test_one_result_with_any_threads_and_any_source(q, isa):
    inputs = mixed_inputs("llama-biases", SIZES[5][0], groups=9, q=q)
    expected = run_all("SparseAttention", inputs, MIXED_WEIGHTS, 1, n_heads=9, layer=0)
    for weights, threads in ((MIXED_WEIGHTS, 2), ((), 1)):
        found = run_all("SparseAttention", inputs, weights, threads, n_heads=9, layer=0)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@FORMATS
@pytest.mark.parametrize("block", [32, 96])
def test_other_blocks_are_not_rounded(block, q, isa):
    q = Quantisation(q.bits, block, q.residual_bits)
    check(mixed_inputs("llama", SIZES[1][0], q=q), 6, rounds=False)


@FORMATS
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"w_q": np.zeros((36, 40), np.uint8)}, r"w_q has shape \(36, 40\), not \(36, 32\)"),
        ({"w_o": np.zeros((36, 41), np.float32)}, "one matrix is a residual of the low-bit copy, and the other is not"),
    ],
)
def test_wrong_inputs_are_named(changes, words, q):
    inputs = mixed_inputs("llama", SIZES[1][0], q=q) | changes
    with pytest.raises(REFUSED, match=f"SparseAttention layer 11: {words}"):
        run("SparseAttention", inputs, MIXED_WEIGHTS, n_heads=6, layer=11)
