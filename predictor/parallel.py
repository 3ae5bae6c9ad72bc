"""Training of one network in several processes, each with its own share of the text.

    torchrun --nproc-per-node 2 -m shadowllm.cli train MODEL --traces traces.safetensors ...

Any launcher that sets the environment variables of torchrun can start the processes. (`accelerate launch` starts
several processes on CPUs only through MPI.) Accelerate is an optional dependency; a single process does not need it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shadowllm.errors import UserError


def process_count() -> int:
    """Return the number of processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Workers:
    """The processes that train together. Usually there is only one.

    Attributes:
        count: number of processes.
        index: index of this process, from 0.

    Raises:
        UserError: there are several processes, and accelerate is not installed.
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
            self._accelerator = Accelerator(cpu=True)  # the reference decoder runs on the CPU
            self.index = int(self._accelerator.process_index)

    def share(self, items: Tensor) -> Tensor:
        """Return this process's part of the items along the first axis. Parts have equal sizes and do not overlap.

        Raises:
            UserError: fewer items than processes.
        """
        each = len(items) // self.count
        if not each:
            raise UserError(f"{len(items)} training windows for {self.count} processes", "give more text")
        return items[: each * self.count][self.index :: self.count]

    def average(self, tensors: Sequence[Tensor | None]) -> None:
        """Replace each tensor by its mean over the processes. All must call this with tensors of the same shapes."""
        found = [tensor for tensor in tensors if tensor is not None]
        if self._accelerator is None or not found:
            return
        # One exchange for all tensors: at these sizes, most of the cost is the latency of a message.
        flat = torch.cat([tensor.flatten() for tensor in found])
        parts = self._accelerator.reduce(flat, reduction="mean").split([tensor.numel() for tensor in found])
        for tensor, part in zip(found, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
