"""Compares decoded text with the dense model's, on tiny bundles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shadowllm.errors import UserError
from shadowllm.evaluation.generation import Agreement, compare_texts, greedy_texts
from shadowllm.models.sparsity import Budget
from shadowllm.runtime import generate
from shadowllm.runtime.ort.session import OrtSession

PROMPTS = [[5, 6, 7], [40, 3], [9, 90, 17, 60]]


@pytest.fixture(scope="module")
def folder(bundle):
    return bundle(kind="static")  # the scores are random


@pytest.fixture(scope="module")
def texts(folder):
    with OrtSession(folder, "dense") as session:
        return greedy_texts(session, PROMPTS, 24)


def test_dense_texts_are_generated_ones(folder, texts):
    with OrtSession(folder, "dense") as session:
        for prompt, text in zip(PROMPTS, texts, strict=True):
            ends = session.spec.eos_token_ids
            whole = [token for (token,) in generate(session, [prompt], 24, stop_ids=ends)]
            assert text[: len(whole)] == whole
            assert text[len(whole) :] == [] or text[len(whole)] in ends


def test_a_text_ends_with_its_end_of_sequence_token(folder, texts):
    with OrtSession(folder, "dense") as session:
        session.spec = replace(session.spec, eos_token_ids=(texts[0][2],))
        (found,) = greedy_texts(session, PROMPTS[:1], 24)
    assert found == texts[0][: texts[0].index(texts[0][2]) + 1]


def test_dense_agrees_with_itself(folder, texts):
    advanced = []
    for kind in ("dense", "sparse"):
        with OrtSession(folder, kind) as session:
            session.set_budget(Budget())
            found = compare_texts(session, PROMPTS, texts, advanced.append)
        assert (found.identical, found.agreement, found.divergences) == (1.0, 1.0, [None] * 3)
        assert found.mean_divergence == pytest.approx(np.mean([len(text) for text in texts]))
    assert advanced == [1] * 6


def test_the_first_divergence_is_that_of_free_decoding(folder, texts):
    with OrtSession(folder, "sparse") as session:
        session.set_budget(Budget(heads=0.5, neurons=0.1))
        found = compare_texts(session, PROMPTS, texts)
        free = greedy_texts(session, PROMPTS, 24)
    first = [
        next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
        for one, other in zip(free, texts, strict=True)
    ]
    assert found.divergences == first
    assert None not in first
    assert min(first) > 0  # the prefill, which is dense, chooses the first token
    assert 0 < found.agreement < 1
    assert found.identical == 0


def test_figures_by_hand():
    found = Agreement([2, None, 10], [12, 12, 12], 0.5)
    assert found.identical == pytest.approx(1 / 3)
    assert found.mean_divergence == 8
    assert found.median_divergence == 10


def test_prompts_that_cannot_be_decoded(folder):
    with OrtSession(folder, "dense") as session:
        with pytest.raises(UserError, match="exceed the model's 64 positions"):
            greedy_texts(session, PROMPTS, 61)
        with pytest.raises(UserError, match="nothing to decode"):
            greedy_texts(session, [], 8)
        with pytest.raises(UserError, match="nothing to compare"):
            compare_texts(session, PROMPTS[:1], [[2]])
