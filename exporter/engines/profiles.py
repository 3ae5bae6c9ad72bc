"""Optimisation profiles: the range of input shapes of an engine, for prefill and for decode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shadowllm.bundle.engine_record import Shape, ShapeProfile
from shadowllm.errors import UserError
from shadowllm.exporter.engines.graph import GraphInfo, TensorInfo

Range = tuple[int, int, int]


def profiles_for(
    graph: GraphInfo, *, capacity: int, max_seqlen: int, max_batch: int = 1, max_kept: int = 1
) -> list[ShapeProfile]:
    """Make a prefill profile and a decode profile for a graph.

    Args:
        graph: from `describe_onnx`.
        capacity: positions of the KV cache; TensorRT needs a fixed number.
        max_seqlen: longest prompt of one prefill call, at most ``capacity``.
        max_batch: most sequences at once; the engine is tuned for one.
        max_kept: most positions per sequence whose logits a prefill returns.

    Raises:
        UserError: a number below 1, a prompt longer than the cache, or a symbol without a range.
    """
    numbers = {"capacity": capacity, "max_seqlen": max_seqlen, "max_batch": max_batch, "max_kept": max_kept}
    for name, number in numbers.items():
        if number < 1:
            raise UserError(f"{name} is {number}", "it must be at least 1")
    if max_seqlen > capacity:
        raise UserError(
            f"prompts of {max_seqlen} tokens do not fit into a cache of {capacity}",
            "raise the capacity or lower the longest prompt",
        )
    fixed: dict[str, Range] = {"batch": (1, 1, max_batch), "capacity": (capacity, capacity, capacity)}
    decode: dict[str, Range] = fixed | {"seqlen": (1, 1, 1), "kept": (1, 1, 1)}
    # The builder chooses the kernels that are fastest near the middle length.
    prefill: dict[str, Range] = fixed | {"seqlen": (1, max(1, max_seqlen // 2), max_seqlen), "kept": (1, 1, max_kept)}
    return [_profile("prefill", graph, prefill), _profile("decode", graph, decode)]


def check_profiles(graph: GraphInfo, profiles: Sequence[ShapeProfile]) -> None:
    """Check that each profile has a shape range for every symbolic input, and for no unknown input.

    Raises:
        UserError: no profile, a missing or unknown input, a wrong rank or fixed size, or an empty range.
    """
    if not profiles:
        raise UserError("no optimisation profile was given", "an engine needs the shapes it is to serve")
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    for profile in profiles:
        missing = {t.name for t in dynamic_inputs(graph)} - set(profile.shapes)
        if missing or set(profile.shapes) - set(inputs):
            wrong = sorted(missing or set(profile.shapes) - set(inputs))[0]
            raise UserError(
                f"the {profile.name} profile {'lacks' if missing else 'names'} {wrong!r}"
                f"{'' if missing else ', which is no input'}",
                f"inputs with open shapes: {', '.join(t.name for t in dynamic_inputs(graph))}",
            )
        for name, shapes in profile.shapes.items():
            if not all(_fits(inputs[name], shape) for shape in shapes) or not _ascending(shapes):
                raise UserError(
                    f"the {profile.name} profile gives {name!r} the shapes {list(map(list, shapes))}, "
                    f"the graph has {list(inputs[name].shape)}",
                    "give min <= opt <= max of that form",
                )


def bindings(graph: GraphInfo, profiles: Sequence[ShapeProfile]) -> dict[str, int]:
    """The symbols that have the same value in all profiles; they become fixed sizes of the engine."""
    seen: dict[str, set[int]] = {}
    for profile in profiles:
        for tensor in dynamic_inputs(graph):
            for shape in profile.shapes[tensor.name]:
                for dim, size in zip(tensor.shape, shape, strict=True):
                    if isinstance(dim, str):
                        seen.setdefault(dim, set()).add(size)
    return {symbol: sizes.pop() for symbol, sizes in seen.items() if len(sizes) == 1}


def dynamic_inputs(graph: GraphInfo) -> list[TensorInfo]:
    """Inputs with a symbol in their shape."""
    return [tensor for tensor in graph.inputs if any(isinstance(dim, str) for dim in tensor.shape)]


def _profile(name: str, graph: GraphInfo, ranges: Mapping[str, Range]) -> ShapeProfile:
    def shape(tensor: TensorInfo, which: int) -> Shape:
        for dim in tensor.shape:
            if isinstance(dim, str) and dim not in ranges:
                raise UserError(
                    f"the dimension {dim!r} of {tensor.name} is unknown",
                    f"give shapes for it, or name it one of {', '.join(ranges)}",
                )
        return tuple(ranges[dim][which] if isinstance(dim, str) else dim for dim in tensor.shape)

    return ShapeProfile(name, {t.name: (shape(t, 0), shape(t, 1), shape(t, 2)) for t in dynamic_inputs(graph)})


def largest(graph: GraphInfo, profiles: Sequence[ShapeProfile], symbol: str) -> int:
    """The largest size that a symbol has in any profile; 1 if no input has the symbol."""
    sizes = [
        size
        for tensor in dynamic_inputs(graph)
        for profile in profiles
        for dim, size in zip(tensor.shape, profile.shapes[tensor.name][2], strict=True)
        if dim == symbol
    ]
    return max(sizes, default=1)


def _fits(tensor: TensorInfo, shape: Shape) -> bool:
    return len(shape) == len(tensor.shape) and all(
        size >= 1 if isinstance(dim, str) else size == dim for dim, size in zip(tensor.shape, shape, strict=True)
    )


def _ascending(shapes: tuple[Shape, Shape, Shape]) -> bool:
    return all(low <= best <= high for low, best, high in zip(*shapes, strict=True))
