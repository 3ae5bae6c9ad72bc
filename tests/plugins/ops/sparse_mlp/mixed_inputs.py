"""Inputs of a ``SparseMLP`` with a low-bit copy, and the error that rounding to 8 bits may cause."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shadowllm.bundle.quantisation import LOW_BIT_COPY, Quantisation, quantise, quantise_nested
from shadowllm.plugins.ops.sparse_mlp.reference import sparse_mlp
from shadowllm.plugins.reference import ACTIVATIONS, copy_rows, full_rows
from tests.plugins.native_model import run_all, scalar
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_WEIGHTS, mlp_inputs

Inputs = dict[str, np.ndarray | None]
COPIES = ("c_gate", "c_up", "c_down", "cs_gate", "cs_up", "cs_down")
MIXED_WEIGHTS = (*MLP_WEIGHTS, *COPIES, "down_norms", "rest")
LIPSCHITZ = 1.13  # the largest slope of any activation


def with_copy(inputs: Inputs, *, rest: int = 1, choosing: bool = True, q: Quantisation = LOW_BIT_COPY) -> Inputs:
    """The same inputs with a low-bit copy; without indices if ``choosing``.

    With a nested ``q``, the copy is in the weights.
    """
    found = inputs | {"rest": scalar(rest)}
    for part in ("gate", "up", "down"):
        if (weight := inputs[f"w_{part}"]) is not None:
            wide = weight.astype(np.float32)
            if q.residual_bits:
                data, scales, found[f"w_{part}"] = quantise_nested(wide, q)
            else:
                data, scales = quantise(wide, q)
            found[f"c_{part}"], found[f"cs_{part}"] = data.reshape(*scales.shape, -1), scales
    if choosing:
        norms = np.linalg.norm(inputs["w_down"].astype(np.float32), axis=1)
        found |= {"indices": None, "down_norms": norms.astype(np.float32)}
    return found


def mixed_inputs(
    form: str,
    size: tuple[int, ...],
    *,
    rest: int = 1,
    choosing: bool = True,
    seed: int = 0,
    q: Quantisation = LOW_BIT_COPY,
) -> Inputs:
    return with_copy(mlp_inputs(form, size, seed), rest=rest, choosing=choosing, q=q)


def is_nested(inputs: Inputs) -> bool:
    return inputs["w_up"].dtype == np.uint8 and inputs.get("s_up") is None


@dataclass
class Rounding:
    """Standard deviations of the errors of rounding to 8 bits, for one token; first order in the step.

    An input of a block is rounded to a step of max / 127, which has a standard deviation of step / sqrt(12). So has a
    coefficient of the down projection, whose step follows from the largest of its group of rows and block; here, the
    largest of all rows.
    """

    products: np.ndarray  # (F,), the mean over tokens
    y: np.ndarray  # as x

    @classmethod
    def of(cls, inputs: Inputs, activation: str, full: np.ndarray | tuple[()] = ()) -> Rounding:
        """``full``: neurons with full rows that are rounded too, because the copy is a part of them."""
        x = inputs["x"]
        each = [cls._of_token(inputs | {"x": token}, activation, full) for token in x.reshape(-1, x.shape[-1])]
        return cls(np.mean([one.products for one in each], axis=0), np.reshape([one.y for one in each], x.shape))

    @classmethod
    def _of_token(cls, inputs: Inputs, activation: str, full: np.ndarray | tuple[()]) -> Rounding:
        x = inputs["x"].reshape(-1).astype(np.float64)
        width, blocks = x.size, inputs["c_up"].shape[1]
        block = 2 * inputs["c_up"].shape[2]
        wide = np.zeros(blocks * block)
        wide[:width] = x
        steps = np.repeat(np.abs(wide.reshape(blocks, block)).max(axis=1) / 127, block)[:width]

        def rows_of(part: str) -> np.ndarray:
            copy, scales = inputs[f"c_{part}"], inputs[f"cs_{part}"]
            rows = copy_rows(copy, scales, width).astype(np.float64)
            if len(full):
                rows[full] = full_rows(inputs[f"w_{part}"], None, copy, scales, width)[full]
            return rows

        def dots(part: str) -> tuple[np.ndarray, np.ndarray]:
            rows, bias = rows_of(part), inputs.get(f"b_{part}")
            return rows @ x + (0 if bias is None else bias.astype(np.float64)), np.sqrt(
                (steps * rows) ** 2 @ np.ones(width) / 12
            )

        act = ACTIVATIONS[activation]
        up, up_error = dots("up")
        if inputs.get("c_gate") is None:
            products, errors = act(up), LIPSCHITZ * up_error
        else:
            gate, gate_error = dots("gate")
            products, errors = act(gate) * up, np.hypot(LIPSCHITZ * gate_error * up, act(gate) * up_error)
            errors += LIPSCHITZ * gate_error * up_error  # second order: matters if both factors are near zero
        down = rows_of("down")
        scales = inputs["cs_down"].astype(np.float64)
        coefficients = (np.abs(products) + 6 * errors)[:, None] * np.abs(scales)
        step = np.repeat(coefficients.max(axis=0) / 127, block)[:width]
        integers = down / np.where(scales == 0, 1, scales).repeat(block, axis=1)[:, :width]
        y = np.sqrt((errors[:, None] * down) ** 2 + (step * integers) ** 2 / 12)
        return cls(errors, np.sqrt((y**2).sum(axis=0)))


def check(inputs: Inputs, activation: str, *, rounds: bool, threads: int = 2, **attributes: int) -> None:
    """Run the op and compare both outputs with the reference. ``rounds``: whether its kernels round to 8 bits.

    The neurons that the op chose go to the reference, so that a near-tie has no effect on the comparison of y.
    """
    y, chosen = run_all("SparseMLP", inputs, MIXED_WEIGHTS, threads, activation=activation, layer=3, **attributes)
    count, neurons = int(inputs["count"]), len(inputs["w_up"])
    given = inputs["indices"] is not None
    expected, own = sparse_mlp(**(inputs if given else inputs | {"indices": chosen}), activation=activation)
    np.testing.assert_array_equal(chosen, own)
    rounding = Rounding.of(inputs, activation) if rounds else None
    if not given and 0 < count < neurons:
        check_choice(inputs, activation, chosen[:count], 0 if rounding is None else rounding.products)
    tolerance = 1e-5 * max(1, np.abs(expected).max(initial=0))
    if rounding is not None and is_nested(inputs):
        tolerance = tolerance + 6 * Rounding.of(inputs, activation, chosen[:count]).y
    elif rounding is not None and int(inputs["rest"]) and count < neurons:
        tolerance = tolerance + 6 * rounding.y
    assert (np.abs(y - expected) <= tolerance).all()


def check_choice(inputs: Inputs, activation: str, chosen: np.ndarray, errors: np.ndarray | float) -> None:
    """No neuron that was left out has a score above that of a chosen one by more than the rounding."""
    assert (np.diff(chosen) > 0).all()
    width, x = inputs["x"].shape[-1], inputs["x"].reshape(-1, inputs["x"].shape[-1]).astype(np.float64)

    def dots(part: str) -> np.ndarray:
        bias = inputs.get(f"b_{part}")
        return x @ copy_rows(inputs[f"c_{part}"], inputs[f"cs_{part}"], width).T + (0 if bias is None else bias)

    act = ACTIVATIONS[activation]
    products = act(dots("up")) if inputs.get("c_gate") is None else act(dots("gate")) * dots("up")
    scores = np.abs(products).mean(axis=0) * inputs["down_norms"]
    slack = 6 * errors * inputs["down_norms"] + 1e-5 * scores.max()
    out = np.ones(len(scores), dtype=bool)
    out[chosen] = False
    assert (scores - slack)[out].max() <= (scores + slack)[chosen].min()
