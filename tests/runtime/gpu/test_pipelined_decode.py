"""Pipelined decoding: steps are launched before earlier results are read."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from shadowllm.runtime.gpu.pipelined_decode import AHEAD, SLOTS, PipelinedDecode


class Counting(PipelinedDecode):
    """Each step counts up; writing a slot before it was read is an error."""

    step = 1

    def __init__(self):
        self._lengths, self.count, self.slots = np.zeros(1, dtype=np.int64), 0, {}

    def _start(self, tokens, steps):
        self.count = int(tokens[0])
        if steps > 20:
            raise ValueError

    def _replay(self):
        self.count += self.step

    def set_budget(self, step):
        self._budgets_set += 1
        self.step = step

    def _send(self, slot):
        assert slot not in self.slots
        assert slot < SLOTS
        self.slots[slot] = np.array([self.count])

    def _received(self, slot):
        return self.slots.pop(slot)

    def _fetched(self):
        return np.array([[self.count]])


def test_steps_run_ahead_of_their_results():
    session = Counting()
    found = session.decode_greedy(np.array([10]), 12)
    assert [int(tokens[0]) for tokens in itertools.islice(found, 3)] == [11, 12, 13]
    assert session.count == 10 + 3 + AHEAD
    assert session._lengths == [3]
    assert [int(tokens[0]) for tokens in found] == list(range(14, 23))
    assert session.count == 10 + 12
    assert session._lengths == [12]
    assert session.decode(np.array([5])) == [[6]]


def test_fewer_steps_than_are_launched_ahead_and_refusal_at_once():
    session = Counting()
    assert [int(tokens[0]) for tokens in session.decode_greedy(np.array([0]), 1)] == [1]
    assert session.count == 1
    with pytest.raises(ValueError):
        session.decode_greedy(np.array([0]), 21)


@pytest.mark.parametrize("taken", [1, 3, 8, 11])
def test_a_budget_holds_from_the_next_step_on(taken):
    session = Counting()
    found = session.decode_greedy(np.array([10]), 12)
    before = [int(tokens[0]) for tokens in itertools.islice(found, taken)]
    session.set_budget(100)
    after = [int(tokens[0]) for tokens in found]
    assert before == [11 + i for i in range(taken)]
    assert after == [10 + taken + 100 * (i + 1) for i in range(12 - taken)]
    assert session._lengths == [12]
    assert session.slots == {}


def test_a_budget_may_follow_a_token_that_could_not_be_drawn():
    session = Counting()
    found = session.decode_greedy(np.array([-5]), 4)
    assert next(found) == [-4]
    session.set_budget(1)
    assert next(found) == [1]
