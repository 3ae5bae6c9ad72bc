"""The choice of one token from logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shadowllm.runtime import Sampling
from shadowllm.runtime.generation.chooser import Chooser, one_thread

VOCAB = 40


@pytest.mark.parametrize(
    ("others", "top_k", "top_p", "left"), [(3, 2, 1.0, 4), (3, 2, 0.5, 1), ((3, 2.9, 2.8), 20, 0.9, 4)]
)
def test_top_p_after_top_k_is_that_of_transformers(others, top_k, top_p, left):
    logits = np.random.default_rng(0).normal(size=VOCAB).astype(np.float32)
    logits[7], logits[[3, 5, 8]] = 4, others  # if three are as good as the second one, top-k keeps four for two
    sampling = Sampling(0.7, top_k=top_k, top_p=top_p, min_p=0.001)
    expected = torch.tensor(logits)[None]
    for processor in sampling.processors(1):
        expected = processor(torch.LongTensor([[1]]), expected)
    found = Chooser([[1]], sampling).probabilities(0, logits)
    np.testing.assert_allclose(found, expected[0].softmax(-1).numpy(), atol=1e-7)
    assert np.count_nonzero(found) == left


def test_drawn_tokens_have_their_probabilities():
    chooser, probabilities = Chooser([[1]], Sampling(1.0)), np.array([0, 0.1, 0, 0.6, 0.3, 0], dtype=np.float32)
    counts = np.bincount([chooser.draw(probabilities) for _ in range(20_000)], minlength=6)
    np.testing.assert_allclose(counts / 20_000, probabilities, atol=0.015)
    assert counts[probabilities == 0].sum() == 0


def test_the_largest_random_number_draws_a_token_that_can_be_drawn(monkeypatch):
    chooser = Chooser([[1]], Sampling(1.0))
    monkeypatch.setattr(chooser, "uniform", lambda: 1 - 2**-53)
    assert chooser.draw(np.array([0.7, 0.3, 0], dtype=np.float32)) == 1


def test_pytorch_has_its_threads_again_after_a_token():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread():
            assert torch.get_num_threads() == 1
        Chooser([[1]], Sampling(1.0)).choose(np.zeros((1, 8), dtype=np.float32))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
