"""The generation loop and the sampler, over a session that follows a script."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.errors import UserError
from shadowllm.runtime import Sampling, generate, open_session
from shadowllm.runtime.generation import sample


def draws(logits, sampling, n=4000):
    generator = np.random.default_rng(0)
    rows = np.repeat(np.asarray(logits, dtype=np.float32)[None], n, axis=0)
    return np.bincount(sample(rows, sampling, generator), minlength=len(logits)) / n


class TestSample:
    def test_greedy_takes_the_largest(self):
        assert sample(np.array([[0.1, 3, 2], [5, 1, 4]]), Sampling(), np.random.default_rng(0)).tolist() == [1, 0]

    def test_frequencies_follow_the_softmax(self):
        np.testing.assert_allclose(draws(np.log([0.5, 0.3, 0.2]), Sampling(temperature=1)), [0.5, 0.3, 0.2], atol=0.03)

    def test_temperature_sharpens(self):
        np.testing.assert_allclose(
            draws(np.log([0.5, 0.3, 0.2]), Sampling(temperature=0.5)), np.array([25, 9, 4]) / 38, atol=0.03
        )

    def test_top_k_keeps_k(self):
        np.testing.assert_allclose(
            draws(np.log([0.2, 0.5, 0.3]), Sampling(temperature=1, top_k=2)), [0, 0.625, 0.375], atol=0.03
        )

    @pytest.mark.parametrize(
        ("top_p", "kept"), [(0.4, [1, 0, 0]), (0.5, [1, 0, 0]), (0.7, [0.625, 0.375, 0]), (1.0, [0.5, 0.3, 0.2])]
    )
    def test_top_p_keeps_the_nucleus(self, top_p, kept):
        np.testing.assert_allclose(
            draws(np.log([0.5, 0.3, 0.2]), Sampling(temperature=1, top_p=top_p)), kept, atol=0.03
        )

    @pytest.mark.parametrize("options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
    def test_refuses(self, options):
        with pytest.raises(UserError):
            Sampling(**options)


class TestGenerate:
    @pytest.fixture
    def session(self, bundle):
        with open_session(bundle(), "ort") as session:
            yield session

    def test_greedy_is_the_argmax_of_each_step(self, session):
        tokens = [step[0] for step in generate(session, [[5, 6, 7]], 6)]
        session.reset()
        logits = session.prefill([[5, 6, 7]])
        for token in tokens:
            assert token == logits[0].argmax()
            logits = session.decode(np.array([token]))

    def test_a_seed_repeats_itself(self, session):
        def text(seed):
            return list(generate(session, [[5, 6, 7]], 12, Sampling(temperature=1.5, seed=seed)))

        assert text(1) == text(1) != text(2)

    def test_stop_ids_end_one_sequence_and_then_all(self, session):
        free = list(generate(session, [[5, 6, 7], [8, 9]], 8))
        stop = free[2][0]
        stopped = list(generate(session, [[5, 6, 7], [8, 9]], 8, stop_ids=[stop]))
        assert [row[0] for row in stopped][:2] == [row[0] for row in free][:2]
        assert all(row[0] is None for row in stopped[2:])
        assert list(generate(session, [[5, 6, 7]], 8, stop_ids=[free[0][0]])) == []
