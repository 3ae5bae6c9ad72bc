"""The comparison of lossless text with dense text notices other tokens, and goes on after them."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from shadowllm.errors import UserError
from shadowllm.evaluation.lossless_check import Difference, compare_lossless
from shadowllm.runtime.generation.draft_length import DraftLength
from shadowllm.runtime.torch_session import TorchSession

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 17, 42], [8, 61]]


@pytest.fixture
def sessions(bundle):
    folder = bundle("llama-gqa", kind="quantized-shadow", rest="shadow")
    with TorchSession.open(folder) as lossless, TorchSession.open(folder, "dense") as dense:
        yield lossless, dense


def test_the_same_text(sessions):
    found = compare_lossless(*sessions, PROMPTS, 12, partial(DraftLength, 2))
    assert found.tokens == 24
    assert found.differences == []
    assert sum(record.drafted for record in found.drafts) > 0


def test_other_tokens_are_found(sessions, monkeypatch):
    """A verification that never gives token 0 to 48 writes other tokens, at the first and at later places."""
    lossless, dense = sessions
    verify = lossless.verify

    def wrong(tokens):
        logits = verify(tokens).copy()
        logits[..., :49] = -1e9
        return logits

    expected = compare_lossless(lossless, dense, PROMPTS, 12).tokens
    monkeypatch.setattr(lossless, "verify", wrong)
    found = compare_lossless(lossless, dense, PROMPTS, 12, partial(DraftLength, 2))
    assert found.tokens == expected
    assert len(found.wrong) > 2
    assert found.ties == []
    assert {one.prompt for one in found.wrong} == {0, 1}


def test_ties():
    assert Difference(0, 3, 1e-6).tie
    assert not Difference(0, 3, 1e-3).tie
    assert Difference(0, 3, 0.0).tie


def test_batches_are_compared_too(sessions, monkeypatch):
    """Each batch finds what each text finds alone: the places with another token do not depend on the batch."""
    lossless, dense = sessions
    verify = lossless.verify
    monkeypatch.setattr(lossless, "verify", lambda tokens: -verify(tokens))
    prompts = [*PROMPTS, [7, 7, 7]]
    found = compare_lossless(lossless, dense, prompts, 10, partial(DraftLength, 2), batches=(1, 2))
    assert found.tokens == 2 * 3 * 10
    places = [{(one.prompt, one.position) for one in found.wrong if one.batch == batch} for batch in (1, 2)]
    alone = {(one.prompt, one.position) for one in found.wrong if one.prompt == 2}
    assert places[0] - alone == places[1] - alone
    assert {prompt for prompt, _ in places[0]} == {0, 1, 2}


def test_too_many_tokens(sessions):
    with pytest.raises(UserError, match="exceed the model"):
        compare_lossless(*sessions, [np.ones(60, int).tolist()], 12)
