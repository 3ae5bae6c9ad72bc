"""Slots for tests of what happens while a step is running."""

from __future__ import annotations

import threading

from shadowllm.runtime.torch_slots import TorchSlots


class PausedSlots(TorchSlots):
    """Slots whose decode steps wait until they may go on."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.go = threading.Event()

    def step(self, tokens):
        assert self.go.wait(60)
        return super().step(tokens)
