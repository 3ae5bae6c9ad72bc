"""Compares the Triton session with the reference. Without a GPU, kernels run in Triton's interpreter."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install 'shadowllm[triton]')")

from shadowllm.errors import UserError
from shadowllm.plugins.triton.cache import write_cache
from shadowllm.runtime import Budget, generate, open_session
from shadowllm.runtime.generation.draft_length import DraftLength
from shadowllm.runtime.gpu.cuda_graph import kernel_device
from shadowllm.runtime.gpu.triton_session import TritonSession
from shadowllm.runtime.torch_session import TorchSession
from tests.runtime.gpu.reference import reference

pytestmark = pytest.mark.slow

PROMPTS = [[5, 17, 42], [8, 61]]
# For float32 results; a GPU adds in another order.
TOLERANCE = 1e-4 if torch.cuda.is_available() else 1e-5
FORCED = np.array([[3, 90], [14, 7]])


def steps(session, prompts, forced):
    """Logits after the prompts and after each row of forced tokens, ``(steps, batch, vocab_size)``."""
    session.reset(len(prompts))
    found = [session.prefill(prompts).copy()]
    return np.stack(found + [session.decode(tokens).copy() for tokens in forced])


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("variant", ["llama-gqa", "opt"])
def test_a_ragged_batch_at_a_budget_follows_the_reference(bundle, variant):
    budget = Budget(neurons=(0.25, 0.6), heads=(0.75, 0.5))
    with open_session(bundle(variant), "triton") as ours, reference(bundle(variant)) as theirs:
        for session in (ours, theirs):
            session.set_budget(budget)
        assert distance(steps(ours, PROMPTS, FORCED), steps(theirs, PROMPTS, FORCED)) < TOLERANCE


@pytest.mark.parametrize(
    "variant", ["llama-biases", "llama-mqa-tied", "opt-untied-no-bias", "smollm3", "gemma3", "opt-post-norm"]
)
def test_full_budget_equals_dense_and_the_budget_changes_in_mid_text(bundle, variant):
    with open_session(bundle(variant), "triton") as ours, reference(bundle(variant)) as theirs:
        ours.set_budget(Budget())
        with open_session(bundle(variant), "torch-dense") as dense:
            assert (
                distance(steps(ours, PROMPTS[:1], FORCED[:1, :1]), steps(dense, PROMPTS[:1], FORCED[:1, :1]))
                < TOLERANCE
            )
        theirs.set_budget(Budget())
        steps(theirs, PROMPTS[:1], FORCED[:1, :1])
        for session in (ours, theirs):
            session.set_budget(Budget(heads=0.5, neurons=0.3))
        after = [session.decode(np.array([11])).copy() for session in (ours, theirs)]
        assert distance(*after) < TOLERANCE


@pytest.mark.parametrize("backend", ["triton", "triton-dense"])
def test_a_text_with_nan_does_not_harm_the_next_one(bundle, backend):
    with open_session(bundle(), backend) as session:
        clean, cache = steps(session, PROMPTS, FORCED), session.cache.keys[0]
        for tensor in (*session.cache.keys, *session.cache.values):
            tensor.fill_(float("nan"))
        assert np.array_equal(steps(session, PROMPTS, FORCED), clean)
        assert session.cache.keys[0] is cache  # which the CUDA graph reads


def test_dense_follows_the_reference(bundle):
    with open_session(bundle(), "triton-dense") as ours, open_session(bundle(), "torch-dense") as theirs:
        assert distance(steps(ours, PROMPTS, FORCED), steps(theirs, PROMPTS, FORCED)) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "static"},
        {"head_unit": "kv_group"},
        {"kind": "layerwise"},
        {"kind": "quantized-shadow"},
        {"kind": "quantized-shadow", "variant": "opt", "head_unit": "kv_group"},
        {"kind": "relu", "variant": "llama-relu"},
        {"kind": "relu", "variant": "opt"},
    ],
    ids=str,
)
def test_other_choices(bundle, options):
    folder = bundle(**options)
    with open_session(folder, "triton") as ours, reference(folder) as theirs:
        assert distance(steps(ours, PROMPTS, FORCED), steps(theirs, PROMPTS, FORCED)) < TOLERANCE


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "quantized-shadow", "variant": "opt"},
        {"kind": "quantized-shadow", "variant": "llama-biases", "head_unit": "kv_group"},
        {"kind": "layerwise", "head_unit": "kv_group"},
        {"kind": "shadow"},
        {"kind": "static", "variant": "llama-mqa-tied"},
    ],
    ids=str,
)
def test_a_rest_from_the_low_bit_copy(bundle, options):
    """One step serves all budgets: a shortlist, then all logits exact, then no rest."""
    folder, found = bundle(**options, rest="shadow"), []
    with open_session(folder, "triton") as ours, reference(folder) as theirs:
        for session in (ours, theirs):
            session.set_budget(Budget(neurons=(0.25, 0.6), heads=0.5, shortlist=5))
            logits = [*steps(session, PROMPTS, FORCED[:1])]
            for budget in (Budget(neurons=0.4, heads=0.5), Budget(neurons=0.4, heads=0.5, rest="drop")):
                session.set_budget(budget)
                logits.append(session.decode(np.array([11, 12])).copy())
            found.append(np.stack(logits))
    for one, other in zip(*found, strict=True):
        assert distance(one, other) < TOLERANCE


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 4e-3), ("bfloat16", 4e-2)])
def test_sixteen_bits(bundle, dtype, bound):
    for rest in ("drop", "shadow"):
        folder = bundle(dtype=dtype, kind="static", rest=rest)  # its selection does not depend on rounding
        with open_session(folder, "triton") as ours, reference(folder) as theirs:
            assert distance(steps(ours, PROMPTS[:1], FORCED[:, :1]), steps(theirs, PROMPTS[:1], FORCED[:, :1])) < bound


def test_greedy_text_is_the_reference_s_and_may_stop_early(bundle):
    prompt = PROMPTS[1:]
    with open_session(bundle(), "triton") as ours, reference(bundle()) as theirs:
        expected = list(generate(theirs, prompt, 4))
        following = generate(ours, prompt, 6)
        assert list(itertools.islice(following, 3)) == expected[:3]
        # Steps that were launched after the last requested token have no effect.
        assert ours.decode(np.array(expected[2])).argmax(axis=1).tolist() == expected[3]


def test_windows(bundle):
    """A prompt longer than the windows, steps at a budget, and a verification that starts within the prompt."""
    folder = bundle("gemma3")  # has layers with and without a window
    prompts, tokens, lengths = [list(range(3, 22)), [8, 61]], np.array([[3, 90, 14], [7, 5, 8]]), np.array([17, 2])
    with open_session(folder, "triton") as ours, reference(folder) as theirs:
        for session in (ours, theirs):
            session.set_budget(Budget(neurons=0.5, heads=0.5))
        assert distance(steps(ours, prompts, FORCED), steps(theirs, prompts, FORCED)) < TOLERANCE
        for session in (ours, theirs):
            session.rewind(lengths)
        assert distance(ours.verify(tokens), theirs.verify(tokens)) < TOLERANCE


def test_verification_is_dense_and_rewinding_hides_what_follows(bundle):
    """Sequences of different lengths, after a sparse step at the same positions; one CUDA graph serves two calls."""
    tokens, lengths = np.array([[3, 90, 14], [7, 5, 8]]), np.array([3, 2])
    with open_session(bundle(), "triton") as ours, open_session(bundle(), "torch-dense") as theirs:
        steps(ours, PROMPTS, FORCED[:1])
        steps(theirs, PROMPTS, [])
        expected = theirs.verify(tokens)
        for _ in range(2):
            ours.rewind(lengths)
            assert distance(ours.verify(tokens), expected) < TOLERANCE
        after = np.array([11, 12])
        assert distance(ours.verify(after[:, None])[:, 0], theirs.decode(after)) < TOLERANCE


def test_lossless_text_is_that_of_dense(bundle):
    folder = bundle("llama-gqa", kind="quantized-shadow", rest="shadow")
    with open_session(folder, "triton") as ours, open_session(folder, "torch-dense") as theirs:
        ours.set_budget(Budget(neurons=0.6, heads=0.75, rest="drop"))
        lengths = DraftLength(2)
        found = list(generate(ours, PROMPTS, 4, draft_length=lengths))
        expected = list(generate(theirs, PROMPTS, 4))
    assert [[t for t in row if t is not None] for row in zip(*found, strict=True)] == [
        list(row) for row in zip(*expected, strict=True)
    ]
    assert lengths.record.drafted


@pytest.mark.parametrize(("rest", "shortlist"), [("drop", None), ("shadow", 7)])
def test_without_a_bundle_the_copy_is_made_of_the_weights(bundle, rest, shortlist):
    folder = bundle("llama-biases", kind="quantized-shadow", rest=rest)
    read = TorchSession.open(folder)
    budget = Budget(heads=0.5, neurons=0.3, shortlist=shortlist)
    with TritonSession(read.spec, read._weights, read._predictor, budget, rest=rest) as ours, read as theirs:
        theirs.set_budget(budget)
        theirs.shares_selection = True
        assert distance(steps(ours, PROMPTS, FORCED), steps(theirs, PROMPTS, FORCED)) < TOLERANCE


def test_the_cache_grows_and_keeps_its_contents(bundle):
    with reference(bundle()) as theirs:
        expected = steps(theirs, PROMPTS[:1], FORCED[:, :1])
    read = TorchSession.open(bundle())
    with TritonSession(
        read.spec, read._weights, read._predictor, Budget(heads=0.5, neurons=0.5), cache_block=4
    ) as ours:
        found = steps(ours, PROMPTS[:1], FORCED[:, :1])
        assert ours.cache.keys[0].shape[2] == 8
    assert distance(found, expected) < TOLERANCE


def test_leaving_frees_weights_and_cache(bundle):
    with open_session(bundle(), "triton") as session:
        tensors = (session._decoder.weights["layers.0.qkv_proj.weight"], session.cache.keys[0])
        held = [weakref.ref(tensor) for tensor in (*tensors, session._predictor.tensors["trunk.weight"])]
        del tensors
    gc.collect()
    assert [ref() for ref in held] == [None] * 3


def test_what_is_refused(bundle):
    with open_session(bundle(), "triton") as session:
        with pytest.raises(UserError, match="has a shortlist, but there is no low-bit copy"):
            session.set_budget(Budget(shortlist=5))
        with pytest.raises(UserError, match="call prefill first"):
            session.decode(np.array([1]))
        session.prefill([[1, 2]])
        with pytest.raises(UserError, match="63 more steps exceed the model's 64 positions"):
            session.decode_greedy(np.array([1]), 63)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_or_the_interpreter(bundle, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match=r"needs an NVIDIA GPU.*TRITON_INTERPRET=1"):
        open_session(bundle(), "triton")


@pytest.mark.parametrize(
    ("n_query", "n_kv", "head_dim", "rotary"), [(6, 2, 20, True), (0, 3, 8, True), (3, 3, 7, False)]
)
def test_write_cache(n_query, n_kv, head_dim, rotary):
    generator, device = torch.Generator().manual_seed(0), kernel_device()
    n, capacity = n_query + 2 * n_kv, 5
    projected = torch.randn((2, 2, n * head_dim), generator=generator).to(device)
    positions = torch.tensor([[0, 1], [3, 4]], device=device)
    angles = torch.randn((2, 2, head_dim // 2), generator=generator).to(device)
    tables = (angles.cos(), angles.sin()) if rotary else (None, None)
    keys, values = (torch.full((2, n_kv, capacity, head_dim), 9.0, device=device) for _ in range(2))
    query = write_cache(projected, keys, values, positions, *tables)

    heads = projected.view(2, 2, n, head_dim).transpose(1, 2)
    if rotary:
        first, second = heads[:, : n_query + n_kv].chunk(2, dim=-1)
        cos, sin = (table[:, None] for table in tables)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        heads = torch.cat((turned, heads[:, n_query + n_kv :]), dim=1)
    torch.testing.assert_close(query, heads[:, :n_query])
    for cache, written in ((keys, heads[:, n_query:-n_kv]), (values, heads[:, -n_kv:])):
        expected = torch.full_like(cache, 9.0)
        expected[torch.arange(2)[:, None], :, positions] = written.transpose(1, 2)
        torch.testing.assert_close(cache, expected)
