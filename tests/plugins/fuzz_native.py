"""Fuzz target of the native ops: compares random forms, shapes and damaged inputs with the NumPy references.

    python -m tests.plugins.fuzz_native --seconds 60 --seed 1

Valid inputs must give the reference's result. Damaged inputs may give an error or a result, but never a crash.
`make sanitize` runs it on a library built with the address and undefined-behaviour sanitizers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from shadowllm.bundle.quantisation import NESTED, Quantisation
from shadowllm.models.activations import NAMES
from shadowllm.plugins import native_ops
from shadowllm.plugins.reference import copy_rows
from shadowllm.plugins.registry import NATIVE_SCHEMAS, SCHEMAS, reference
from tests.plugins.native_model import ONNX_TYPES, STATES, integers, run_all
from tests.plugins.ops.cached_attention.native_inputs import cached_inputs
from tests.plugins.ops.decoder_layer import native_inputs as layer_op
from tests.plugins.ops.dense_mlp.native_inputs import WEIGHTS as DENSE_MLP_WEIGHTS
from tests.plugins.ops.dense_mlp.native_inputs import dense_mlp_inputs, mlp_in_parts
from tests.plugins.ops.nested_linear.native_inputs import exactly, linear_inputs, whole_rows
from tests.plugins.ops.select_topk.native_inputs import scores_of
from tests.plugins.ops.shortlist_logits.table_inputs import (
    KINDS,
    assert_certified,
    error_scale,
    exact_logits,
    nested_table,
    table_inputs,
    with_counts,
)
from tests.plugins.ops.sparse_attention import mixed_inputs as attention_copy
from tests.plugins.ops.sparse_attention.native_inputs import ATTENTION_FORMS, attention_inputs
from tests.plugins.ops.sparse_mlp.mixed_inputs import COPIES, Rounding, is_nested, with_copy
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_FORMS, mlp_inputs

Inputs = dict[str, np.ndarray | None]
IN_PLACE = ("CachedAttention", "DenseDecoderLayer")
REFUSALS = (STATES.Fail, STATES.InvalidArgument, STATES.RuntimeException)


@dataclass
class Case:
    """One run of an op."""

    op: str
    inputs: Inputs
    weights: tuple[str, ...]
    attributes: dict[str, Any]


def draw(rng: np.random.Generator) -> Case:
    """A valid case of any op."""
    return (mlp, attention, topk, logits, cached, linear, dense, layer, dense_layer)[rng.integers(9)](rng)


def mlp(rng: np.random.Generator) -> Case:
    form = str(rng.choice(list(MLP_FORMS)))
    neurons, batch, seqlen = int(rng.integers(1, 120)), int(rng.integers(0, 4)), int(rng.integers(0, 70))
    hidden, convert = weight_form(rng)
    size = (hidden, neurons, batch, seqlen, int(rng.integers(1, neurons + 1)))
    inputs = convert(mlp_inputs(form, size, int(rng.integers(1 << 30))))
    if inputs.get("s_up") is None and rng.random() < 0.6:
        q = copy_format(rng)
        inputs = with_copy(inputs, rest=int(rng.integers(2)), choosing=rng.random() < 0.5, q=q)
    return Case("SparseMLP", inputs, weights_of(inputs), {"activation": MLP_FORMS[form][0]})


def attention(rng: np.random.Generator) -> Case:
    form = str(rng.choice(list(ATTENTION_FORMS)))
    kv_heads, group, half, batch, seqlen = (int(n) for n in rng.integers(1, [4, 4, 40, 4, 20]))
    capacity, heads = seqlen + int(rng.integers(0, 60)), kv_heads * group
    lengths = tuple(int(n) for n in rng.integers(seqlen, capacity + 1, batch))
    hidden, convert = weight_form(rng)
    size = (hidden, heads, kv_heads, 2 * half, capacity, batch, seqlen, lengths, int(rng.integers(0, heads + 1)))
    inputs = convert(attention_inputs(form, size, int(rng.integers(1 << 30))))
    if inputs.get("s_q") is None and rng.random() < 0.6:
        together = int(rng.choice([n for n in range(1, heads + 1) if heads % n == 0]))
        chosen_inside = inputs["count"] % together == 0 and rng.random() < 0.6
        inputs = attention_copy.with_copy(
            inputs,
            rest=int(rng.integers(2)),
            groups=heads // together if chosen_inside else 0,
            q=copy_format(rng),
        )
    return Case("SparseAttention", inputs, weights_of(inputs), {"n_heads": heads, "window": window(rng)})


def topk(rng: np.random.Generator) -> Case:
    rows, n, cap = (int(n) for n in rng.integers([0, 1, 0], [20, 300, 320]))
    scores = scores_of(str(rng.choice(["normal", "ties", "close", "special"])), rows, n)
    counts = rng.integers(0, min(cap, n) + 1, rows).astype(np.int32)
    return Case("SelectTopK", {"scores": scores, "counts": counts}, (), {"cap": cap})


def logits(rng: np.random.Generator) -> Case:
    rows, tokens, width = (int(n) for n in rng.integers([1, 0, 1], [400, 20, 200]))
    inputs = table_inputs(str(rng.choice(KINDS)), rows, tokens, width, weighted=tokens > 0 and rng.random() < 0.5)
    inputs = with_counts(inputs, int(rng.integers(0, rows + 9)), certify=rng.random() < 0.5)
    if rng.random() < 0.4:
        inputs = nested_table(inputs, rng.choice(np.array(list(NESTED.values()), dtype=object)))[0]
    return Case("ShortlistLogits", inputs, ("table", "copy", "scales", "errors", "weighting"), {})


def cached(rng: np.random.Generator) -> Case:
    kv_heads, group, half, batch, seqlen = (int(n) for n in rng.integers(1, [4, 4, 40, 4, 40]))
    capacity, heads = seqlen + int(rng.integers(0, rng.choice([60, 1200]))), kv_heads * group
    last = tuple(int(n) for n in rng.integers(seqlen - 1, capacity, batch))
    inputs = cached_inputs((heads, kv_heads, 2 * half, capacity, seqlen, last), rng.random() < 0.7)
    return Case("CachedAttention", inputs, (), {"n_heads": heads, "window": window(rng)})


def linear(rng: np.random.Generator) -> Case:
    tokens, width, rows = (int(n) for n in rng.integers([0, 1, 0], [20, 1200, 60]))
    size = (tokens, width, rows, int(rng.choice([32, 64, 64, 64, 96])))
    inputs = linear_inputs(size, rng.random() < 0.5, residual_bits=int(rng.choice([2, 4])))
    return Case("NestedLinear", inputs, ("w", "copy", "scales"), {})


def dense(rng: np.random.Generator) -> Case:
    size = tuple(int(n) for n in rng.integers([0, 1, 1], [20, 300, 1200]))
    gated = bool(rng.random() < 0.7)
    inputs = dense_mlp_inputs(size, gated, rng.random() < 0.5, int(rng.choice([32, 64, 64, 64, 96])))
    return Case("DenseMLP", inputs, DENSE_MLP_WEIGHTS, {"activation": activation(rng), "gated": int(gated)})


def activation(rng: np.random.Generator) -> str:
    return str(rng.choice(sorted(set(NAMES.values()) - {"fatrelu"})))


def layer(rng: np.random.Generator) -> Case:
    size, form = layer_size(rng), str(rng.choice(list(MLP_FORMS)))
    inputs = layer_op.layer_inputs(size, form, rope=rng.random() < 0.7, choosing=rng.random() < 0.5, q=copy_format(rng))
    attributes = {"n_heads": size.heads, "activation": MLP_FORMS[form][0], "window": window(rng)}
    return Case("DecoderLayer", inputs, layer_op.WEIGHTS, attributes)


def dense_layer(rng: np.random.Generator) -> Case:
    size, gated = layer_size(rng), bool(rng.random() < 0.7)
    inputs = layer_op.dense_layer_inputs(size, rope=rng.random() < 0.7, gated=gated, bias=rng.random() < 0.5)
    attributes = {"n_heads": size.heads, "activation": activation(rng), "gated": int(gated), "window": window(rng)}
    return Case("DenseDecoderLayer", inputs, layer_op.DENSE_WEIGHTS, attributes)


def layer_size(rng: np.random.Generator) -> layer_op.Size:
    kv_heads, group, half, batch, seqlen = (int(n) for n in rng.integers(1, [4, 4, 20, 4, 20]))
    hidden, neurons, capacity = (int(n) for n in rng.integers([1, 1, seqlen], [200, 100, seqlen + 60]))
    last = tuple(int(n) for n in rng.integers(seqlen - 1, capacity, batch))
    return layer_op.Size(kv_heads * group, kv_heads, 2 * half, hidden, neurons, seqlen, last, capacity)


def window(rng: np.random.Generator) -> int:
    return int(rng.choice([0, 0, 1, 5, 30, 2**31 - 1]))


def copy_format(rng: np.random.Generator) -> Quantisation:
    """The format of a low-bit copy, or of nested integers that contain one."""
    q = rng.choice(np.array([Quantisation(4, 64), *NESTED.values()], dtype=object))
    return replace(q, block=int(rng.choice([32, 64, 64, 64, 96])))


def weight_form(rng: np.random.Generator) -> tuple[int, Callable[[Inputs], Inputs]]:
    """A hidden size, and a function that stores the weights of such inputs in 4, 2, 1 or half a byte."""
    kind = rng.integers(4)
    if kind < 2:
        q = Quantisation(int(rng.choice([4, 8])), int(rng.choice([32, 64, 96])))
        return q.block * int(rng.integers(1, 5)), lambda inputs: integers(inputs, q)
    dtype = np.dtype(rng.choice(np.array([np.float32, np.float16, ml_dtypes.bfloat16], dtype=object)))

    def convert(inputs: Inputs) -> Inputs:
        return {k: v.astype(dtype) if v is not None and k.startswith(("w_", "b_")) else v for k, v in inputs.items()}

    return int(rng.integers(1, 200)), convert


def weights_of(inputs: Inputs) -> tuple[str, ...]:
    copies = (*COPIES, *attention_copy.COPIES)
    return tuple(name for name in inputs if name.startswith(("w_", "b_", "s_")) or name in copies)


def damage(rng: np.random.Generator, op: str, inputs: Inputs) -> Inputs:
    """Give one input other values or another shape, or remove it."""
    name = str(rng.choice([name for name, value in inputs.items() if value is not None]))
    value = inputs[name]
    assert value is not None
    kind = rng.integers(3)
    if value.dtype == np.int32 and kind < 2:
        spoilt = rng.choice(np.array([-(2**31), -1, 0, 1, 5, 1000, 2**31 - 1], dtype=np.int32), value.shape)
    elif kind < 2:
        spoilt = np.ones(rng.integers(0, 5, int(rng.integers(0, 6))), dtype=value.dtype)
    else:
        required = {port.name for port in (SCHEMAS | NATIVE_SCHEMAS)[op].inputs if not port.optional}
        spoilt = value if name in required else None
    return inputs | {name: spoilt}


def judge(case: Case, found: list[np.ndarray]) -> str | None:
    """Describe the error in the result of a valid case; None if it is right."""
    y, inputs = found[0], case.inputs
    if y.size == 0:
        return None
    if case.op == "ShortlistLogits":
        return judge_logits(inputs, y)
    if case.op == "NestedLinear":
        return judge_linear(inputs, y)
    if case.op == "DenseMLP":
        return judge_parts(y, mlp_in_parts(inputs, **case.attributes, exact_copies=1))
    if case.op.endswith("DecoderLayer"):
        return judge_layer(case, y, *found[3:])
    if case.op.startswith("Sparse") and inputs["indices"] is None:
        inputs = inputs | {"indices": found[1]}  # near-ties may be chosen in another way
    expected = reference(case.op)(**inputs, **case.attributes)
    if case.op == "SelectTopK":
        return None if np.array_equal(y, expected) else "other indices"
    expected = expected[0]
    # Integer rows may be multiplied by inputs of 16 bits.
    tolerance = 1e-4 if any(name.startswith("s_") for name in inputs) else 2e-5
    error, bound = np.abs(y - expected), tolerance * max(1, np.abs(expected).max())
    if case.op == "SparseAttention":
        n_heads, full = case.attributes["n_heads"], found[1][: int(inputs["count"])]
        bound = bound + attention_copy.slack(inputs, n_heads, y, full, case.attributes["window"])
    elif inputs.get("rest") is not None:
        full = inputs["indices"][: int(inputs["count"])] if is_nested(inputs) else ()
        bound = bound + 6 * Rounding.of(inputs, case.attributes["activation"], full).y
    return None if (error <= bound).all() else f"off by {error.max()}"


def judge_logits(inputs: Inputs, found: np.ndarray) -> str | None:
    """Describe logits that are neither exact nor those of the copy, or whose largest is not certified."""
    exact, scale = exact_logits(inputs), error_scale(inputs)
    low = inputs["x"].astype(np.float64) @ copy_rows(inputs["copy"], inputs["scales"], inputs["x"].shape[1]).T
    if (np.minimum(np.abs(found - exact), np.abs(found - low)) > 1e-4 * scale).any():
        return "neither exact nor from the copy"
    try:
        return assert_certified(inputs, found) if inputs["certify"] else None
    except AssertionError:
        return "not the largest logit"


def judge_linear(inputs: Inputs, found: np.ndarray) -> str | None:
    """Describe products that differ by more than rounding the input to 8 bits explains."""
    x, weights = inputs["x"], whole_rows(inputs)
    blocks = weights.shape[1:]
    padded = np.pad(x, ((0, 0), (0, int(np.prod(blocks)) - x.shape[1]))).reshape(len(x), *blocks)
    steps = np.broadcast_to(np.abs(padded).max(axis=2, keepdims=True) / 127, padded.shape).reshape(len(x), -1)
    bound = steps @ np.abs(weights).reshape(len(weights), -1).T + 1e-3
    return None if (np.abs(found - exactly(inputs)) <= bound).all() else "off by more than the rounding"


def judge_layer(case: Case, found: np.ndarray, chosen: np.ndarray | None = None) -> str | None:
    given = {} if case.inputs.get("mlp_indices", chosen) is not None else {"mlp_indices": chosen}
    return judge_parts(found, layer_op.in_parts(case.inputs | given, **case.attributes)[0])


def judge_parts(found: np.ndarray, expected: np.ndarray) -> str | None:
    """Describe a result that is not that of an op's parts."""
    return None if np.linalg.norm(found - expected) <= 1e-3 * np.linalg.norm(expected) else "not what its parts give"


def main() -> int:
    """Fuzz for a while; the exit status says whether anything was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, end = np.random.default_rng(args.seed), time.monotonic() + args.seconds
    runs = refused = found = 0
    while time.monotonic() < end and found < 10:
        os.environ[native_ops.ISA_VARIABLE] = str(rng.choice(native_ops.kernels()))
        case, spoil = draw(rng), rng.random() < 0.4
        inputs = damage(rng, case.op, case.inputs) if spoil else case.inputs
        fed = all(v is None or v.dtype in ONNX_TYPES for v in inputs.values()) and rng.random() < 0.5
        weights = () if fed else case.weights  # 16-bit tensors can only be initializers
        more = {
            "SelectTopK": {},
            "CachedAttention": {},
            "NestedLinear": {},
            "ShortlistLogits": {"exact_copies": 1},
            "DenseMLP": {"exact_copies": 1},
            "DecoderLayer": {"exact_copies": 1, "layer": 1},
            "DenseDecoderLayer": {"exact_copies": 1},
        }.get(case.op, {"layer": 1})
        problem = None
        try:
            outputs = len((SCHEMAS | NATIVE_SCHEMAS)[case.op].outputs)
            if case.op in IN_PLACE and rng.random() < 0.3:  # the cache is written to its inputs
                outputs, inputs = 1, {name: value if value is None else value.copy() for name, value in inputs.items()}
            threads = int(rng.integers(1, 3))
            result = run_all(case.op, inputs, weights, threads, outputs, **case.attributes, **more)
            problem = None if spoil else judge(case, result)
        except REFUSALS as error:
            refused += 1
            problem = None if spoil else f"refused: {error}"
        if problem:
            found += 1
            print(f"run {runs}: {case.op} {case.attributes} {problem}", file=sys.stderr)
        runs += 1
    print(f"{runs} runs, {refused} refused, {found} wrong")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
