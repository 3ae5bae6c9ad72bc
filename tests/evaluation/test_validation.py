"""Compares exported graphs with the PyTorch reference on the original checkpoint, for every variant and type."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from shadowllm.bundle.manifest import DATA_FILE, file_hash, read_manifest
from shadowllm.bundle.predictor_file import Predictor
from shadowllm.bundle.weights import PREDICTOR_FILE
from shadowllm.errors import UserError
from shadowllm.evaluation.transformers_check import compare_with_transformers
from shadowllm.evaluation.validation import selection_masks, validate, validate_apart
from shadowllm.models.registry import load_model
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort.session import OrtSession
from tests.bundles import make_bundle
from tests.conftest import VARIANTS
from tests.models.checkpoints import copied, rewrite

pytestmark = pytest.mark.slow

# Three layers deep, float32 noise is a few units in the seventh place.
TIGHT = 1e-5


def check(bundle, model, tolerance=TIGHT):
    return validate(bundle, load_model(model)[1], Predictor.load(bundle / PREDICTOR_FILE), tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_graphs_reproduce_the_model(bundle, checkpoint, variant):
    found = check(bundle(variant), checkpoint(variant))
    assert [error["output"] for error in found["errors"]] == [
        f"{case}: {output}" for case in ("dense", "all active", "at budget") for output in ("logits", "cache")
    ]
    assert all(error["greedy_agreement"] in (1.0, None) for error in found["errors"])


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        *((variant, "quantized-shadow") for variant in ("qwen3", "gemma3", "smollm3", "phi3", "opt-post-norm")),
        *(("qwen3", "layerwise"), ("smollm3", "shadow"), ("granite", "shadow")),
    ],
)
def test_graphs_that_differ_from_llamas(bundle, checkpoint, variant, kind):
    rest = "shadow" if kind == "quantized-shadow" else "drop"
    found = check(bundle(variant, kind=kind, rest=rest), checkpoint(variant))
    assert found["selection_agreement"] == 1.0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("variant", ["llama-biases", "opt"])
def test_16_bit_graphs_reproduce_the_rounded_model(bundle, checkpoint, variant, dtype):
    check(bundle(variant, dtype), checkpoint(variant))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_activations_beyond_float16_are_named_by_layer(checkpoint, tmp_path, dtype):
    model, out = copied(checkpoint("llama-gqa"), tmp_path / "model"), tmp_path / "out"
    rewrite(model, lambda tensors: {n: t * 3e4 if "1.mlp.down_proj" in n else t for n, t in tensors.items()})
    out.mkdir()
    make_bundle(model, out, dtype)
    if dtype == "bfloat16":
        check(out, model, tolerance=1e-4)
        return
    with pytest.raises(UserError, match=r"layer 1 computes .* --dtype bf16"):
        check(out, model, tolerance=1e-4)


@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["llama-blocks", "opt-blocks"])
def test_integer_graphs_reproduce_the_rounded_model(bundle, checkpoint, variant, weight_dtype):
    # The fastest kernels round inputs to 16 bits. The others must stay within the noise of float32.
    fastest = native_ops.kernels()[:1] == ("avx512vnni",)
    check(bundle(variant, weight_dtype=weight_dtype), checkpoint(variant), 3e-4 if fastest else TIGHT)


@pytest.mark.parametrize("weight_dtype", ["int8", "int6"])
@pytest.mark.parametrize(("variant", "kind"), [("llama-gqa", "quantized-shadow"), ("opt", "shadow")])
def test_nested_graphs_reproduce_the_rounded_model(bundle, checkpoint, variant, kind, weight_dtype):
    """The hidden sizes are no multiples of a block, so rows are padded."""
    check(bundle(variant, weight_dtype=weight_dtype, kind=kind, rest="shadow"), checkpoint(variant))


@pytest.mark.parametrize("isa", [isa for isa in ("avx512", "portable") if isa in native_ops.kernels()])
def test_integer_graphs_with_exact_kernels(bundle, checkpoint, isa, monkeypatch):
    monkeypatch.setenv(native_ops.ISA_VARIABLE, isa)
    check(bundle("llama-blocks", weight_dtype="int4"), checkpoint("llama-blocks"))


# Each variant with one of the kinds; `test_layers_choose_with_16_bit_weights` has both at one variant.
@pytest.mark.parametrize(
    ("variant", "kind"),
    [(variant, ("layerwise", "quantized-shadow")[place % 2]) for place, variant in enumerate(VARIANTS)],
)
def test_layers_choose_in_the_graph_as_in_the_reference(bundle, checkpoint, variant, kind):
    assert check(bundle(variant, kind=kind), checkpoint(variant))["selection_agreement"] == 1.0


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        *(("llama-gqa", kind) for kind in ("static", "shadow", "layerwise", "quantized-shadow")),
        ("llama-mqa-tied", "quantized-shadow"),
        ("opt", "layerwise"),  # each head is a group
    ],
)
def test_whole_groups_are_chosen_as_in_the_reference(bundle, checkpoint, variant, kind):
    folder = bundle(variant, kind=kind, head_unit="kv_group")
    assert check(folder, checkpoint(variant))["selection_agreement"] == 1.0
    spec = read_manifest(folder).spec
    with OrtSession(folder, "sparse") as session:
        session.prefill([[5, 17]])
        session.decode(np.array([3]))
        masks = selection_masks(session.selection, spec)["heads"].unflatten(-1, (spec.n_kv_heads, -1))
    assert masks.all(dim=-1).equal(masks.any(dim=-1))
    assert masks.all(dim=-1).sum(dim=-1).tolist() == [[max(1, spec.n_kv_heads // 2)]] * 2


@pytest.mark.parametrize("kind", ["layerwise", "quantized-shadow"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layers_choose_with_16_bit_weights(bundle, checkpoint, dtype, kind):
    check(bundle("llama-biases", dtype, kind=kind), checkpoint("llama-biases"))


@pytest.mark.parametrize("kind", ["layerwise", "quantized-shadow"])
def test_layers_choose_with_integer_weights(bundle, checkpoint, kind):
    folder = bundle("llama-blocks", weight_dtype="int8", kind=kind)
    check(folder, checkpoint("llama-blocks"), 3e-4)


@pytest.mark.parametrize("variant", ["llama-gqa", "opt"])
def test_static_predictor(bundle, checkpoint, variant):
    assert check(bundle(variant, kind="static"), checkpoint(variant))["selection_agreement"] == 1.0


def test_a_wrong_weight_fails(bundle, checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(bundle(), broken)
    data = np.memmap(broken / DATA_FILE, dtype=np.float32, mode="r+")
    data[len(data) // 2 : len(data) // 2 + 64] += 0.5
    data.flush()
    manifest = read_manifest(broken)
    manifest.files[DATA_FILE] = file_hash(broken / DATA_FILE)
    manifest.write(broken)
    with pytest.raises(UserError, match="do not reproduce the model"):
        check(broken, checkpoint("llama-gqa"), tolerance=1e-4)


def test_another_predictor_fails(bundle, checkpoint):
    weights = load_model(checkpoint("llama-gqa"))[1]
    predictor = Predictor.load(bundle() / PREDICTOR_FILE)
    predictor.tensors["neurons.bias"] = -predictor.tensors["neurons.bias"]
    predictor.tensors["neurons.weight"] = -predictor.tensors["neurons.weight"]
    with pytest.raises(UserError, match="selects only"):
        validate(bundle(), weights, predictor)


def test_apart_reports_the_same(bundle, checkpoint):
    found = validate_apart(bundle("opt"), checkpoint("opt"), TIGHT)
    _, weights, opened = load_model(checkpoint("opt"))
    assert found.pop("transformers") == compare_with_transformers(opened, weights)
    assert found == check(bundle("opt"), checkpoint("opt"))


def test_apart_passes_a_user_error_on(checkpoint, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        validate_apart(tmp_path, checkpoint("opt"))
