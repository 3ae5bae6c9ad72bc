"""A real trained model: with all units active, certified or lossless, every sparse path gives the dense results."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.lossless_check import compare_lossless
from shadowllm.runtime import Budget, generate, open_session
from shadowllm.runtime.generation.draft_length import DraftLength
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.torch_session import TorchSession
from tests.bundles import make_bundle
from tests.runtime.test_certify import decoded

TOKENS, GREEDY, DRAFTED = 64, 16, 32


@pytest.fixture(scope="module")
def folder(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    make_bundle(smollm2, folder, kind="quantized-shadow", rest="shadow")
    return folder


@pytest.fixture(scope="module")
def text(folder):
    manifest = read_manifest(folder)
    return passage(plain_encoder(load_tokenizer(folder, manifest), manifest), TOKENS)


def run(session, text, length=TOKENS):
    """Teacher-forced logits at the first positions of the text, then greedy text after its start."""
    with session:
        session.set_budget(Budget())
        logits = [session.prefill([text[:1]])[0].copy()]
        logits += [session.decode(np.array([token]))[0].copy() for token in text[1:length]]
        return np.stack(logits), [step[0] for step in generate(session, [text[:32]], GREEDY)]


@pytest.fixture(scope="module")
def dense(folder, text):
    return run(open_session(folder, "ort-dense"), text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("session", "length"),
    [
        pytest.param(lambda folder: OrtSession(folder, "sparse"), TOKENS, id="ort-native"),
        pytest.param(lambda folder: OrtSession(folder, "sparse", native=False), 16, id="ort-function-bodies"),
        pytest.param(lambda folder: TorchSession.open(folder), 16, id="torch"),
    ],
)
def test_everything_active_equals_dense(folder, text, dense, session, length):
    logits, tokens = run(session(folder), text, length)
    assert np.abs(logits - dense[0][:length]).max() < 1e-4 * np.abs(dense[0]).max()
    assert tokens == dense[1]
    assert len(tokens) == GREEDY


@pytest.mark.slow
def test_it_is_certified_at_all_positions(folder, text, dense):
    with OrtSession(folder, "sparse") as session:
        proved, counts = decoded(session, text, Budget(shortlist=16, certify=True), prompt=32)
    assert proved.tolist() == dense[0][32:].argmax(axis=-1).tolist()
    assert (counts > 16).any()


@pytest.mark.slow
def test_lossless_text_is_that_of_dense(folder, text):
    """Drafts with 30% of the neurons and heads from the full rows, the rest from the low-bit copy."""
    prompts = [text[start : start + 32] for start in (0, 32)]
    with OrtSession(folder, "sparse") as lossless, OrtSession(folder, "dense") as session:
        lossless.set_budget(Budget(neurons=0.3, heads=0.3, shortlist=1024))
        found = compare_lossless(lossless, session, prompts, DRAFTED, partial(DraftLength, 4), batches=(1, 2))
    assert found.wrong == []
    assert len(found.ties) < 3
    accepted, drafted = (sum(getattr(record, name) for record in found.drafts) for name in ("accepted", "drafted"))
    assert 0.5 < accepted / drafted <= 1
