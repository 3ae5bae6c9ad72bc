"""Sessions that run a bundle, and the generation loop that uses them."""

from __future__ import annotations

from os import PathLike
from typing import get_args

from shadowllm.errors import UserError
from shadowllm.limits import check_path, check_switch
from shadowllm.models.sparsity import Budget
from shadowllm.runtime.generation.generate import generate
from shadowllm.runtime.generation.sampling import Sampling
from shadowllm.runtime.session import Prefill, Session
from shadowllm.runtime.slots import SlotSession

__all__ = [
    "BACKENDS",
    "SLOT_BACKENDS",
    "Budget",
    "Sampling",
    "Session",
    "SlotSession",
    "check_slots",
    "generate",
    "open_session",
    "open_slots",
]

BACKENDS = ("ort", "ort-dense", "torch", "torch-dense", "triton", "triton-dense", "tensorrt_rtx", "tensorrt")
SLOT_BACKENDS = ("ort", "torch")


def open_session(
    bundle: str | PathLike[str],
    backend: str = "ort",
    *,
    threads: int | None = None,
    profile: bool = False,
    prefill: Prefill = "dense",
    prepack: bool = False,
) -> Session:
    """Make a session for a bundle; only the packages that the backend needs are imported.

    Args:
        bundle: folder written by ``shadowllm export``.
        backend: one of `BACKENDS`; a ``-dense`` one runs the dense model.
        threads: CPU threads of each operator, for the backends ``ort`` and ``torch``.
        profile: whether an ONNX Runtime session records the seconds of each part of a step.
        prefill: which graphs prefill in the backend ``ort``; "sparse" needs less memory and takes longer, see
            `OrtSession`.
        prepack: whether a sparse ONNX Runtime session keeps a packed copy of float weights, so that its dense steps
            (prefill, and the verification of lossless decoding) are as fast as those of a dense session.

    Raises:
        UserError: an unknown backend, no bundle, engines that cannot run, or an option that the backend does not have.
    """
    bundle = check_path("the bundle", bundle)
    if prefill != "dense" and backend in BACKENDS and backend != "ort":
        raise UserError(f"the backend {backend!r} does not prefill with sparse graphs", "leave out prefill, or use ort")
    if prefill not in get_args(Prefill):
        raise UserError(f"unknown kind of prefill {prefill!r}", f"use {' or '.join(get_args(Prefill))}")
    if threads is not None and backend in BACKENDS and not backend.startswith(("ort", "torch")):
        raise UserError(f"threads do nothing for the backend {backend!r}, which runs on a GPU", "leave them out")
    if check_switch("prepack", prepack) and backend in BACKENDS and not backend.startswith("ort"):
        raise UserError(f"the backend {backend!r} does not pack weights", "leave prepack out")
    if backend in ("ort", "ort-dense"):
        from shadowllm.runtime.ort.loaded_bundle import Kind
        from shadowllm.runtime.ort.session import OrtSession

        kind: Kind = "dense" if backend == "ort-dense" else "auto"
        return OrtSession(bundle, kind, threads, profile, prefill=prefill, prepack=prepack)
    if backend in ("torch", "torch-dense"):
        from shadowllm.runtime.torch_session import TorchSession

        return TorchSession.open(bundle, "dense" if backend == "torch-dense" else "sparse", threads)
    if backend in ("triton", "triton-dense"):
        from shadowllm.runtime.gpu.cuda_graph import kernel_device

        kernel_device()  # checks that Triton is installed, before it is imported
        from shadowllm.runtime.gpu.triton_session import TritonSession

        return TritonSession.open(bundle, "dense" if backend == "triton-dense" else "sparse")
    if backend in ("tensorrt_rtx", "tensorrt"):
        from shadowllm.runtime.gpu.trt_session import TrtSession

        return TrtSession.open(bundle, "tensorrt" if backend == "tensorrt" else "tensorrt_rtx")
    raise UserError(f"no backend {backend!r}", f"use one of {', '.join(BACKENDS)}")


def open_slots(
    bundle: str | PathLike[str], backend: str, slots: int, threads: int | None = None, prepack: bool = False
) -> SlotSession:
    """Make a session with slots for a bundle, for the serving of many sequences at once.

    Args:
        bundle: folder written by ``shadowllm export``.
        backend: one of `SLOT_BACKENDS`.
        slots: how many sequences it can hold.
        threads: CPU threads of each operator; None is the backend's default.
        prepack: see `open_session`.

    Raises:
        UserError: an unknown backend, no bundle, a damaged file in it, or an option that the backend does not have.
    """
    bundle = check_path("the bundle", bundle)
    check_slots(backend, prepack)
    if backend == "ort":
        from shadowllm.runtime.ort.slots import OrtSlots

        return OrtSlots(bundle, slots, threads, prepack=prepack)
    from shadowllm.runtime.torch_slots import TorchSlots

    return TorchSlots(bundle, slots, threads)


def check_slots(backend: str, prepack: bool) -> None:
    """Refuse options that `open_slots` cannot follow, without opening a bundle.

    Raises:
        UserError: an unknown backend, or an option that it does not have.
    """
    if backend not in SLOT_BACKENDS:
        raise UserError(f"no backend {backend!r} with slots", f"use one of {', '.join(SLOT_BACKENDS)}")
    if check_switch("prepack", prepack) and backend != "ort":
        raise UserError(f"the backend {backend!r} does not pack weights", "leave prepack out")
