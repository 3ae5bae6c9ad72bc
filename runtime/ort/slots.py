"""Serves many sequences at once on ONNX Runtime: they join and leave a running batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget, Unit
from shadowllm.runtime.inputs import check_appended, check_rewind
from shadowllm.runtime.ort.decode_step import DecodeStep
from shadowllm.runtime.ort.kv_cache import KVCache
from shadowllm.runtime.ort.loaded_bundle import DENSE, LoadedBundle, Numbers, Plan
from shadowllm.runtime.ort.prompt_step import run_prompt
from shadowllm.runtime.ort.verification import Verification
from shadowllm.runtime.session import Decodes


@dataclass
class _Sequence:
    """The sequence of a slot: its plan, the inputs of its budget, and what its last step selected.

    Attributes:
        length: its tokens.
        written: positions of its row that are not zero, at least ``length`` of them.
    """

    plan: Plan
    numbers: Numbers
    length: int = 0
    written: int = 0
    selection: dict[Unit, np.ndarray] = field(default_factory=dict)


class OrtSlots:
    """A `SlotSession` over ONNX Runtime.

    The sequences of taken slots are in the first rows of one cache, without gaps. A step puts those that it names into
    the first rows, and runs those with the same plan at once. The buffers of each number of rows are bound once.
    Sequences whose budget saves less than choosing costs are decoded dense, see `OrtSession`.

    Where ONNX Runtime's products would give a sequence other bits beside others (see `LoadedBundle.independent`), a
    step runs its sequences one after the other.

    Args:
        bundle: folder written by ``shadowllm export``.
        slots: how many sequences it can hold.
        threads, native, prepack: see `OrtSession`.

    Raises:
        UserError: as `OrtSession`, or there are no slots.
    """

    def __init__(
        self, bundle: Path, slots: int, threads: int | None = None, native: bool = True, prepack: bool = False
    ) -> None:
        if slots < 1:
            raise UserError(f"{slots} slots hold no sequence", "give 1 or more")
        self._bundle = LoadedBundle(bundle, threads=threads, native=native, prepack=prepack)
        self.manifest, self.spec, self.slots = self._bundle.manifest, self._bundle.spec, slots
        self._sequences: dict[int, _Sequence] = {}
        self._rows: list[int] = []  # the slot of each row of the cache
        self._steps: dict[tuple[Plan, int, int], DecodeStep] = {}

    def __enter__(self) -> Self:
        self._bundle.load(self._bundle.plan(self.manifest.budget))
        self._cache = KVCache(self.spec, self.slots)
        return self

    def __exit__(self, *error: object) -> None:
        self._sequences, self._rows, self._steps = {}, [], {}
        self._cache = KVCache(self.spec, 0)
        self._bundle.close()

    def join(self, budget: Budget | None = None, length: int = 1) -> int:
        """See `SlotSession.join`."""
        slot = next((slot for slot in range(self.slots) if slot not in self._sequences), None)
        if slot is None:
            raise RuntimeError(f"all {self.slots} slots are taken")
        budget = budget or self.manifest.budget
        plan = self._bundle.plan(budget)
        # Here, so that an error meets this sequence only.
        self._bundle.graphs(plan)
        self._reserve(length)
        self._sequences[slot] = _Sequence(plan, self._bundle.numbers(budget, plan.decodes))
        self._rows.append(slot)
        return slot

    def leave(self, slot: int) -> None:
        """See `SlotSession.leave`. The sequence of the last row moves to the row that becomes free."""
        row, last = self._rows.index(slot), self._rows.pop()
        left = self._sequences.pop(slot)
        # Attention masks what is left in a row, but NaN is still NaN behind a mask.
        self._cache.clear(row, max(left.written, left.length))
        if last != slot:
            self._cache.copy(len(self._rows), row, self._sequences[last].length)
            self._rows[row] = last

    def extend(self, slot: int, tokens: Sequence[int]) -> np.ndarray:
        """See `SlotSession.extend`."""
        sequence = self._sequences[slot]
        end = check_appended(tokens, sequence.length, self.spec)
        self._reserve(end)
        positions = np.arange(sequence.length, end, dtype=np.int64)[None]
        cache = self._cache.buffers(self._rows.index(slot), 1)
        input_ids, last = np.array([tokens], dtype=np.int64), np.array([len(tokens) - 1])
        logits = run_prompt(self._bundle, input_ids, positions, last, cache)
        sequence.length, sequence.selection = end, {}
        found: np.ndarray = logits[0]
        return found

    def step(self, tokens: Mapping[int, int]) -> Mapping[int, np.ndarray]:
        """See `SlotSession.step`."""
        for slot, token in tokens.items():
            if not self._sequences[slot].length:
                raise UserError(f"slot {slot} has nothing to continue", "extend it with a prompt first")
            self._reserve(check_appended([token], self._sequences[slot].length, self.spec))
        named: dict[Plan, list[int]] = {}
        for slot in self._rows:
            if slot in tokens:
                named.setdefault(self._sequences[slot].plan, []).append(slot)
        self._arrange([slot for slots in named.values() for slot in slots])
        found: dict[int, np.ndarray] = {}
        first = 0
        for plan, slots in named.items():
            for part in self._together(plan, slots):
                found |= self._run(plan, first, part, [tokens[slot] for slot in part])
                first += len(part)
        return found

    def decodes(self, slot: int) -> Decodes:
        """See `SlotSession.decodes`."""
        return self._sequences[slot].plan.decodes

    def rewind(self, slot: int, length: int) -> None:
        """See `SlotSession.rewind`."""
        sequence = self._sequences[slot]
        check_rewind(np.array([length]), np.array([sequence.length]))
        sequence.length, sequence.written = length, max(sequence.written, sequence.length)

    def verify(self, slot: int, tokens: Sequence[int]) -> np.ndarray:
        """See `SlotSession.verify`."""
        sequence = self._sequences[slot]
        end = check_appended(tokens, sequence.length, self.spec)
        self._reserve(end)
        cache = self._cache.buffers(self._rows.index(slot), 1)
        step = Verification(self._bundle, 1, len(tokens), cache)
        logits: np.ndarray = step(np.array([tokens]), np.array([sequence.length]))[0]
        sequence.length, sequence.selection = end, {}
        return logits

    def length(self, slot: int) -> int:
        """See `SlotSession.length`."""
        return self._sequences[slot].length

    def selection(self, slot: int) -> Mapping[Unit, np.ndarray] | None:
        """See `SlotSession.selection`."""
        return self._sequences[slot].selection or None

    def _together(self, plan: Plan, slots: list[int]) -> Iterator[list[int]]:
        """The slots that run at once: all, or one after the other."""
        if self._bundle.independent(plan):
            yield from [slots] if slots else []
        else:
            yield from ([slot] for slot in slots)

    def _run(self, plan: Plan, first: int, slots: list[int], tokens: list[int]) -> dict[int, np.ndarray]:
        """One step of the sequences in consecutive rows."""
        sequences, key = [self._sequences[slot] for slot in slots], (plan, first, len(slots))
        if key not in self._steps:
            if len(self._steps) > 2 * self.slots:  # each has buffers of its own
                self._steps.clear()
            cache = self._cache.buffers(first, len(slots))
            self._steps[key] = DecodeStep(self._bundle, plan, len(slots), cache)
        step = self._steps[key]
        step.selections.ask([sequence.numbers for sequence in sequences])
        logits = step(tokens, [sequence.length for sequence in sequences])
        for row, sequence in enumerate(sequences):
            sequence.length += 1
            indices = step.selections.indices.items() if plan != DENSE else ()
            sequence.selection = {unit: found[:, row].copy() for unit, found in indices}
        return dict(zip(slots, logits, strict=True))

    def _arrange(self, slots: list[int]) -> None:
        """Exchange rows, so that the first ones have these slots in their order."""
        for row, slot in enumerate(slots):
            other = self._rows[row]
            if other != slot:
                place = self._rows.index(slot)
                self._cache.swap(row, place, max(self._sequences[slot].length, self._sequences[other].length))
                self._rows[row], self._rows[place] = slot, other

    def _reserve(self, length: int) -> None:
        if self._cache.reserve(length, [self._sequences[slot].length for slot in self._rows]):
            self._steps.clear()  # they are bound to the former arrays
