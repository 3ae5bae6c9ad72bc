"""Compares the native op with its parts, run one by one, and with the NumPy reference; see `native_model`."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.bundle.quantisation import NESTED
from shadowllm.plugins.ops.decoder_layer.reference import decoder_layer
from shadowllm.plugins.registry import NATIVE_SCHEMAS
from tests.plugins.native_model import REFUSED, built, ints, make_session, ort, run_all, scalar, zeros
from tests.plugins.ops.decoder_layer.native_inputs import REPLACED, WEIGHTS, Size, in_parts, layer_inputs
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_FORMS

pytestmark = built

SIZES = [
    Size(1, 1, 2, 1, 1, 1, (0,), 1),
    Size(3, 3, 6, 20, 9, 1, (8,)),
    Size(6, 3, 20, 100, 33, 5, (4, 30)),
    Size(9, 3, 64, 576, 200, 1, (39, 0, 17)),
    Size(4, 2, 16, 128, 65, 11, (39,)),
]


def attributes(size, form="llama", **more):
    return {"n_heads": size.heads, "activation": MLP_FORMS[form][0], "epsilon": 1e-3} | more


def assert_close(found, wanted, tolerance):
    assert found.shape == wanted.shape
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("form", "options", "window"),
    [
        ("llama", {}, 0),
        ("llama-biases", {"rope": False}, 3),
        ("galactica", {"choosing": False}, 0),
        ("llama", {"q": NESTED["int6"]}, 0),
        ("llama", {"q": NESTED["int8"], "choosing": False}, 400),
        ("relu-gated", {"q": None}, 0),
    ],
    ids=str,
)
def test_layer_equals_its_parts(size, form, options, window, isa):
    inputs = layer_inputs(size, form, **options)
    wanted = in_parts(inputs, **attributes(size, form, window=window))
    more = {"layer": 1, "exact_copies": 1, "window": window}
    found = run_all("DecoderLayer", inputs, WEIGHTS, threads=2, **attributes(size, form, **more))
    assert_close(found[0], wanted[0], 1e-4)
    for ours, theirs in zip(found[1:3], wanted[1:3], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found[3], wanted[3])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference(size, isa):
    """The reference rounds inputs of linear layers to 8 bits, and those of the copy not."""
    inputs = layer_inputs(size, q=None, choosing=False)
    found = run_all("DecoderLayer", inputs, WEIGHTS, threads=2, layer=1, **attributes(size))
    wanted = decoder_layer(**inputs, **attributes(size))
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, 0.02)


@pytest.mark.parametrize("bits", ["int8", "int6"])
@pytest.mark.parametrize("size", [SIZES[3], Size(9, 3, 64, 576, 88, 3, (39, 7))], ids=str)
def test_one_result_from_any_source(size, bits, isa):
    """Only of constant weights are there tiles, in which whole groups of rows are read."""
    inputs = layer_inputs(size, q=NESTED[bits])
    fed = tuple(name for name in WEIGHTS if not name.endswith("_copy") and not name.startswith("mlp_c_"))
    constant, given = (run_all("DecoderLayer", inputs, names, layer=1, **attributes(size)) for names in (WEIGHTS, fed))
    for one, other in zip(constant, given, strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_outputs_the_cache_is_written_to_its_inputs():
    size = SIZES[3]
    inputs, options = layer_inputs(size), {"layer": 1, **attributes(size)}
    wanted = run_all("DecoderLayer", inputs, WEIGHTS, **options)
    session = make_session("DecoderLayer", inputs, WEIGHTS, outputs=None, absent=("key", "value"), **options)
    feeds = {value.name: ort.OrtValue.ortvalue_from_numpy(inputs[value.name].copy()) for value in session.get_inputs()}
    y, chosen = session.run_with_ort_values(None, feeds)
    np.testing.assert_array_equal(y.numpy(), wanted[0])
    np.testing.assert_array_equal(chosen.numpy(), wanted[3])
    for name, cache in zip(("attention_past_key", "attention_past_value"), wanted[1:3], strict=True):
        np.testing.assert_array_equal(feeds[name].numpy(), cache)


@pytest.mark.parametrize("size", [SIZES[2], SIZES[3]], ids=str)
def test_a_sequence_has_the_same_bits_alone(size, isa):
    inputs, batch = layer_inputs(size), len(size.last)
    counts = np.arange(1, batch + 1, dtype=np.int32)
    inputs |= {"mlp_count": counts, "mlp_rest": np.ones(batch, np.int32)}
    together = run_all("DecoderLayer", inputs, WEIGHTS, threads=2, layer=1, **attributes(size))
    for row in range(batch):
        own = {f"attention_{name}": inputs[f"attention_{name}"][row : row + 1] for name in ("past_key", "past_value")}
        own |= {"attention_last": inputs["attention_last"][row : row + 1], "mlp_count": counts[row : row + 1]}
        tokens = np.s_[row * size.seqlen : (row + 1) * size.seqlen]
        own |= {"x": inputs["x"][tokens], "mlp_rest": np.ones(1, np.int32)}
        alone = run_all("DecoderLayer", inputs | own, WEIGHTS, layer=1, **attributes(size))
        np.testing.assert_array_equal(together[0][tokens], alone[0])
        for several, one in zip(together[1:], alone[1:], strict=True):
            np.testing.assert_array_equal(several[row : row + 1], one)


def test_more_threads_than_cores_give_the_same_bits():
    """Run often, because threads join and leave the team at any moment."""
    size = SIZES[3]
    inputs = layer_inputs(size)
    wanted = run_all("DecoderLayer", inputs, WEIGHTS, threads=1, layer=1, **attributes(size))
    session = make_session("DecoderLayer", inputs, WEIGHTS, threads=7, outputs=None, layer=1, **attributes(size))
    feeds = {value.name: inputs[value.name] for value in session.get_inputs()}
    for _ in range(50):
        for ours, theirs in zip(session.run(None, feeds), wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_bound_cache_is_written_in_place():
    size = SIZES[2]
    inputs = layer_inputs(size)
    wanted = run_all("DecoderLayer", inputs, WEIGHTS, layer=1, **attributes(size))
    session = make_session("DecoderLayer", inputs, WEIGHTS, outputs=None, layer=1, **attributes(size))
    binding = session.io_binding()
    caches = {name: ort.OrtValue.ortvalue_from_numpy(inputs[f"attention_past_{name}"]) for name in ("key", "value")}
    for value in session.get_inputs():
        if not value.name.startswith("attention_past_"):
            binding.bind_cpu_input(value.name, inputs[value.name])
    for name, cache in caches.items():
        binding.bind_ortvalue_input(f"attention_past_{name}", cache)
        binding.bind_ortvalue_output(name, cache)
    for name in ("y", "chosen"):
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    for name, expected in zip(("key", "value"), wanted[1:3], strict=True):
        np.testing.assert_array_equal(caches[name].numpy(), expected)


def test_no_sequence():
    size = Size(6, 3, 4, 24, 5, 1, ())
    found = run_all("DecoderLayer", layer_inputs(size), WEIGHTS, layer=1, **attributes(size))
    assert [array.shape for array in found] == [(0, 24), (0, 3, 40, 4), (0, 3, 40, 4), (5,)]


QKV_OF_239_ROWS = {
    "qkv_w": np.zeros((239, 64), np.uint8),
    "qkv_copy": np.zeros((239, 2, 32), np.uint8),
    "qkv_scales": zeros(239, 2),
    "qkv_bias": None,
}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": zeros(10, 1, 100)}, "DecoderLayer layer 7: x has 3 dimensions, not 2"),
        ({"norm": zeros(99)}, r"DecoderLayer layer 7: norm has shape \(99\), not \(100\)"),
        ({"post_norm": zeros(100, 1)}, r"post_norm has shape \(100, 1\), not \(100\)"),
        ({"out_copy": np.zeros((99, 2, 32), np.uint8)}, "DecoderLayer layer 7: out_copy has 99 rows, not 100"),
        (QKV_OF_239_ROWS, "CachedAttention"),
        ({"out_scales": zeros(100, 3)}, r"NestedLinear: scales has shape \(100, 3\)"),
        ({"attention_last": ints(4, 40)}, "CachedAttention: last of row 1 40 is outside"),
        ({"attention_past_key": zeros(2, 3, 40)}, "CachedAttention: past_key has 3 dimensions"),
        ({"mlp_count": scalar(34)}, r"SparseMLP layer 7: count 34 is outside 0\.\.33"),
        ({"mlp_down_norms": None}, "SparseMLP layer 7: without indices"),
    ],
    ids=str,
)
@pytest.mark.parametrize("threads", [1, 2])
def test_refuses(changes, words, threads):
    inputs = layer_inputs(SIZES[2]) | changes
    with pytest.raises(REFUSED, match=words):
        run_all("DecoderLayer", inputs, threads=threads, layer=7, **attributes(SIZES[2]))


def test_results_of_parts_are_no_inputs():
    absent = {port.name for port in NATIVE_SCHEMAS["DecoderLayer"].inputs if port.optional}
    assert absent.issuperset(REPLACED)
    assert absent.isdisjoint(("qkv_w", "attention_last", "out_scales", "mlp_count"))
