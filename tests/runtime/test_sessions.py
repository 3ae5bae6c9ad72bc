"""Sessions: the same results on every backend, dense results at full budget, and errors for wrong inputs."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from shadowllm.bundle.manifest import DATA_FILE, read_manifest
from shadowllm.bundle.weights import read_weights
from shadowllm.errors import UserError
from shadowllm.plugins import native_ops
from shadowllm.runtime import Budget, generate, open_session, torch_session
from shadowllm.runtime.ort import kv_cache
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.torch_session import TorchSession
from tests.bundles import read_only

PROMPT = [5, 17, 42, 8, 61]


def logits_of(session, prompts, forced):
    """Logits after the prompts and after each forced token, ``(steps, batch, vocab_size)``."""
    session.reset(len(prompts))
    found = [session.prefill(prompts).copy()]
    for token in forced:
        found.append(session.decode(np.full(len(prompts), token, dtype=np.int64)).copy())
    return np.stack(found)


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-biases", "llama-head-dim-16", "opt"])
@pytest.mark.parametrize("kind", [OrtSession, TorchSession.open], ids=["ort", "torch"])
def test_full_budget_equals_dense(bundle, variant, kind):
    forced = [3, 90, 14, 14, 55]
    with kind(bundle(variant), "sparse") as sparse, open_session(bundle(variant), "torch-dense") as dense:
        sparse.set_budget(Budget())
        found, expected = logits_of(sparse, [PROMPT], forced), logits_of(dense, [PROMPT], forced)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_a_dense_session_keeps_one_copy_of_the_model(bundle, monkeypatch):
    folder = bundle("llama-blocks", kind="quantized-shadow", weight_dtype="int8", rest="shadow")
    with TorchSession.open(folder, "dense") as session:
        expected = logits_of(session, [PROMPT], [3])
    monkeypatch.setattr(torch_session, "read_weights", read_only("dense"))
    with TorchSession.open(folder, "dense") as session:
        assert np.array_equal(logits_of(session, [PROMPT], [3]), expected)


@pytest.mark.parametrize(
    ("variant", "weight_dtype", "predictor"),
    [
        ("llama-gqa", None, "shadow"),
        ("opt", None, "shadow"),
        ("llama-blocks", "int4", "shadow"),
        ("opt-blocks", "int8", "shadow"),
        ("llama-gqa", None, "quantized-shadow"),
        ("opt-blocks", "int8", "quantized-shadow"),
        ("llama-gqa", None, "layerwise"),
        ("opt-blocks", "int4", "layerwise"),
    ],
)
@pytest.mark.parametrize("native", [True, False])
def test_backends_agree_at_a_small_budget(bundle, variant, weight_dtype, predictor, native):
    folder = bundle(variant, weight_dtype=weight_dtype, kind=predictor)
    with OrtSession(folder, "sparse", native=native, exact=True) as first, open_session(folder, "torch") as second:
        found = []
        for session in (first, second):
            session.set_budget(Budget(neurons=(0.25, 0.6), heads=(0.75, 0.5)))  # layer by layer
            found.append(logits_of(session, [PROMPT], [3, 90, 14]))
    tolerance = 3e-4 if native and weight_dtype else 1e-5  # native integer rows may round inputs to 16 bits
    assert np.abs(found[0] - found[1]).max() < tolerance * np.abs(found[1]).max()


@pytest.mark.parametrize(
    ("variant", "predictor"),
    [
        ("llama-gqa", "quantized-shadow"),
        ("llama-gqa", "static"),
        ("llama-biases", "layerwise"),
        ("llama-biases", "quantized-shadow"),
        ("opt", "quantized-shadow"),
        ("opt", "layerwise"),
        ("opt", "shadow"),
    ],
)
@pytest.mark.parametrize(
    "budget", [Budget(neurons=0.2, heads=0.5, shortlist=5), Budget(neurons=0.6, heads=0.5, rest="drop")]
)
@pytest.mark.parametrize("native", [True, False])
def test_backends_agree_with_a_rest_from_the_low_bit_copy(bundle, variant, predictor, budget, native):
    folder = bundle(variant, kind=predictor, rest="shadow")
    with OrtSession(folder, "sparse", native=native, exact=True) as first, open_session(folder, "torch") as second:
        found = []
        for session in (first, second):
            session.set_budget(budget)
            found.append(logits_of(session, [PROMPT], [3, 90, 14]))
    assert np.abs(found[0] - found[1]).max() < 1e-5 * np.abs(found[1]).max()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("rest", ["shadow", "drop"])
@pytest.mark.parametrize(
    ("variant", "predictor", "weight_dtype"),
    [("llama-blocks", "quantized-shadow", "int8"), ("opt", "shadow", "int8"), ("llama-gqa", "layerwise", "int6")],
)
def test_backends_agree_with_nested_weights(bundle, variant, predictor, weight_dtype, rest, native):
    folder = bundle(variant, kind=predictor, rest="shadow", weight_dtype=weight_dtype)
    with OrtSession(folder, "sparse", native=native, exact=True) as first, open_session(folder, "torch") as second:
        found = []
        for session in (first, second):
            session.set_budget(Budget(neurons=0.2, heads=0.5, shortlist=5, rest=rest))
            found.append(logits_of(session, [PROMPT], [3, 90, 14]))
    assert np.abs(found[0] - found[1]).max() < 1e-5 * np.abs(found[1]).max()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_backends_agree_with_a_rest_beside_rows_of_two_bytes(bundle, dtype, native):
    folder = bundle("llama-blocks", dtype=dtype, kind="quantized-shadow", rest="shadow")
    with OrtSession(folder, "sparse", native=native, exact=True) as first, open_session(folder, "torch") as second:
        found = []
        for session in (first, second):
            session.set_budget(Budget(neurons=0.2, heads=0.5, shortlist=5))
            found.append(logits_of(session, [PROMPT], [3, 90, 14]))
    assert np.abs(found[0] - found[1]).max() < 1e-5 * np.abs(found[1]).max()


@pytest.mark.parametrize("predictor", ["shadow", "layerwise"])
def test_a_network_is_read_in_the_type_of_the_graphs(bundle, predictor):
    folder = bundle("llama-blocks", dtype="bfloat16", kind=predictor)
    stored = read_weights(folder, read_manifest(folder)).predictor
    assert stored.learned
    for name in stored.learned:
        assert torch.equal(stored.tensors[name], stored.tensors[name].bfloat16().float())


def test_a_dense_session_takes_the_budget_of_a_mixed_one(bundle):
    folder = bundle("llama-gqa", kind="quantized-shadow", rest="shadow")
    for backend in ("torch-dense", "ort-dense"):
        with open_session(folder, backend) as session:
            plain = logits_of(session, [PROMPT], [3])
            session.set_budget(Budget(neurons=0.2, heads=0.5, shortlist=5, rest="shadow"))
            np.testing.assert_array_equal(logits_of(session, [PROMPT], [3]), plain)


def test_the_budget_changes_the_result_and_can_change_back(bundle):
    with open_session(bundle(), "ort") as session:

        def at(neurons):
            session.set_budget(Budget(neurons=neurons, heads=1.0))
            return logits_of(session, [PROMPT], [3, 90])

        whole, small, again = at(1.0), at(0.1), at(1.0)
    assert np.abs(whole[1:] - small[1:]).max() > 1e-2
    np.testing.assert_array_equal(whole, again)
    np.testing.assert_array_equal(whole[0], small[0])  # prefill is dense


def test_a_budget_that_leaves_nothing_out_is_decoded_dense(bundle):
    forced = [3, 90, 14]
    with open_session(bundle(), "ort") as session, open_session(bundle(), "ort-dense") as dense:
        expected = logits_of(dense, [PROMPT], forced)
        session.set_budget(Budget())
        assert session.decodes == "dense"
        np.testing.assert_allclose(logits_of(session, [PROMPT], forced), expected, atol=1e-5, rtol=0)
        session.set_budget(Budget(neurons=0.5))  # in the middle of a text, on the same cache
        assert session.decodes == "sparse"
        assert np.abs(session.decode(np.array([8])) - dense.decode(np.array([8]))).max() > 1e-3


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-head-dim-16"])  # the latter's attention is fused
@pytest.mark.parametrize("backend", ["ort", "ort-dense", "torch"])
def test_a_ragged_batch_equals_its_rows_alone(bundle, variant, backend):
    prompts = [PROMPT, PROMPT[:2], [9, 9, 30]]
    with open_session(bundle(variant, kind="static"), backend) as session:
        together = logits_of(session, prompts, [3, 90, 14])
        for row, prompt in enumerate(prompts):
            alone = logits_of(session, [prompt], [3, 90, 14])[:, 0]
            assert np.abs(together[:, row] - alone).max() < 1e-5 * np.abs(alone).max()


def test_the_cache_grows_and_keeps_its_contents(bundle, monkeypatch):
    forced = list(range(10, 40))
    with open_session(bundle(), "ort") as session:
        expected = logits_of(session, [PROMPT], forced)
        monkeypatch.setattr(kv_cache, "CACHE_BLOCK", 7)
        found = logits_of(session, [PROMPT], forced)
        assert session.cache["0.key"].shape[2] == 35
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_generation_stops_at_the_last_position(bundle):
    with open_session(bundle(), "ort") as session:
        prompt = [1] * (session.spec.max_seqlen - 3)
        assert len(list(generate(session, [prompt], 50))) == 4  # three in the free positions, one after them
        with pytest.raises(UserError, match="all 64 positions"):
            session.decode(np.array([1]))


def test_profile_names_the_parts(bundle):
    with open_session(bundle(), "ort", profile=True) as session:
        logits_of(session, [PROMPT], [3])
        assert set(session.step_seconds) == {"stem", "predictor", "body"}
        assert all(seconds > 0 for seconds in session.step_seconds.values())
        session.set_budget(Budget())
        session.decode(np.array([3]))
        assert set(session.step_seconds) == ({"stem+body"} if native_ops.library() else {"dense"})


@pytest.mark.parametrize("backend", ["ort", "torch"])
class TestAtTheDoor:
    @pytest.mark.parametrize(
        ("prompts", "words"),
        [
            ([[]], "empty"),
            ([[1], [2]], "2 prompts"),
            ([[97]], "token 97"),
            ([[-1]], "token -1"),
            ([[1] * 65], "65 tokens"),
            ([[1.5, 2.0]], "not integers"),
            (None, "the prompts are None"),
            ([None], "not integers"),
            ([[[1], [2, 3]]], "not integers"),
        ],
    )
    def test_prefill_refuses(self, bundle, backend, prompts, words):
        with open_session(bundle(), backend) as session, pytest.raises(UserError, match=words):
            session.prefill(prompts)

    def test_decode_before_prefill(self, bundle, backend):
        with open_session(bundle(), backend) as session, pytest.raises(UserError, match="call prefill first"):
            session.decode(np.array([1]))

    @pytest.mark.parametrize("tokens", [np.array([1, 2]), np.array([1.5]), np.array([[1]]), [1], torch.tensor([1])])
    def test_decode_refuses_shapes_and_types(self, bundle, backend, tokens):
        with open_session(bundle(), backend) as session:
            session.prefill([PROMPT])
            with pytest.raises(UserError, match="decode takes a NumPy array of integers of shape"):
                session.decode(tokens)

    @pytest.mark.parametrize("tokens", [np.array([[1.5]]), np.array([1]), np.array([[1], [2]]), [[1]]])
    def test_verify_refuses_shapes_and_types(self, bundle, backend, tokens):
        with open_session(bundle(), backend) as session:
            session.prefill([PROMPT])
            with pytest.raises(UserError, match=r"verify takes a NumPy array of integers of shape \(1, seqlen\)"):
                session.verify(tokens)

    @pytest.mark.parametrize("batch", [0, -1, 1.5, True, 10**12])
    def test_reset_refuses(self, bundle, backend, batch):
        with open_session(bundle(), backend) as session, pytest.raises(UserError, match="the number of sequences is"):
            session.reset(batch)

    @pytest.mark.parametrize("lengths", [np.array([1.5]), np.array([6]), np.array([0]), np.array([1, 1]), 1])
    def test_rewind_refuses(self, bundle, backend, lengths):
        with open_session(bundle(), backend) as session:
            session.prefill([PROMPT])
            with pytest.raises(UserError, match=r"cannot be set back|takes a NumPy array, got int"):
                session.rewind(lengths)

    def test_a_session_that_was_left(self, bundle, backend):
        with open_session(bundle(), backend) as session:
            stream = generate(session, [PROMPT], 8)
            next(stream)
        with pytest.raises(UserError, match=r"not open|closed"):
            list(stream)
        session.reset()
        with pytest.raises(UserError, match=r"not open|closed"):
            session.prefill([PROMPT])
        session.__exit__(None, None, None)


def test_sparse_graphs_prefill_with_no_packed_weights(bundle):
    with pytest.raises(UserError, match="prefills with sparse graphs packs no weights; leave out one"):
        open_session(bundle(), prefill="sparse", prepack=True)


def test_an_unknown_prefill(bundle):
    with pytest.raises(UserError, match="unknown kind of prefill 'spares'"):
        open_session(bundle(), prefill="spares")


@pytest.mark.parametrize("backend", ["ort", "ort-dense", "torch"])
def test_a_flipped_byte_is_refused(bundle, tmp_path, backend):
    broken = tmp_path / "broken"
    shutil.copytree(bundle(), broken)
    with (broken / DATA_FILE).open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(UserError, match="damaged"), open_session(broken, backend):
        pass


def test_graphs_that_were_swapped_are_refused(bundle, tmp_path):
    """Also if the manifest has their hashes."""
    swapped, names = tmp_path / "swapped", ["body.onnx", "stem.onnx"]
    shutil.copytree(bundle(), swapped)
    manifest = json.loads((swapped / "manifest.json").read_text())
    for name, other in zip(names, reversed(names), strict=True):
        (swapped / name).write_bytes((bundle() / other).read_bytes())
        manifest["files"][name] = read_manifest(bundle()).files[other]
    (swapped / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"stem\.onnx is damaged \(it is the graph 'body'\)"), open_session(swapped):
        pass


@pytest.mark.parametrize("backend", ["triton", "triton-dense", "tensorrt_rtx", "tensorrt"])
def test_threads_are_refused_where_they_do_nothing(bundle, backend):
    with pytest.raises(UserError, match="threads do nothing"):
        open_session(bundle(), backend, threads=1)


def test_threads_of_pytorch(bundle):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with open_session(bundle(), "torch", threads=1):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_unknown_backend(bundle):
    with pytest.raises(UserError, match="no backend 'cuda'"):
        open_session(bundle(), "cuda")
