"""Tensors between pages without access: a kernel that reads or writes past the end of one ends with SIGSEGV."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

NO_ACCESS = 0  # PROT_NONE, which mmap does not name


def guarded(tensor: Tensor) -> Tensor:
    """A copy of a CPU tensor that ends where a page without access begins; there is one before its first page too.

    A tensor that is empty or not contiguous is returned itself.
    """
    if not tensor.numel() or not tensor.is_contiguous():
        return tensor
    inside = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, inside + 2 * mmap.PAGESIZE)
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for page in (first, first + mmap.PAGESIZE + inside):
        if protect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), ctypes.c_int(NO_ACCESS)):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    start = mmap.PAGESIZE + inside - tensor.nbytes
    found = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start)
    return found.view(tensor.shape).copy_(tensor)
