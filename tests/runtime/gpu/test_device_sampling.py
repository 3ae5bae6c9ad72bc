"""Tokens drawn on the device have the distribution that `transformers` gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shadowllm.runtime.generation.chooser import Chooser, LogitsError
from shadowllm.runtime.generation.generate import generate
from shadowllm.runtime.generation.sampling import Sampling
from shadowllm.runtime.gpu.device_sampling import DeviceSampler
from tests.bundles import make_bundle
from tests.conftest import build_transformers_model

DRAWS = 20000
OPTIONS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=5),
    Sampling(temperature=1.5, top_p=0.6),
    Sampling(temperature=0.9, top_k=20, top_p=0.8, min_p=0.1),
    Sampling(temperature=1.0, top_k=1),
    Sampling(temperature=1.0, top_k=10**30),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1e-3),
]


@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_draws_have_the_distribution_of_the_host(sampling):
    """Evenly spaced random numbers, so the share of each token is its probability up to one of them."""
    logits = np.random.default_rng(0).normal(size=37).astype(np.float32) * 2
    sampler = DeviceSampler(1, DRAWS, torch.device("cpu"))
    sampler.begin(sampling, (np.arange(DRAWS, dtype=np.float32)[None] + 0.5) / DRAWS, np.array([100]))
    places = [torch.tensor([[100 + step]]) for step in range(0, DRAWS, 40)]
    tokens = [sampler.choose(torch.from_numpy(logits)[None], place).item() for place in places]
    shares = np.bincount(tokens, minlength=37) / len(tokens)
    wanted = Chooser([[1]], sampling).probabilities(0, logits)
    assert np.abs(shares - wanted).max() <= 1.5 / len(tokens)


def test_sequences_draw_their_own_numbers():
    sampler = DeviceSampler(2, 4, torch.device("cpu"))
    sampler.begin(Sampling(temperature=1.0), np.array([[0.15, 0.95], [0.95, 0.15]], np.float32), np.array([3, 8]))
    logits = torch.zeros(2, 10)
    first, second = (sampler.choose(logits, torch.tensor([[3 + step], [8 + step]]))[:, 0].tolist() for step in (0, 1))
    assert first == second[::-1] == [1, 9]


def test_the_largest_random_number_draws_a_token_that_remains():
    sampler = DeviceSampler(1, 1, torch.device("cpu"))
    sampler.begin(Sampling(temperature=1.0, top_k=3), np.array([[np.nextafter(1, 0)]], np.float32), np.array([0]))
    logits = torch.arange(1000, dtype=torch.float32)[None] / 1e6
    assert sampler.choose(logits, torch.zeros(1, 1, dtype=torch.int64)).item() in (997, 998, 999)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", OPTIONS, ids=str)
def test_no_token_is_drawn_from_logits_that_are_no_numbers(sampling, number):
    sampler = DeviceSampler(2, 1, torch.device("cpu"))
    sampler.begin(sampling, np.array([[0.5], [0.5]], np.float32), np.zeros(2, np.int64))
    logits = torch.full((2, 10), -100.0)
    logits[:, 4], logits[0, 7] = 0, number
    assert sampler.choose(logits, torch.zeros(2, 1, dtype=torch.int64)).tolist() == [[-1], [4]]


@pytest.fixture(scope="module")
def small_bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    build_transformers_model("llama", {"max_position_embeddings": 16}).save_pretrained(folder / "model")
    (folder / "bundle").mkdir()
    make_bundle(folder / "model", folder / "bundle")
    return folder / "bundle"


@pytest.mark.slow
@pytest.mark.parametrize("ends", [False, True])
def test_a_session_names_the_sequence_whose_logits_are_no_numbers(small_bundle, ends):
    """One that has ended does not matter."""
    pytest.importorskip("triton")
    from shadowllm.runtime import open_session

    with open_session(small_bundle, "triton") as session:
        text = generate(
            session, [[5, 17, 42], [8, 61]], 4, Sampling(temperature=1.0), stops_at=lambda row, _: ends and row == 1
        )
        next(text)
        session.cache.values[0][1, :, 0] = float("nan")
        if ends:
            assert [row[1] for row in text] == [None] * 3
        else:
            with pytest.raises(LogitsError, match="TritonSession computed NaN or infinite logits for sequence 2, pos"):
                list(text)


@pytest.mark.slow
def test_a_session_draws_the_same_text_again_and_another_one_for_another_seed(small_bundle):
    pytest.importorskip("triton")
    from shadowllm.runtime import open_session

    def text(session, **options):
        return list(generate(session, [[5, 17, 42], [8, 61]], 3, Sampling(temperature=1.0, **options)))

    with open_session(small_bundle, "triton") as session:
        first, again, other = (text(session, seed=seed) for seed in (1, 1, 2))
        assert first == again != other
        longest = [list(range(1, session.spec.max_seqlen - 1))]
        assert len(list(generate(session, longest, 6, Sampling(temperature=1.0)))) == 3  # all positions of the model
        assert text(session, top_k=1) == list(generate(session, [[5, 17, 42], [8, 61]], 3))
