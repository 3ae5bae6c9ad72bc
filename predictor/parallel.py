"""Training in several processes at once: each learns from its own share of the text, all learn one network.

    torchrun --nproc-per-node 2 -m shadowllm.cli train MODEL --traces traces.safetensors ...

starts them, and so does any launcher that sets torchrun's variables. (`accelerate launch` itself starts several
processes on CPUs through MPI alone.) Accelerate is an optional dependency, and one process never asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shadowllm.errors import UserError


def process_count() -> int:
    """How many processes were started together, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Workers:
    """The processes that train together; usually this one alone.

    Attributes:
        count: how many they are.
        index: which of them this is, from 0.

    Raises:
        UserError: there are several, and accelerate is not installed.
    """

    def __init__(self) -> None:
        self.count, self.index = process_count(), 0
        self._accelerator: Any = None
        if self.count > 1:
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise UserError(
                    f"training in {self.count} processes needs the accelerate package", "pip install accelerate"
                ) from error
            self._accelerator = Accelerator(cpu=True)  # where the reference decoder runs
            self.index = int(self._accelerator.process_index)

    def share(self, items: Tensor) -> Tensor:
        """This process's part of some items along the first axis: as many as every other's, none in two.

        Raises:
            UserError: fewer items than processes.
        """
        each = len(items) // self.count
        if not each:
            raise UserError(f"{len(items)} training windows for {self.count} processes", "give more text")
        return items[: each * self.count][self.index :: self.count]

    def average(self, tensors: Sequence[Tensor | None]) -> None:
        """Replace each tensor by its mean over the processes, which must all come here with the same shapes."""
        found = [tensor for tensor in tensors if tensor is not None]
        if self._accelerator is None or not found:
            return
        # One exchange for all: at these sizes a message's latency is what costs.
        flat = torch.cat([tensor.flatten() for tensor in found])
        parts = self._accelerator.reduce(flat, reduction="mean").split([tensor.numel() for tensor in found])
        for tensor, part in zip(found, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
