"""Lossless decoding gives the dense model's text, and samples from the dense model's distribution."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from shadowllm.runtime import Budget, Sampling, generate, open_session
from shadowllm.runtime.generation import speculative
from shadowllm.runtime.generation.draft_length import AdaptiveLength, DraftLength
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.torch_session import TorchSession
from tests.tokenizers import export, llama3, stops_at

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 17, 42, 8, 61], [9, 9], [30, 7, 7, 12], [1]]
MIXED = {"kind": "quantized-shadow", "rest": "shadow"}
DRAFT = Budget(neurons=0.6, heads=0.75, rest="drop")  # of random models, about half of the drafted tokens are right


def columns(steps):
    """The tokens of each sequence."""
    return [[token for token in row if token is not None] for row in zip(*steps, strict=True)]


def dense_texts(folder, prompts, new_tokens, *options, **named):
    with open_session(folder, "torch-dense") as session:
        return columns(generate(session, prompts, new_tokens, *options, **named))


@pytest.mark.parametrize("kind", [OrtSession, TorchSession.open], ids=["ort", "torch"])
@pytest.mark.parametrize("variant", ["llama-gqa", "llama-head-dim-16", "opt", "opt-head-dim-16"])
def test_greedy_text_is_that_of_dense(bundle, variant, kind):
    """Batches of 1 to 4 uneven prompts; the attention of head size 16 is one fused op in ONNX Runtime."""
    folder = bundle(variant, **MIXED)
    with kind(folder, "sparse", threads=1) as session:
        session.set_budget(DRAFT)
        expected = dense_texts(folder, PROMPTS, 24)
        for batch, length in ((1, 1), (1, 4), (2, 3), (3, 2), (4, 6)):
            lengths = DraftLength(length)
            found = columns(generate(session, PROMPTS[:batch], 24, draft_length=lengths))
            assert found == expected[:batch]
            assert 0 < lengths.record.accepted < lengths.record.drafted


@pytest.mark.parametrize(("variant", "weight_dtype"), [("llama-blocks", "int8"), ("opt-blocks", "int8")])
def test_integer_weights(bundle, variant, weight_dtype):
    """The dense graph and the sparse rows of such a bundle are rounded differently; the text is the dense graph's."""
    folder = bundle(variant, weight_dtype=weight_dtype, **MIXED)
    with OrtSession(folder, "dense") as dense, OrtSession(folder, "sparse") as session:
        session.set_budget(DRAFT)
        for batch in (1, 3):
            expected = columns(generate(dense, PROMPTS[:batch], 16))
            assert columns(generate(session, PROMPTS[:batch], 16, draft_length=DraftLength(3))) == expected


@pytest.mark.parametrize("prepack", [False, True])
def test_the_cache_is_that_of_dense(bundle, prepack):
    """The drafts leave nothing in the cache, also after it grew."""
    folder = bundle("llama-head-dim-16", **MIXED)
    with OrtSession(folder, "dense") as dense, OrtSession(folder, "sparse", prepack=prepack) as session:
        session.set_budget(DRAFT)
        tokens = columns(generate(dense, PROMPTS[:1], 20))[0]
        list(generate(session, PROMPTS[:1], 20, draft_length=DraftLength(3)))
        length = len(PROMPTS[0]) + len(tokens) - 1
        for name, entries in dense.cache.items():
            there = np.s_[:, :, :length]
            assert np.abs(session.cache[name][there] - entries[there]).max() < 1e-5 * np.abs(entries[there]).max()


def test_stop_ids_inside_a_round(bundle):
    folder = bundle("llama-gqa", **MIXED)
    free = dense_texts(folder, PROMPTS, 24)
    stops = [free[0][5], free[1][2], free[3][9]]
    expected = dense_texts(folder, PROMPTS, 24, stop_ids=stops)
    assert min(map(len, expected)) < 4
    with TorchSession.open(folder) as session:
        session.set_budget(DRAFT)
        for length in (1, 4):
            found = columns(generate(session, PROMPTS, 24, stop_ids=stops, draft_length=DraftLength(length)))
            assert found == expected


@pytest.mark.parametrize("stops", [["k$q"], ["V.", " by"], ["sa", "s"]])
def test_stop_strings_inside_a_round(tmp_path, stops):
    tokenizer = llama3()
    folder = export(tokenizer, tmp_path)
    prompts = [tokenizer(text).input_ids for text in ("the s\u00e9", "model!")]
    sampling = Sampling(no_repeat_ngram_size=1)
    expected = dense_texts(folder, prompts, 24, sampling, stops_at=stops_at(tokenizer, prompts, stops))
    assert min(map(len, expected)) < 24
    with OrtSession(folder, "sparse") as session:
        session.set_budget(Budget(neurons=0.9))
        options = {"stops_at": stops_at(tokenizer, prompts, stops), "draft_length": DraftLength(4)}
        assert columns(generate(session, prompts, 24, sampling, **options)) == expected


@pytest.mark.parametrize("length", [1, 5])
def test_the_end_of_the_positions_and_of_the_new_tokens(bundle, length):
    folder = bundle("llama-gqa", **MIXED)
    prompts = [[1] * 60, [2, 3]]
    with TorchSession.open(folder) as session:
        session.set_budget(DRAFT)
        for new_tokens, right in ((50, 5), (3, 3), (1, 1)):
            found = columns(generate(session, prompts, new_tokens, draft_length=DraftLength(length)))
            assert found == dense_texts(folder, prompts, new_tokens)
            assert [len(text) for text in found] == [right, right]


@pytest.mark.parametrize("options", [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}])
def test_greedy_with_processors(bundle, options):
    """Drafts and verification see the text before each token, the drafted tokens included."""
    folder, sampling = bundle("llama-gqa", **MIXED), Sampling(**options)
    with TorchSession.open(folder) as session:
        session.set_budget(DRAFT)
        found = columns(generate(session, PROMPTS, 24, sampling, draft_length=DraftLength(3)))
    assert found == dense_texts(folder, PROMPTS, 24, sampling)


def test_a_dense_session_has_nothing_to_draft(bundle):
    lengths = DraftLength(3)
    with open_session(bundle(), "torch-dense") as session:
        assert columns(generate(session, PROMPTS, 8, draft_length=lengths)) == dense_texts(bundle(), PROMPTS, 8)
    assert not lengths.record.drafted


def test_tokens_arrive_round_by_round(bundle):
    """The first token comes before any draft, and a round's tokens before the next round."""
    lengths = DraftLength(3)
    with TorchSession.open(bundle(**MIXED)) as session:
        session.set_budget(Budget())  # every draft is right
        steps = generate(session, PROMPTS[:1], 12, draft_length=lengths)
        next(steps)
        assert not lengths.record.drafted
        seen = []
        for _ in steps:
            seen.append(lengths.record.drafted)
        assert seen == [3] * 4 + [6] * 4 + [8] * 3  # 11 tokens in all: the last round drafts as many as are left


@pytest.mark.parametrize(("right", "dense_share"), [(False, 0.9), (True, 0.3)])
def test_drafts_that_are_rejected_end_in_dense_steps(bundle, monkeypatch, right, dense_share):
    """The clock counts what steps cost: 0.4 for a draft step, and 1 and a little more for a dense one."""
    folder, clock, lengths = bundle("llama-gqa", **MIXED), [0.0], AdaptiveLength()
    expected = dense_texts(folder, PROMPTS[:1], 58)
    with TorchSession.open(folder) as session:
        session.set_budget(Budget())
        decode, verify = session.decode, session.verify

        def drafted(tokens):
            clock[0] += 0.4
            return decode(tokens) if right else -decode(tokens)

        def verified(tokens):
            clock[0] += 1 + 0.05 * (tokens.shape[1] - 1)
            return verify(tokens)

        monkeypatch.setattr(session, "decode", drafted)
        monkeypatch.setattr(session, "verify", verified)
        monkeypatch.setattr(speculative, "perf_counter", lambda: clock[0])
        assert columns(generate(session, PROMPTS[:1], 58, draft_length=lengths)) == expected
    record = lengths.record
    share = record.lengths[0] / record.lengths.total()
    assert share > dense_share if not right else share < dense_share
    assert clock[0] < (58 * 1.04 if not right else 58 * 0.75)  # two drafts at the start of a short text cost 3%


class TestRules:
    def test_agreeing_tokens(self):
        assert [
            speculative.count_agreeing(tokens, [1, 2, 3, 4]) for tokens in ([1, 2, 3], [1, 9, 3], [7, 2, 3], [])
        ] == [
            3,
            1,
            0,
            0,
        ]

    def test_acceptance_is_the_ratio(self):
        uniforms = (np.arange(1000) + 0.5) / 1000
        for dense, drafted, right in ((0.2, 0.8, 0.25), (0.8, 0.2, 1), (0, 0.5, 0), (0.3, 0.3, 1)):
            assert np.mean([speculative.accepts(dense, drafted, u) for u in uniforms]) == pytest.approx(right)

    def test_residual(self):
        dense, drafted = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.6, 0.3])
        np.testing.assert_allclose(speculative.residual(dense, drafted), [1, 0, 0])
        np.testing.assert_allclose(
            speculative.residual(np.array([0.5, 0.5, 0]), np.array([0, 0.2, 0.8])), [5 / 8, 3 / 8, 0]
        )
        np.testing.assert_array_equal(speculative.residual(dense, dense), dense)


@pytest.mark.slow
class TestSampling:
    """The first four tokens of a tiny model. The prefill gives the first; the others are drawn in rounds."""

    PROMPT, SAMPLING, NEW = [5, 17, 42], {"temperature": 0.25, "top_k": 8}, 4
    DRAFT = Budget(neurons=0.05, heads=0.25, rest="drop")

    @pytest.fixture
    def folder(self, bundle):
        return bundle("llama-gqa", **MIXED)

    @pytest.fixture
    def expected(self, folder):
        """Dense's probability of each text of four tokens with top-k 8, computed without the sampling code."""
        found = {(): 1.0}
        with TorchSession.open(folder, "dense") as session:
            for _ in range(self.NEW):
                texts, found = found, {}
                session.reset(len(texts))
                logits = session.prefill([[*self.PROMPT, *text] for text in texts])
                scores = logits.astype(np.float64) / self.SAMPLING["temperature"]
                for (text, before), row in zip(texts.items(), scores, strict=True):
                    kept = np.argsort(row)[-self.SAMPLING["top_k"] :]
                    shares = np.exp(row[kept] - row[kept].max())
                    for token, share in zip(kept.tolist(), shares / shares.sum(), strict=True):
                        found[*text, token] = before * share
        return found

    def p_value(self, folder, expected, draws):
        """The p-value of a chi-square test of the frequencies of texts. Those expected rarely are one class."""
        batch, counts = 1000, Counter[tuple[int, ...]]()
        with TorchSession.open(folder) as session:
            session.set_budget(self.DRAFT)
            for seed in range(draws // batch):
                sampling, lengths = Sampling(**self.SAMPLING, seed=seed), DraftLength(2)
                for text in columns(generate(session, [self.PROMPT] * batch, self.NEW, sampling, draft_length=lengths)):
                    counts[tuple(text)] += 1
        assert lengths.record.drafted > batch
        if counts.keys() - expected.keys():
            return 0.0  # texts that dense never writes
        classes: dict[tuple[int, ...], np.ndarray] = {}
        for text, share in expected.items():
            name = text if share * draws >= 5 else ()
            classes[name] = classes.get(name, np.zeros(2)) + np.array([counts[text], share * draws])
        found, right = np.array(list(classes.values())).T
        statistic = ((found - right) ** 2 / right).sum()
        # The chi-square distribution's survival function.
        return float(torch.special.gammaincc(torch.tensor((len(found) - 1) / 2), torch.tensor(statistic / 2)))

    def test_frequencies_are_those_of_dense(self, folder, expected):
        """7,000 texts are 21,000 tokens that were drawn in rounds."""
        assert self.p_value(folder, expected, 7_000) > 0.01

    def test_a_wrong_rule_is_noticed(self, folder, expected, monkeypatch):
        """Every drafted token that dense could draw is accepted."""
        monkeypatch.setattr(speculative, "accepts", lambda dense, drafted, uniform: dense > 0)
        assert self.p_value(folder, expected, 1_000) < 1e-6
