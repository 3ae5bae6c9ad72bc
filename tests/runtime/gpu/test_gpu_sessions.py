"""Sessions on a GPU: CUDA graphs, 16-bit weights, engines. Other tests check their logic without a GPU."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import pytest
import torch

from shadowllm.config import EngineOptions
from shadowllm.pipeline import build_engines
from shadowllm.plugins.tensorrt.load_tensorrt import FLAVOURS, gpu_capability
from shadowllm.runtime import Budget, generate, open_session
from tests.runtime.gpu.reference import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that PyTorch sees"),
]

PROMPTS = [[5, 17, 42], [8, 61]]


def follow(session):
    """Logits after prompts at one budget, then at another budget, ``(steps, batch, vocab_size)``."""
    session.reset(2)
    session.set_budget(Budget(heads=0.5, neurons=0.5))
    found = [session.prefill(PROMPTS).copy(), session.decode(np.array([3, 90])).copy()]
    session.set_budget(Budget(heads=0.75, neurons=0.25))
    return np.stack([*found, session.decode(np.array([14, 7])).copy()])


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-biases", "opt"])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("float16", 4e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("rest", ["drop", "shadow"])
def test_triton_follows_the_reference(bundle, variant, dtype, bound, rest):
    folder = bundle(variant, dtype=dtype, kind="static", rest=rest)  # its selection does not depend on rounding
    with open_session(folder, "triton") as ours, reference(folder) as theirs:
        found, expected = follow(ours), follow(theirs)
    assert np.abs(found - expected).max() < bound * np.abs(expected).max()


@pytest.mark.parametrize("backend", ["triton", "triton-dense"])
def test_replays_give_the_text_of_single_steps(bundle, backend):
    with open_session(bundle(), backend) as session:
        fast = list(generate(session, PROMPTS, 24))
        session.reset(2)
        tokens, slow = session.prefill(PROMPTS).argmax(axis=1), []
        for _ in fast:
            slow.append(tokens.tolist())
            tokens = session.decode(tokens).argmax(axis=1)
    assert fast == slow


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("variant", ["llama-head-dim-16", "opt-head-dim-16"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("rest", ["drop", "shadow"])
def test_engines_follow_the_reference(bundle, tmp_path, monkeypatch, flavour, variant, dtype, rest):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if importlib.util.find_spec(flavour) is None:
        pytest.skip(f"{flavour} is not installed")
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(variant, dtype=dtype, kind="static", rest=rest), folder)
    sms = (gpu_capability(),) if flavour == "tensorrt_rtx" else ()
    build_engines(folder, EngineOptions(flavour, sms=sms, capacity=64, max_seqlen=32, max_batch=2))
    with reference(folder, flavour) as ours, open_session(folder) as theirs:
        found, expected = follow(ours), follow(theirs)
        assert np.abs(found - expected).max() < (4e-3 if dtype == "float16" else 3e-2) * np.abs(expected).max()
        ours.reset(2)
        fast = list(generate(ours, PROMPTS, 16))
        ours.reset(2)
        tokens, slow = ours.prefill(PROMPTS).argmax(axis=1), []
        for _ in fast:
            slow.append(tokens.tolist())
            tokens = ours.decode(tokens).argmax(axis=1)
        assert fast == slow
    kept = list((tmp_path / "cache").rglob("*.kernels"))
    assert len(kept) == (3 if flavour == "tensorrt_rtx" else 0)
    with open_session(folder, flavour) as again:  # with the kernels that were compiled before
        assert np.array_equal(follow(again), found)
