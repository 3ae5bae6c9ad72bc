"""Inputs of a ``SparseAttention`` with a low-bit copy, and the error that rounding to 8 bits may cause."""

from __future__ import annotations

import math

import numpy as np

from shadowllm.bundle.quantisation import LOW_BIT_COPY, Quantisation, quantise, quantise_nested
from shadowllm.plugins.ops.sparse_attention.reference import rotate, sparse_attention
from shadowllm.plugins.reference import copy_rows, full_rows
from tests.plugins.native_model import run_all, scalar
from tests.plugins.ops.sparse_attention.native_inputs import ATTENTION_WEIGHTS, attention_inputs

Inputs = dict[str, np.ndarray | None]
COPIES = ("c_q", "c_o", "cs_q", "cs_o")
MIXED_WEIGHTS = (*ATTENTION_WEIGHTS, *COPIES, "score_weight", "score_bias", "rest")


def with_copy(
    inputs: Inputs, *, rest: int = 1, groups: int = 0, seed: int = 0, q: Quantisation = LOW_BIT_COPY
) -> Inputs:
    """The same inputs with a low-bit copy; without indices if there are groups to choose from.

    With a nested ``q``, the copy is in the weights.
    """
    found, rng, hidden = inputs | {"rest": scalar(rest)}, np.random.default_rng(seed), inputs["x"].shape[-1]
    for part in ("q", "o"):
        weight = inputs[f"w_{part}"].astype(np.float32)
        if q.residual_bits:
            data, scales, found[f"w_{part}"] = quantise_nested(weight, q)
        else:
            data, scales = quantise(weight, q)
        found[f"c_{part}"], found[f"cs_{part}"] = data.reshape(*scales.shape, -1), scales
    if groups:
        weight, bias = rng.standard_normal((groups, hidden)), rng.standard_normal(groups)
        found |= {
            "indices": None,
            "score_weight": weight.astype(np.float32),
            "score_bias": bias.astype(np.float32),
        }
    return found


def mixed_inputs(
    form: str, size: tuple, *, rest: int = 1, groups: int = 0, seed: int = 0, q: Quantisation = LOW_BIT_COPY
) -> Inputs:
    return with_copy(attention_inputs(form, size, seed), rest=rest, groups=groups, seed=seed + 1, q=q)


def is_nested(inputs: Inputs) -> bool:
    return inputs["w_q"].dtype == np.uint8 and inputs.get("s_q") is None


def rounding(inputs: Inputs, n_heads: int, full: np.ndarray) -> np.ndarray:
    """Standard deviations ``(D,)`` of the errors of y from rounding to 8 bits, for one token; first order in the step.

    An element of x is rounded to a step of max / 127 of its block, which has a standard deviation of step / sqrt(12).
    So has a coefficient of the output projection, whose step follows from the largest of its group of rows and block;
    here, the largest of all rows.
    """
    x = inputs["x"].reshape(-1).astype(np.float64)
    width, d, block = x.size, inputs["key"].shape[3], 2 * inputs["c_q"].shape[2]
    wide = np.zeros(inputs["c_q"].shape[1] * block)
    wide[:width] = x
    steps = np.repeat(np.abs(wide.reshape(-1, block)).max(axis=1) / 127, block)[:width] / math.sqrt(12)
    nested, is_rest = is_nested(inputs), bool(inputs["rest"])

    def rows_of(part: str) -> np.ndarray:
        copy, scales = inputs[f"c_{part}"], inputs[f"cs_{part}"]
        rows = copy_rows(copy, scales, width).astype(np.float64)
        whole = [head * d + i for head in full for i in range(d)]
        if nested and whole:  # full rows are rounded too, because the copy is a part of them
            rows[whole] = full_rows(inputs[f"w_{part}"], None, copy, scales, width)[whole]
        return rows

    q, o = rows_of("q"), rows_of("o")
    of_y, variance = np.zeros((width, width)), np.zeros(width)  # errors of y by those of x; other errors
    rest = [head for head in range(n_heads) if (nested if head in full else is_rest)]
    scales, coefficients = np.abs(inputs["cs_o"].astype(np.float64)), []
    for head in rest:
        rows = slice(head * d, (head + 1) * d)
        context, of_context = attended(inputs, head, n_heads, q[rows], x, steps)
        of_y += o[rows].T @ of_context
        error = np.sqrt((of_context**2).sum(axis=1))
        coefficients.append((np.abs(context) + 6 * error)[:, None] * scales[rows])
    if rest:
        step = np.repeat(np.concatenate(coefficients).max(axis=0) / 127, block)[:width]
        integers = o / np.where(scales == 0, 1, scales).repeat(block, axis=1)[:, :width]
        for head in rest:
            variance += ((step * integers[head * d : (head + 1) * d]) ** 2).sum(axis=0) / 12
    return np.sqrt((of_y**2).sum(axis=1) + variance)


def attended(
    inputs: Inputs, head: int, n_heads: int, q: np.ndarray, x: np.ndarray, steps: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The context ``(d,)`` of one token and head, and its changes ``(d, D)`` for a change of x by ``steps``."""
    d, group, seen = inputs["key"].shape[3], n_heads // inputs["key"].shape[1], int(inputs["lengths"][0])
    bias = inputs.get("b_q")
    query = q @ x + (0 if bias is None else bias[head * d : (head + 1) * d].astype(np.float64))
    both = np.column_stack((query, q * steps)).T
    if inputs.get("cos") is not None:
        both = rotate(both, inputs["cos"][0, 0].astype(np.float64), inputs["sin"][0, 0].astype(np.float64))
    keys, values = (inputs[name][0, head // group, :seen].astype(np.float64) for name in ("key", "value"))
    scores = both @ keys.T / math.sqrt(d)
    weights = np.exp(scores[0] - scores[0].max())
    weights /= weights.sum()
    of_weights = weights * (scores[1:] - (scores[1:] @ weights)[:, None])
    return weights @ values, (of_weights @ values).T


def check(inputs: Inputs, n_heads: int, *, rounds: bool, threads: int = 2, **attributes: int) -> None:
    """Run the op and compare both outputs with the reference. ``rounds``: whether its kernels round to 8 bits.

    The heads that the op chose go to the reference, so that a near-tie has no effect on the comparison of y.
    """
    y, chosen = run_all("SparseAttention", inputs, MIXED_WEIGHTS, threads, n_heads=n_heads, layer=3, **attributes)
    count, given = int(inputs["count"]), inputs["indices"] is not None
    expected, own = sparse_attention(**(inputs if given else inputs | {"indices": chosen}), n_heads=n_heads)
    np.testing.assert_array_equal(chosen, own)
    bound = 1e-5 * max(1, np.abs(expected).max(initial=0))
    bound = bound + slack(inputs, n_heads, y, chosen[:count]) if rounds else bound
    assert (np.abs(y - expected) <= bound).all()
    if not given and 0 < count < n_heads:
        check_choice(inputs, n_heads, chosen[:count])


def slack(inputs: Inputs, n_heads: int, y: np.ndarray, full: np.ndarray, window: int = 0) -> np.ndarray | float:
    """Six standard deviations of the error of y from rounding to 8 bits; 0 if nothing is rounded."""
    unused = inputs.get("rest") is None or not (is_nested(inputs) or int(inputs["rest"]))
    if unused or y.size == 0:
        return 0
    batch, seqlen = inputs["x"].shape[:2]
    each = [rounding(only(inputs, b, s, window), n_heads, full) for b in range(batch) for s in range(seqlen)]
    return 6 * np.reshape(each, y.shape)


def only(inputs: Inputs, b: int, s: int, window: int) -> Inputs:
    """The inputs for one token, with a cache of the positions that it sees."""
    end = int(inputs["lengths"][b]) - inputs["x"].shape[1] + s + 1
    seen = slice(max(0, end - window) if window else 0, end)
    one = {name: inputs[name][b : b + 1, :, seen] for name in ("key", "value")}
    one |= {name: inputs[name][b : b + 1, s : s + 1] for name in ("x", "cos", "sin") if inputs.get(name) is not None}
    return inputs | one | {"lengths": np.array([seen.stop - seen.start])}


def check_choice(inputs: Inputs, n_heads: int, chosen: np.ndarray) -> None:
    """Whole groups in ascending order, and none that was left out has a larger score."""
    assert (np.diff(chosen) > 0).all()
    x, weight = inputs["x"].astype(np.float64), inputs["score_weight"]
    scores = (x.reshape(-1, x.shape[-1]) @ weight.T + inputs["score_bias"]).mean(axis=0)
    together = n_heads // len(weight)
    groups = chosen[::together] // together
    np.testing.assert_array_equal(chosen, (groups[:, None] * together + np.arange(together)).reshape(-1))
    out = np.delete(scores, groups)
    assert out.max() <= scores[groups].min() + 1e-5 * np.abs(scores).max()
