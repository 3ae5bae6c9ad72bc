"""The generation loop and the sampling of tokens, compared with frequencies by hand and with transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shadowllm.errors import UserError
from shadowllm.runtime import Sampling, generate, open_session
from shadowllm.runtime.generation.chooser import Chooser
from tests.tokenizers import export, llama3, stops_at


def draws(logits, sampling, n=4000):
    rows = np.repeat(np.asarray(logits, dtype=np.float32)[None], n, axis=0)
    return np.bincount(Chooser([[0]] * n, sampling).choose(rows), minlength=len(logits)) / n


class TestChoice:
    def test_greedy_takes_the_largest(self):
        assert Chooser([[0], [0]], Sampling()).choose(np.array([[0.1, 3, 2], [5, 1, 4]])).tolist() == [1, 0]

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
        ("top_p", "kept"),
        [(0.0, [1, 0, 0]), (0.4, [1, 0, 0]), (0.5, [1, 0, 0]), (0.7, [0.625, 0.375, 0]), (1.0, [0.5, 0.3, 0.2])],
    )
    def test_top_p_keeps_the_nucleus(self, top_p, kept):
        np.testing.assert_allclose(
            draws(np.log([0.5, 0.3, 0.2]), Sampling(temperature=1, top_p=top_p)), kept, atol=0.03
        )

    @pytest.mark.parametrize(("min_p", "kept"), [(0.0, [0.5, 0.3, 0.2]), (0.5, [0.625, 0.375, 0]), (1.0, [1, 0, 0])])
    def test_min_p_keeps_what_is_near_the_likeliest(self, min_p, kept):
        np.testing.assert_allclose(
            draws(np.log([0.5, 0.3, 0.2]), Sampling(temperature=1, min_p=min_p)), kept, atol=0.03
        )

    def test_a_tiny_temperature_is_greedy(self):
        assert draws([1.0, 80.0, -50.0], Sampling(temperature=1e-30), n=20).tolist() == [0, 1, 0]

    def test_minus_infinity_is_never_drawn(self):
        assert draws([0.0, -np.inf, 0.0], Sampling(temperature=1), n=200)[1] == 0

    def test_each_sequence_is_held_against_its_own_text(self):
        logits = np.log(np.array([[0.5, 0.3, 0.2]] * 3, dtype=np.float32))
        chooser = Chooser([[0], [2, 2, 1], [0, 1, 0]], Sampling(no_repeat_ngram_size=1))
        assert chooser.choose(logits).tolist() == [1, 0, 2]
        assert Chooser([[0], [1]], Sampling(repetition_penalty=1e6)).choose(-logits[:2]).tolist() == [2, 2]

    @pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1), Sampling(repetition_penalty=2)])
    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_logits_that_are_no_numbers(self, sampling, bad):
        chooser = Chooser([[0], [1, 2, 3]], sampling, backend="OrtSession")
        logits = np.zeros((2, 5), dtype=np.float32)
        chooser.choose(logits)
        logits[1, 4] = bad
        with pytest.raises(UserError, match=r"OrtSession computed NaN or infinite logits for sequence 2, position 4"):
            chooser.choose(logits)
        chooser.running[1] = False  # sequences that have ended are not checked
        chooser.choose(logits)

    def test_logits_that_the_options_make_infinite(self):
        chooser = Chooser([[0]], Sampling(temperature=1, repetition_penalty=1e-40))
        with pytest.raises(UserError, match="the sampling options make a logit infinite for sequence 1, position 1"):
            chooser.choose(np.ones((1, 3), dtype=np.float32))

    @pytest.mark.parametrize("options", [{}, {"temperature": 1}, {"temperature": 1, "top_k": 2, "top_p": 0.5}])
    def test_no_token_left(self, options):
        with pytest.raises(UserError, match="no token is left for sequence 1 at position 3"):
            Chooser([[0, 1, 2]], Sampling(no_repeat_ngram_size=1, **options)).choose(np.zeros((1, 3), dtype=np.float32))


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

    def test_nan_of_a_session_is_named(self, session, monkeypatch):
        monkeypatch.setattr(session, "decode", lambda tokens: np.full((1, 97), np.nan, dtype=np.float32))
        with pytest.raises(UserError, match=r"OrtSession computed NaN or infinite logits for sequence 1, position 4"):
            list(generate(session, [[5, 6, 7]], 6))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": (3, 50, 51)},
        {"begin_suppress_tokens": tuple(range(48))},
        {"bad_words_ids": ((7,), (8, 9), (2,))},
        {"repetition_penalty": 0.8, "no_repeat_ngram_size": 3, "suppress_tokens": (4,)},
    ],
)
def test_greedy_tokens_are_those_of_transformers(bundle, checkpoint, options):
    from transformers import AutoModelForCausalLM

    prompts, length = [[5, 6, 7, 6, 7], [8, 9]], 24
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama-gqa"))
    right = []
    for prompt in prompts:
        theirs = {name: list(map(_list, v)) if isinstance(v, tuple) else v for name, v in options.items()}
        found = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, **theirs)
        right.append(found[0, len(prompt) :].tolist())
    with open_session(bundle(), "ort-dense") as session:
        steps = list(generate(session, prompts, length, Sampling(**options), stop_ids=[2]))
    mine = [[step[row] for step in steps if step[row] is not None] for row in range(2)]
    assert mine == [[token for token in tokens if token != 2] for tokens in right]


@pytest.mark.parametrize(
    ("stops", "lengths"),
    [
        (["k$q"], (11, 24)),
        (["V.", " by"], (24, 12)),
        (["sa", "s"], (2, 3)),
        (["not there"], (24, 24)),
    ],
)
def test_stop_strings_end_texts_where_transformers_ends_them(tmp_path, stops, lengths):
    """Stop strings inside a token, and over several tokens; separate for each sequence of a batch."""
    from transformers import AutoModelForCausalLM

    tokenizer = llama3()
    bundle = export(tokenizer, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    prompts = [tokenizer(text).input_ids for text in ("the s\u00e9", "model!")]
    options = {"max_new_tokens": 24, "no_repeat_ngram_size": 1, "stop_strings": stops, "tokenizer": tokenizer}
    right = [model.generate(torch.tensor([p]), do_sample=False, **options)[0, len(p) :].tolist() for p in prompts]
    assert tuple(map(len, right)) == lengths
    with open_session(bundle, "ort-dense") as session:
        sampling = Sampling(no_repeat_ngram_size=1)
        steps = list(generate(session, prompts, 24, sampling, stops_at=stops_at(tokenizer, prompts, stops)))
    assert [[step[row] for step in steps if step[row] is not None] for row in range(2)] == right


def _list(value):
    return list(value) if isinstance(value, tuple) else value
