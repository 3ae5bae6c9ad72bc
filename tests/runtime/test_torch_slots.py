"""The reference of sessions with slots equals one reference session per sequence."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget
from shadowllm.runtime import open_session, open_slots

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[5, 17, 42, 8, 61], [9], [30, 31, 32]]
BUDGETS = [Budget(heads=0.5, neurons=0.25), None, Budget()]


@pytest.fixture(scope="module")
def slots(bundle):
    with open_slots(bundle(), "torch", 3, 1) as session:
        yield session


def alone(folder, prompt, budget, tokens):
    with open_session(folder, "torch") as session:
        session.reset()
        if budget is not None:
            session.set_budget(budget)
        return [session.prefill([prompt])[0].copy(), *(session.decode(np.array([token]))[0] for token in tokens)]


def test_sequences_that_join_and_leave_equal_those_alone(slots, bundle):
    tokens = [3, 90, 14]
    right = [alone(bundle(), *case, tokens) for case in zip(PROMPTS, BUDGETS, strict=True)]
    first = slots.join(BUDGETS[0])
    np.testing.assert_array_equal(slots.extend(first, PROMPTS[0]), right[0][0])
    found = {first: [slots.step({first: tokens[0]})[first]]}
    others = [slots.join(budget) for budget in BUDGETS[1:]]
    assert len({first, *others}) == 3
    for slot, prompt, expected in zip(others, PROMPTS[1:], right[1:], strict=True):
        np.testing.assert_array_equal(slots.extend(slot, prompt), expected[0])
        found[slot] = []
    for step in range(3):
        taken = {slot: tokens[len(rows)] for slot, rows in found.items() if len(rows) < 3}
        for slot, logits in slots.step(taken).items():
            found[slot].append(logits)
        if step == 1:
            slots.leave(first)
    for slot, expected in zip((first, *others), right, strict=True):
        np.testing.assert_array_equal(found[slot], expected[1:])
    for slot in others:
        assert slots.length(slot) == len(PROMPTS[1 + others.index(slot)]) + 3
        slots.leave(slot)


def test_a_prompt_in_parts_is_the_whole_prompt(slots, bundle):
    slot = slots.join()
    slots.extend(slot, PROMPTS[0][:2])
    found = slots.extend(slot, PROMPTS[0][2:])
    np.testing.assert_allclose(found, alone(bundle(), PROMPTS[0], None, [])[0], rtol=1e-4, atol=1e-5)
    assert slots.selection(slot) is None
    slots.step({slot: 7})
    selection = slots.selection(slot)
    assert selection["neurons"].shape == (2, 88)
    assert ((selection["neurons"] >= 0).sum(axis=1) == 44).all()
    assert (selection["neurons"][:, 44:] == -1).all()
    slots.leave(slot)


def test_errors(slots):
    taken = [slots.join() for _ in range(3)]
    with pytest.raises(RuntimeError, match="all 3 slots are taken"):
        slots.join()
    with pytest.raises(UserError, match="nothing to continue"):
        slots.step({taken[0]: 3})
    slots.extend(taken[0], [3])
    for tokens, words in (([], "empty"), ([97], "outside the vocabulary"), ([3] * 64, "exceed the model's 64")):
        with pytest.raises(UserError, match=words):
            slots.extend(taken[0], tokens)
    assert slots.length(taken[0]) == 1
    for slot in taken:
        slots.leave(slot)
    with pytest.raises(UserError, match="the budget has 3 fractions"):
        slots.join(Budget(neurons=(0.1, 0.2, 0.3)))
    slots.leave(slots.join())


def test_an_unknown_backend(bundle):
    with pytest.raises(UserError, match="no backend 'nonsense' with slots; use one of"):
        open_slots(bundle(), "nonsense", 1)
