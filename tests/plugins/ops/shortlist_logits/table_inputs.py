"""Inputs of ``ShortlistLogits``: random tables, and tables on which a largest logit is hard to prove."""

from __future__ import annotations

from typing import Any

import numpy as np

from shadowllm.bundle.certificate import best_weighting, copy_errors
from shadowllm.bundle.quantisation import LOW_BIT_COPY, Quantisation, quantise, quantise_nested
from shadowllm.plugins.reference import copy_rows, full_rows

SIZES = [(1, 1, 41), (7, 1, 64), (513, 3, 123), (5000, 1, 576), (88, 3, 41)]  # V, R, D
SHORTLISTS = (0, 1, 5, 87, 10**6)
KINDS = ("normal", "alike", "zero", "huge", "outlier", "tiny")


def table_inputs(kind: str, rows: int, tokens: int, width: int, weighted: bool = False) -> dict[str, Any]:
    """The inputs but shortlist and certify; ``kind`` is one of `KINDS`."""
    rng = np.random.default_rng(rows + width)
    table = (rng.standard_normal((rows, width)) / width**0.5).astype(np.float32)
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    if kind == "alike":  # rows differ by less than a step of the copy
        table = table[:1] + np.float32(1e-3) * table
    elif kind == "zero":
        x[:] = 0
    elif kind == "huge":
        x *= np.float32(1e12)
        table *= rng.choice([np.float32(1), np.float32(1e6)], (rows, 1))
    elif kind == "outlier":  # as in real models: a few dimensions of x are far larger than the others
        x[:, ::37] *= 300
    elif kind == "tiny":  # the squares of x are below the range of float32
        x *= np.float32(1e-24)
    data, scales = quantise(table, LOW_BIT_COPY)
    copy = data.reshape(rows, LOW_BIT_COPY.blocks(width), -1)
    distance = ((table - copy_rows(copy, scales, width)).astype(np.float64) ** 2).mean(axis=0)
    weighting = best_weighting((x.astype(np.float64) ** 2).mean(axis=0), distance) if weighted else None
    return {
        "x": x,
        "table": table,
        "copy": copy,
        "scales": scales,
        "errors": copy_errors(table, copy, scales, weighting),
        "weighting": weighting,
    }


def nested_table(inputs: dict[str, Any], q: Quantisation) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same inputs with a table of nested integers, and with the values of this table as floats."""
    copy, scales, residual = quantise_nested(inputs["table"], q)
    parts = {"copy": copy.reshape(*scales.shape, -1), "scales": scales}
    rows = full_rows(residual, None, parts["copy"], scales, inputs["table"].shape[1])
    parts["errors"] = copy_errors(rows, copy, scales, inputs["weighting"])
    return inputs | parts | {"table": residual}, inputs | parts | {"table": rows}


def with_counts(inputs: dict[str, Any], shortlist: int, *, certify: bool) -> dict[str, Any]:
    return inputs | {"shortlist": np.array(shortlist, np.int32), "certify": np.array(certify, np.int32)}


def exact_logits(inputs: dict[str, Any]) -> np.ndarray:
    """In float64."""
    return inputs["x"].astype(np.float64) @ _rows(inputs).T


def _rows(inputs: dict[str, Any]) -> np.ndarray:
    rows = full_rows(
        inputs["table"], inputs.get("table_scales"), inputs["copy"], inputs["scales"], inputs["x"].shape[1]
    )
    return rows.astype(np.float64)


def error_scale(inputs: dict[str, Any]) -> np.ndarray:
    """The size of the products of each row of x, ``(R, 1)``: rounding errors are a small part of it."""
    rows = np.linalg.norm(_rows(inputs), axis=1).max()
    return np.linalg.norm(inputs["x"].astype(np.float64), axis=1)[:, None] * rows


def assert_certified(inputs: dict[str, Any], logits: np.ndarray) -> None:
    """The largest logit is that of the whole table; of two that are equal up to rounding, it may be either."""
    exact = exact_logits(inputs)
    found = np.take_along_axis(exact, logits.argmax(axis=1)[:, None], axis=1)
    assert (found >= exact.max(axis=1, keepdims=True) - 1e-6 * error_scale(inputs)).all()
