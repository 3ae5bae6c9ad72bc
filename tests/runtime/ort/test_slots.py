"""Slots: a sequence gets what it gets alone, whatever else the running batch has."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from shadowllm.bundle.manifest import DATA_FILE, read_manifest
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort import kv_cache
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.ort.slots import OrtSlots

PROMPTS = ([5, 17, 42, 8, 61], [5, 17], [9, 9, 30], [44, 4])
FORCED = [3, 90, 14, 55, 7]
# The third one decodes dense.
BUDGETS = (Budget(neurons=0.2, heads=0.5), Budget(neurons=0.6, heads=0.75), Budget(), Budget(neurons=0.3, heads=0.5))


def alone(folder, prompt, budget, **options):
    """The logits after the prompt and after each forced token, of a session with one sequence."""
    with OrtSession(folder, threads=1, **options) as session:
        session.set_budget(budget)
        session.reset()
        found = [session.prefill([prompt])[0].copy()]
        return found + [session.decode(np.array([token]))[0].copy() for token in FORCED]


def alone_in_parts(folder, prompt, budget, **options):
    """The same of the only slot, whose prompt comes in two parts."""
    with OrtSlots(folder, 1, threads=1, **options) as session:
        slot = session.join(budget)
        session.extend(slot, prompt[:1])
        found = [session.extend(slot, prompt[1:]).copy()]
        return found + [session.step({slot: token})[slot].copy() for token in FORCED]


def served(folder, budgets, **options):
    """The same from slots: sequences join and leave at different times, and not every step names all of them."""
    found: list[list[np.ndarray]] = [[], [], [], []]
    with OrtSlots(folder, 3, threads=1, **options) as session:
        slots: dict[int, int] = {}

        def join(number):
            slots[number] = session.join(budgets[number])
            first, rest = PROMPTS[number][:1], PROMPTS[number][1:]
            if number == 1:  # its prompt comes in two parts
                session.extend(slots[1], first)
                found[1].append(session.extend(slots[1], rest).copy())
            else:
                found[number].append(session.extend(slots[number], PROMPTS[number]).copy())

        def step(*numbers):
            tokens = {slots[number]: FORCED[len(found[number]) - 1] for number in numbers}
            for slot, logits in session.step(tokens).items():
                found[next(number for number in numbers if slots[number] == slot)].append(logits.copy())

        join(0)
        step(0)
        join(1)
        step(1, 0)
        join(2)
        step(0, 1, 2)
        step(1, 2)
        step(0, 2)
        step(0, 1)
        session.leave(slots.pop(0))
        step(2, 1)
        join(3)  # in the slot that became free
        step(3, 2)
    assert [len(logits) for logits in found] == [6, 6, 6, 2]
    return found


CASES = [
    ("llama-head-dim-16", "quantized-shadow", "shadow", None),
    ("llama-gqa", "layerwise", "drop", None),
    ("opt", "shadow", "drop", None),
    ("llama-blocks", "quantized-shadow", "shadow", "int6"),
    ("llama-blocks", "quantized-shadow", "drop", "int4"),  # runs its sequences one after the other
]


# The first and the last one run the graph for all heads, where there is one.
ALL_HEADS = (Budget(neurons=0.2), BUDGETS[1], BUDGETS[2], Budget(neurons=0.3))


@pytest.mark.skipif(not native_ops.kernels(), reason="the native ops are not built")
@pytest.mark.parametrize(
    ("variant", "kind", "rest", "weight_dtype", "budgets"),
    [*((*case, BUDGETS) for case in CASES), (*CASES[0], ALL_HEADS)],
)
def test_texts_are_those_of_a_session_alone(bundle, variant, kind, rest, weight_dtype, budgets, monkeypatch):
    monkeypatch.setattr(kv_cache, "CACHE_BLOCK", 4)  # the cache grows in the middle of a text
    folder = bundle(variant, kind=kind, rest=rest, weight_dtype=weight_dtype)
    found = served(folder, budgets, prepack=True)
    for number, logits in enumerate(found):
        expected = (alone_in_parts if number == 1 else alone)(folder, PROMPTS[number], budgets[number], prepack=True)
        np.testing.assert_array_equal(logits, expected[: len(logits)])


def test_neighbours_do_not_change_a_bit(bundle):
    """Also with function bodies and weights that are not packed, which ONNX Runtime would add in another order."""
    folder = bundle("llama-gqa", kind="static")
    for options in ({}, {"native": False}):
        found = served(folder, BUDGETS, **options)
        other = served(folder, (BUDGETS[0], BUDGETS[2], BUDGETS[1], BUDGETS[3]), **options)
        np.testing.assert_array_equal(found[0], other[0])
        np.testing.assert_array_equal(found[3], other[3])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("budget", [BUDGETS[0], BUDGETS[2]], ids=["sparse", "dense"])
def test_a_text_with_nan_does_not_harm_the_next_ones(bundle, budget, native):
    def texts(damaged):
        with OrtSlots(folder, 2, threads=1, native=native) as session:
            first, neighbour = session.join(budget), session.join(budget)
            session.extend(first, PROMPTS[0])
            session.verify(first, FORCED)
            found = [session.extend(neighbour, PROMPTS[1])]
            if damaged:
                for array in session._cache.arrays.values():
                    array[session._rows.index(first), :, : session.length(first)] = np.nan
            session.rewind(first, 2)
            session.leave(first)
            second = session.join(budget)
            found.append(session.extend(second, PROMPTS[2]))
            return [*found, *session.step({neighbour: 4, second: 7}).values()]

    folder = bundle("opt", kind="shadow", rest="drop")
    for damaged, healthy in zip(texts(True), texts(False), strict=True):
        np.testing.assert_array_equal(damaged, healthy)


def test_a_prompt_may_come_in_parts(bundle):
    folder = bundle("llama-head-dim-16", kind="static")
    whole, parts = (made(folder, PROMPTS[0], Budget()) for made in (alone, alone_in_parts))
    assert np.abs(np.subtract(whole, parts)).max() < 1e-5 * np.abs(whole).max()


def test_a_slot_tells_its_length_and_its_selection(bundle):
    folder = bundle("llama-gqa", kind="static")
    with OrtSlots(folder, 2) as session:
        sparse, dense = session.join(BUDGETS[0]), session.join(BUDGETS[2])
        for slot in (sparse, dense):
            session.extend(slot, PROMPTS[0])
            assert session.selection(slot) is None
        session.step({dense: 3, sparse: 4})
        assert (session.length(sparse), session.length(dense)) == (6, 6)
        assert session.selection(dense) is None
        selection = session.selection(sparse)
        assert {unit: found.shape for unit, found in selection.items()} == {"heads": (2, 4), "neurons": (2, 88)}
        assert ((selection["heads"] >= 0).sum(axis=1) == 2).all()


@pytest.mark.skipif(not native_ops.kernels(), reason="the native ops are not built")
def test_graphs_that_cannot_be_loaded_meet_only_the_sequence_that_needs_them(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(kind="quantized-shadow", rest="shadow"), folder)
    with OrtSlots(folder, 2) as session:
        slot = session.join(Budget(neurons=0.2, heads=0.5))
        session.extend(slot, PROMPTS[0])
        (folder / DATA_FILE).unlink()
        with pytest.raises(UserError, match="removed or replaced while it was in use; start again"):
            session.join(Budget(neurons=0.2))
        session.step({slot: 3})
        assert session.join(Budget(neurons=0.3, heads=0.5)) != slot


@pytest.mark.parametrize("options", [{"dtype": "float32"}, {"dtype": "bfloat16"}, {"weight_dtype": "int8"}])
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc: not Linux")
def test_graphs_that_are_needed_later_are_those_of_a_renamed_bundle(bundle, tmp_path, options):
    original, folder = bundle(kind="quantized-shadow", rest="shadow", **options), tmp_path / "bundle"
    shutil.copytree(original, folder)
    budgets = (Budget(), Budget(neurons=0.2), Budget(shortlist=5), Budget(neurons=0.3, heads=0.5))
    with OrtSlots(folder, 1, threads=1) as session:
        folder.rename(tmp_path / "old")
        shutil.copytree(original, folder)
        (folder / DATA_FILE).write_bytes(bytes((folder / DATA_FILE).stat().st_size))
        for budget in budgets:
            slot = session.join(budget)
            found = [session.extend(slot, PROMPTS[0]).copy(), session.step({slot: 3})[slot].copy()]
            found += [session.verify(slot, FORCED).copy()]
            session.leave(slot)
            with OrtSlots(original, 1, threads=1) as fresh:
                slot = fresh.join(budget)
                expected = [fresh.extend(slot, PROMPTS[0]).copy(), fresh.step({slot: 3})[slot].copy()]
                expected += [fresh.verify(slot, FORCED).copy()]
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)


def test_wrong_calls(bundle):
    folder = bundle("llama-gqa", kind="static")
    with pytest.raises(UserError, match="0 slots"):
        OrtSlots(folder, 0)
    with OrtSlots(folder, 1) as session:
        with pytest.raises(UserError, match="low-bit copy"):
            session.join(Budget(shortlist=3))
        slot = session.join()
        with pytest.raises(RuntimeError, match="all 1 slots are taken"):
            session.join()
        with pytest.raises(UserError, match="nothing to continue"):
            session.step({slot: 1})
        for tokens, words in (([], "empty"), ([97], "token 97"), ([1] * 65, "65 tokens")):
            with pytest.raises(UserError, match=words):
                session.extend(slot, tokens)
        session.extend(slot, [1] * 64)
        with pytest.raises(UserError, match="65 tokens, the model has 64 positions"):
            session.step({slot: 1})


def test_verification_equals_that_of_a_session(bundle):
    """Rows of other sequences are not touched, and a rewound sequence goes on as the session does."""
    folder = bundle("llama-blocks", kind="quantized-shadow", rest="shadow")
    with OrtSession(folder, threads=1) as session, OrtSlots(folder, 2, threads=1) as slots:
        session.set_budget(BUDGETS[0])
        session.prefill([PROMPTS[0]])
        other, slot = slots.join(BUDGETS[3]), slots.join(BUDGETS[0])
        slots.extend(other, PROMPTS[1])
        slots.extend(slot, PROMPTS[0])
        length = len(PROMPTS[0])
        for token in FORCED[:2]:
            session.decode(np.array([token]))
            slots.step({slot: token, other: 7})
        session.rewind(np.array([length]))
        slots.rewind(slot, length)
        expected = session.verify(np.array([FORCED]))[0].copy()
        assert np.array_equal(slots.verify(slot, FORCED), expected)
        assert slots.selection(slot) is None
        session.rewind(np.array([length + 2]))
        slots.rewind(slot, length + 2)
        assert (slots.decodes(slot), slots.length(slot), slots.length(other)) == ("sparse", length + 2, 4)
        expected = session.decode(np.array([33]))[0].copy()
        assert np.array_equal(slots.step({other: 3, slot: 33})[slot], expected)
        for wrong in (0, length + 4):
            with pytest.raises(UserError, match="cannot be set back"):
                slots.rewind(slot, wrong)


def test_a_cache_that_cannot_grow_stays_as_it_was(bundle, monkeypatch):
    cache = kv_cache.KVCache(read_manifest(bundle()).spec, 2)
    cache.reserve(1, [])
    for array in cache.arrays.values():
        array[:] = 7
    before, made, zeros = dict(cache.arrays), [], np.zeros

    def exhausted(*args, **options):
        made.append(1)
        if len(made) == 3:
            raise MemoryError
        return zeros(*args, **options)

    monkeypatch.setattr(np, "zeros", exhausted)
    with pytest.raises(MemoryError):
        cache.reserve(cache.capacity + 1, [])
    assert cache.capacity == kv_cache.CACHE_BLOCK
    assert all(cache.arrays[name] is array for name, array in before.items())
    assert cache.reserve(cache.capacity + 1, [5])
    assert cache.capacity == 2 * kv_cache.CACHE_BLOCK
    for array in cache.arrays.values():
        assert (array[0, :, :5] == 7).all()
        assert np.count_nonzero(array) == array[0, :, :5].size  # the rest would take memory if it was copied


def test_a_sequence_that_is_announced_with_its_length_grows_the_cache_once(bundle, monkeypatch):
    monkeypatch.setattr(kv_cache, "CACHE_BLOCK", 4)
    with OrtSlots(bundle(), 2, threads=1) as session:
        slot = session.join(length=9)
        before = dict(session._cache.arrays)
        for token in range(7):
            session.extend(slot, [token])
        session.step({slot: 3})
        session.step({slot: 4})
        assert session.length(slot) == 9
        assert all(session._cache.arrays[name] is array for name, array in before.items())
        monkeypatch.setattr(np, "zeros", lambda *_, **__: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            session.join(length=13)
        session.step({slot: 5})
        monkeypatch.undo()
        assert session.join(length=13) != slot
