"""The reference for sessions with slots: one reference session of batch 1 for each slot, over the same weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch

from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.weights import read_weights
from shadowllm.errors import UserError
from shadowllm.limits import check_threads, check_whole
from shadowllm.models.sparsity import UNITS, Budget, Unit
from shadowllm.runtime.inputs import check_tokens
from shadowllm.runtime.session import Decodes
from shadowllm.runtime.torch_session import TorchSession


class TorchSlots:
    """A `SlotSession` over the reference decoder. It is slow and exact, and other backends are compared with it.

    A step runs the sequences one after the other, so a result cannot depend on the other slots.

    Args:
        bundle: folder written by ``shadowllm export``.
        slots: how many sequences it can hold.
        threads: threads of PyTorch's operators in the whole process; None is PyTorch's default.

    Raises:
        UserError: no bundle, a damaged file in it, or a number out of range.
    """

    def __init__(self, bundle: Path, slots: int, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(check_threads(threads))
        self.slots = check_whole("the number of slots", slots)
        manifest = read_manifest(bundle)
        read = read_weights(bundle, manifest).kept()
        self.spec, self._budget = manifest.spec, manifest.budget
        self._sessions = [
            TorchSession(
                manifest.spec,
                read.sparse,
                read.predictor,
                manifest.budget,
                read.dense,
                read.copies,
                read.certificate,
            )
            for _ in range(slots)
        ]
        self._lengths: dict[int, int] = {}  # of the slots that are taken
        self._sparse: set[int] = set()  # slots whose last step was sparse

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for session in self._sessions:
            session.__exit__(*error)
        self._lengths.clear()

    def join(self, budget: Budget | None = None, length: int = 1) -> int:
        """See `SlotSession.join`. The length is ignored: PyTorch allocates as a text grows."""
        free = next((slot for slot in range(self.slots) if slot not in self._lengths), None)
        if free is None:
            raise RuntimeError(f"all {self.slots} slots are taken")
        self._sessions[free].set_budget(budget or self._budget)
        self._sessions[free].reset()
        self._lengths[free] = 0
        return free

    def leave(self, slot: int) -> None:
        """See `SlotSession.leave`."""
        del self._lengths[slot]
        self._sparse.discard(slot)
        self._sessions[slot].reset()

    def extend(self, slot: int, tokens: Sequence[int]) -> np.ndarray:
        """See `SlotSession.extend`."""
        session, before = self._sessions[slot], self._lengths[slot]
        if not before:
            logits = session.prefill([tokens])[0]
        elif not tokens:
            raise UserError("the prompt's next part is empty", "give at least one token")
        else:
            logits = session.verify(np.array([tokens], dtype=np.int64))[0, -1]
        self._lengths[slot] += len(tokens)
        self._sparse.discard(slot)
        return logits

    def step(self, tokens: Mapping[int, int]) -> Mapping[int, np.ndarray]:
        """See `SlotSession.step`."""
        given = {slot: np.array([token], dtype=np.int64) for slot, token in tokens.items()}
        for slot, token in given.items():  # all are checked before one is changed
            check_tokens(token, np.array([self._lengths[slot]]), self.spec)
        found = {slot: self._sessions[slot].decode(token)[0] for slot, token in given.items()}
        for slot in tokens:
            self._lengths[slot] += 1
            self._sparse.add(slot)
        return found

    def decodes(self, slot: int) -> Decodes:
        """See `SlotSession.decodes`."""
        return self._sessions[slot].decodes

    def rewind(self, slot: int, length: int) -> None:
        """See `SlotSession.rewind`."""
        self._sessions[slot].rewind(np.array([length]))
        self._lengths[slot] = length

    def verify(self, slot: int, tokens: Sequence[int]) -> np.ndarray:
        """See `SlotSession.verify`."""
        logits = self._sessions[slot].verify(np.array([tokens], dtype=np.int64))[0]
        self._lengths[slot] += len(tokens)
        self._sparse.discard(slot)
        return logits

    def length(self, slot: int) -> int:
        """See `SlotSession.length`."""
        return self._lengths[slot]

    def selection(self, slot: int) -> Mapping[Unit, np.ndarray] | None:
        """See `SlotSession.selection`."""
        if slot not in self._sparse:
            return None
        return {unit: _indices(self._sessions[slot].chosen[unit][:, 0].numpy()) for unit in UNITS}


def _indices(mask: np.ndarray) -> np.ndarray:
    """Return the indices of true elements in each row, int32 like ``mask``, padded with -1 at the end."""
    places = np.where(mask, np.arange(mask.shape[1]), mask.shape[1])
    places.sort(axis=1)
    return np.where(places < mask.shape[1], places, -1).astype(np.int32)
