"""The length of drafts adapts to acceptance and costs; times are computed here, and not measured."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.draft_config import Drafting, TunedDrafts
from shadowllm.errors import UserError
from shadowllm.runtime.generation.draft_length import (
    MOST,
    AdaptiveLength,
    DraftLength,
    DraftRecord,
    Round,
    draft_length_of,
    expected_tokens,
)

DENSE = 1.0  # time of a dense step


def verified(size):
    """Time of a dense step over ``size`` positions: more than one costs a little."""
    return DENSE if size == 1 else 1.05 + 0.03 * size


def decode(lengths, tokens, acceptance, draft=0.4, seed=0):
    """Decode tokens, where each drafted one is right with a probability; returns the time and all draft lengths."""
    generator, done, spent, used = np.random.default_rng(seed), 0, 0.0, []
    while done < tokens:
        length = lengths.choose()
        right = generator.random(length) < acceptance
        accepted = length if right.all() else int(right.argmin())
        first = verified(length + 1) not in {verified(other + 1) for other in used}
        seconds = verified(length + 1) * (1.5 if first else 1)  # the first step of a size is slower
        lengths.observe(Round(length, [accepted], draft * length, seconds))
        done, spent = done + accepted + 1, spent + draft * length + seconds
        used.append(length)
    return spent / done, used


def best_time(acceptance, draft=0.4):
    """Time per token of the best fixed length."""
    return min((k * draft + verified(k + 1)) / expected_tokens(acceptance, k) for k in range(MOST + 1))


@pytest.mark.parametrize(("acceptance", "draft"), [(0.97, 0.4), (0.9, 0.3), (0.8, 0.3), (0.7, 0.15)])
def test_it_finds_what_pays(acceptance, draft):
    best = best_time(acceptance, draft)
    assert best < 0.85 * DENSE
    found = np.mean([decode(AdaptiveLength(), 1000, acceptance, draft, seed)[0] for seed in range(5)])
    assert found < 1.08 * best


@pytest.mark.parametrize(("acceptance", "draft"), [(0, 0.4), (0.2, 0.3), (0.5, 0.7), (1, 1.1), (0.94, 0.8)])
@pytest.mark.parametrize("tokens", [128, 2000])
def test_it_is_not_slower_than_dense(acceptance, draft, tokens):
    """By more than 2%, of which the steps that are slower at first are no part of what drafts cost."""
    once = 0.5 * sum(verified(size) for size in (1, 2, 3)) / tokens
    for seed in range(3):
        time, used = decode(AdaptiveLength(), tokens, acceptance, draft, seed)
        assert time < 1.02 * DENSE + once
        assert np.mean(np.array(used[-100:]) == 0) > 0.9  # rejected drafts end in plain dense steps


def tuned(acceptance, draft=0.4, length=6):
    """What tuning would have found."""
    return TunedDrafts(length, acceptance, draft, verified(length + 1))


def test_a_disturbed_measurement_does_not_end_tuned_drafts():
    drafts = {}
    for start in (None, tuned(0.95)):
        lengths = AdaptiveLength(start)
        for seconds in (0.4, 0.4, 0.4, 1.2):  # of a draft step
            length = lengths.choose()
            lengths.observe(Round(length, [length], seconds * length, verified(length + 1)))
        drafts[start] = lengths.choose()
    assert drafts[None] <= 1
    assert drafts[tuned(0.95)] > 4


def test_a_long_verification_is_not_promised_the_time_of_a_short_one():
    lengths = AdaptiveLength()
    for _ in range(2):
        lengths.observe(Round(0, [0], 0.0, 1.0))
    for _ in range(2):
        lengths.observe(Round(1, [1], 0.3, 1.2))
    # A position more takes 0.2. If every verification took 1.2, drafts of 4 tokens or more would promise most.
    assert lengths.choose() in {2, 3}


def test_tuned_drafts_that_are_rejected_are_given_up():
    once = 0.5 * sum(verified(size) for size in (1, 2, 3, 5)) / 128
    for seed in range(5):
        time, used = decode(AdaptiveLength(tuned(0.95)), 128, 0, 0.4, seed)
        assert time < 1.02 * DENSE + once
        assert 2 < sum(used) <= 6


@pytest.mark.parametrize("tuning", [None, 0.94])
def test_drafts_have_one_token_until_one_is_accepted(tuning):
    _, used = decode(AdaptiveLength(tuning and tuned(tuning)), 128, acceptance=0.0, draft=0.6)
    assert set(used) == {0, 1}
    _, used = decode(AdaptiveLength(tuning and tuned(tuning)), 128, acceptance=1.0)
    first = next(place for place, length in enumerate(used) if length)
    assert used[first] == 1 < max(used)


def test_tuned_times_of_another_machine_are_replaced():
    lengths = AdaptiveLength(TunedDrafts(8, 0.9, 0.01, 1.0))
    time, used = decode(lengths, 2000, 0.5, 0.7)
    assert time < 1.05 * DENSE
    assert np.mean(np.array(used[-100:]) == 0) > 0.9


def test_drafts_that_never_paid_are_not_tried():
    assert set(decode(AdaptiveLength(tuned(0.1, length=0)), 200, 0.1)[1]) == {0}


def test_it_notices_a_text_that_becomes_easy():
    lengths = AdaptiveLength()
    assert sum(decode(lengths, 1000, acceptance=0)[1][-50:]) <= 1
    time, used = decode(lengths, 3000, acceptance=0.95)
    assert np.mean(np.array(used[-50:]) > 0) > 0.9
    assert time < 0.9 * DENSE


def test_several_sequences_are_averaged():
    lengths = AdaptiveLength()
    for _ in range(40):
        length = lengths.choose()
        lengths.observe(Round(length, [length, 0], 0.2 * length, verified(length + 1)))
    assert 0.4 < lengths.acceptance < 0.8


def test_a_fixed_length_and_the_record():
    lengths = DraftLength(3)
    for accepted in ([3, 1], [0, 2]):
        assert lengths.choose() == 3
        lengths.observe(Round(3, accepted, 0.1, 0.2))
    lengths.observe(Round(0, [0, 0], 0, 0.2))
    assert lengths.record.to_dict() == {
        "drafts": 4,
        "dense_steps": 2,
        "drafted": 12,
        "accepted": 6,
        "acceptance": 0.5,
        "accepted_per_draft": 1.5,
        "draft_lengths": {"0": 2, "3": 4},
    }
    told = "lossless: 4 drafts of 3 tokens, 1.50 accepted per draft (50%); dense steps without a draft: 2"
    assert str(lengths.record) == told
    assert str(DraftRecord()) == "lossless: no drafts; dense steps without a draft: 0"


def test_options():
    assert draft_length_of(Drafting()) is None
    assert isinstance(draft_length_of(Drafting(lossless=True)), AdaptiveLength)
    fixed = draft_length_of(Drafting(lossless=True, draft_length=5))
    assert type(fixed) is DraftLength
    assert fixed.choose() == 5
    for wrong, words in (((True, 65), "the draft length is 65"), ((True, -1), "is -1"), ((False, 3), "not lossless")):
        with pytest.raises(UserError, match=words):
            Drafting(*wrong)
