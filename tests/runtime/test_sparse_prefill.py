"""ONNX Runtime without the dense graph: the graphs of a sparse step prefill and decode with everything active."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from shadowllm.errors import UserError
from shadowllm.runtime import Budget, open_session
from shadowllm.runtime.ort.session import OrtSession
from tests.runtime.test_sessions import logits_of

PROMPTS = [[5, 17, 42, 8, 61], [9, 30], list(range(3, 40))]


def without_dense_graph(bundle, folder):
    copy = shutil.copytree(bundle, folder / "bundle")
    (copy / "dense.onnx").unlink()
    return copy


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("llama-gqa", {"kind": "shadow"}),
        ("opt", {"kind": "static"}),
        ("opt", {"kind": "layerwise", "rest": "shadow"}),
        ("llama-blocks", {"kind": "quantized-shadow", "rest": "shadow", "dtype": "bfloat16"}),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_sparse_graphs_prefill_like_the_dense_one(bundle, tmp_path, variant, options, native):
    folder = bundle(variant, **options)
    budget = Budget(neurons=0.3, heads=0.5, shortlist=5 if "rest" in options else None)
    alone = without_dense_graph(folder, tmp_path)
    with (
        OrtSession(folder, "sparse", native=native, exact=True) as first,
        OrtSession(alone, "sparse", native=native, exact=True, prefill="sparse") as second,
    ):
        found = []
        for session in (first, second):
            session.set_budget(budget)
            found.append(logits_of(session, PROMPTS, [3, 90, 14]))
    assert np.abs(found[0] - found[1]).max() < 1e-4 * np.abs(found[0]).max()


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("llama-blocks", {"weight_dtype": "int8", "rest": "shadow", "kind": "quantized-shadow"}),
        ("opt-blocks", {"weight_dtype": "int4", "kind": "shadow"}),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_integer_weights_prefill_as_they_decode(bundle, tmp_path, variant, options, native):
    # The dense graph rounds some matrices along another axis, so it gives other logits.
    alone = without_dense_graph(bundle(variant, **options), tmp_path)
    with OrtSession(alone, "sparse", native=native, exact=True, prefill="sparse") as session:
        session.set_budget(Budget())
        prefilled = logits_of(session, [PROMPTS[2]], [3, 90])
        decoded = logits_of(session, [PROMPTS[2][:1]], [*PROMPTS[2][1:], 3, 90])
    tolerance = 3e-4 if native else 1e-5  # native integer rows may round the input of one token to 16 bits
    assert np.abs(prefilled - decoded[-3:]).max() < tolerance * np.abs(decoded).max()


@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_a_budget_that_does_not_pay_decodes_with_everything_active(bundle, tmp_path, weight_dtype):
    folder = bundle("llama-blocks", kind="quantized-shadow", rest="shadow", weight_dtype=weight_dtype)
    alone = without_dense_graph(folder, tmp_path)
    with OrtSession(alone, exact=True, prefill="sparse") as session, OrtSession(folder, "sparse", exact=True) as full:
        session.set_budget(Budget(neurons=0.2, heads=0.5, shortlist=3))
        assert session.decodes == "sparse"
        few = logits_of(session, PROMPTS, [3, 90])
        session.set_budget(Budget(neurons=0.99))
        assert session.decodes == "dense"
        assert session.recomputed is None
        found = logits_of(session, PROMPTS, [3, 90])
        full.set_budget(Budget())
        expected = logits_of(full, PROMPTS, [3, 90])
    tolerance = 0.05 if weight_dtype else 1e-5
    assert np.abs(found - expected).max() < tolerance * np.abs(expected).max()
    assert np.abs(few - expected)[1:].max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("backend", ["ort-dense", "torch", "triton", "tensorrt_rtx"])
def test_other_backends_refuse_it(bundle, backend):
    with pytest.raises(UserError, match="does not prefill with sparse graphs"):
        open_session(bundle(), backend, prefill="sparse")


def test_a_dense_session_refuses_it(bundle):
    with pytest.raises(UserError, match="a dense session has no sparse graphs"):
        OrtSession(bundle(), "dense", prefill="sparse")
