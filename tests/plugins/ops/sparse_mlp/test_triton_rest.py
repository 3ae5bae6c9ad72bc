"""Compares the Triton kernels with float64 arithmetic where the other neurons come from a low-bit copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")

from shadowllm.bundle.quantisation import LOW_BIT_COPY, quantise
from shadowllm.models.decoder import ACTIVATIONS
from shadowllm.plugins.ops.sparse_mlp import reference
from shadowllm.plugins.ops.sparse_mlp.launcher import sparse_mlp
from shadowllm.plugins.reference import copy_rows
from tests.plugins.ops.sparse_mlp.test_triton import mlp_inputs
from tests.plugins.triton_ops import DTYPES, MLP_FORMS, assert_as_exact_as, on_device

pytestmark = pytest.mark.slow

SIZES = [  # D, F, B, S, count
    (41, 7, 1, 1, 3),
    (576, 88, 1, 1, 45),
    (123, 88, 1, 1, 0),
    (300, 260, 1, 1, 131),
    (64, 33, 1, 1, 33),
    (123, 88, 3, 1, 41),
    (41, 123, 17, 1, 20),
    (130, 88, 2, 3, 1),
    (123, 130, 1, 70, 33),
    (64, 33, 2, 5, 33),
]

# Whether a rest is added, whether the op chooses, and the type. (Without rest and choice, no copy is read, which has a
# test of its own.)
CALLS = {name: (1, True, dtype) for name, dtype in DTYPES.items()}
CALLS |= {"indices given": (1, False, torch.float32), "rest dropped": (0, True, torch.float32)}


def low_bit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """A low-bit copy of rows, and its scales."""
    data, scales = quantise(rows.float().numpy(), LOW_BIT_COPY)
    return torch.from_numpy(data).unflatten(1, (LOW_BIT_COPY.blocks(rows.shape[1]), -1)), torch.from_numpy(scales)


def rest_inputs(form: str, size: tuple[int, ...], dtype: torch.dtype, rest: int) -> dict[str, Tensor | None]:
    inputs = mlp_inputs(form, size, dtype) | {"rest": torch.tensor(rest).int()}
    for part in ("gate", "up", "down"):
        weight = inputs[f"w_{part}"]
        inputs[f"c_{part}"], inputs[f"cs_{part}"] = (None, None) if weight is None else low_bit(weight)
    return inputs | {"down_norms": inputs["w_down"].float().norm(dim=1)}


def mixed_mlp(inputs: dict[str, Tensor | None], chosen: Tensor, activation: str, dtype: torch.dtype) -> Tensor:
    """The op in plain PyTorch, in a given type."""
    x, act = inputs["x"].to(dtype), ACTIVATIONS[activation]
    full = torch.isin(torch.arange(len(inputs["w_up"])), chosen)[:, None]
    full_rows = full[:, 0].nonzero()[:, 0]
    kept = torch.arange(len(full)) if int(inputs["rest"]) else full_rows

    def matrix(part: str) -> Tensor | None:
        if inputs[f"w_{part}"] is None:
            return None
        copied = copy_rows(inputs[f"c_{part}"].numpy(), inputs[f"cs_{part}"].numpy(), x.shape[-1])
        rows = torch.where(full, inputs[f"w_{part}"].double(), torch.from_numpy(copied).double())
        return rows[kept].to(dtype)

    def project(part: str) -> Tensor:
        bias = inputs[f"b_{part}"]
        return F.linear(x, matrix(part), None if bias is None else bias[kept].to(dtype))

    hidden = act(project("up")) if inputs["w_gate"] is None else act(project("gate")) * project("up")
    y = hidden @ matrix("down")
    return y if inputs["b_down"] is None else y + inputs["b_down"].to(dtype)


def best(inputs: dict[str, Tensor | None], activation: str) -> list[int]:
    """The neurons that the reference chooses."""
    numbers = {
        name: None if t is None else t.float().numpy() if t.is_floating_point() else t.numpy()
        for name, t in inputs.items()
    }
    return reference.sparse_mlp(**numbers, activation=activation)[1].tolist()


# Every call with every size, in the two forms by turns: every form meets every call and every size.
CASES = [
    pytest.param(form, size, *call, id=f"{name}-{form}-{size}")
    for number, (name, call) in enumerate(CALLS.items())
    for place, size in enumerate(SIZES)
    for form in (("llama-biases", "opt")[(number + place) % 2],)
]


@pytest.mark.parametrize(("form", "size", "rest", "inside", "dtype"), CASES)
def test_mlp_with_a_rest(form, size, rest, inside, dtype):
    activation = MLP_FORMS[form][0]
    inputs = rest_inputs(form, size, dtype, rest)
    if inside:
        inputs["indices"] = None
    found, chosen = sparse_mlp(**on_device(inputs), activation=activation)
    assert (chosen is not None) == inside
    if chosen is not None:
        assert chosen.tolist() == best(inputs, activation)
    rows = inputs["indices"] if chosen is None else chosen.cpu()
    exact = mixed_mlp(inputs, rows, activation, torch.float64)
    assert_as_exact_as(found, mixed_mlp(inputs, rows, activation, dtype), exact)


@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (1, 20)])
@pytest.mark.parametrize(("count", "rest"), [(88, 1), (95, 1), (20, 0)])
def test_no_copy_is_read_where_it_adds_nothing(tokens, count, rest):
    """If all neurons are active, none of it; if the rest is dropped, none of down."""
    inputs = rest_inputs("llama", (130, 88, *tokens, 88), torch.float32, rest)
    inputs |= {"indices": None, "count": torch.tensor(count).int()}
    clean, chosen = sparse_mlp(**on_device(inputs), activation="silu")
    for part in ("gate", "up", "down") if rest else ("down",):
        inputs[f"cs_{part}"] = torch.full_like(inputs[f"cs_{part}"], torch.nan)
    again, others = sparse_mlp(**on_device(inputs), activation="silu")
    assert torch.equal(clean, again)
    assert torch.equal(chosen, others)


@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (1, 20)])
def test_given_neurons_need_no_copy_if_the_rest_is_dropped(tokens):
    inputs = rest_inputs("llama", (130, 88, *tokens, 20), torch.float32, 0)
    inputs |= {f"cs_{part}": torch.full_like(inputs[f"cs_{part}"], torch.nan) for part in ("gate", "up", "down")}
    found, _ = sparse_mlp(**on_device(inputs), activation="silu")
    plain = {name: t for name, t in inputs.items() if name[:2] not in ("c_", "cs") and name != "rest"}
    assert torch.equal(found, sparse_mlp(**on_device(plain), activation="silu")[0])


@pytest.mark.parametrize("tokens", [(1, 1), (3, 1), (1, 20)])
def test_short_indices_may_be_given(tokens):
    """Their capacity may be below the number of neurons; an index out of range is skipped."""
    inputs = rest_inputs("opt", (41, 88, *tokens, 3), torch.float32, 1)
    inputs["indices"] = torch.tensor([4, 88, -7, 9, -1]).int()
    inputs["count"] = torch.tensor(4).int()
    found, _ = sparse_mlp(**on_device(inputs), activation="relu")
    rows = torch.tensor([4, 9])
    exact = mixed_mlp(inputs, rows, "relu", torch.float64)
    assert_as_exact_as(found, mixed_mlp(inputs, rows, "relu", torch.float32), exact)


def test_a_nan_is_not_hidden():
    inputs = rest_inputs("llama", (41, 7, 1, 1, 3), torch.float32, 1) | {"indices": None}
    inputs["x"][0, 0, 3] = float("nan")
    assert sparse_mlp(**on_device(inputs), activation="silu")[0].isnan().all()


def test_results_do_not_depend_on_the_run():
    inputs = on_device(rest_inputs("llama", (300, 260, 1, 1, 131), torch.float16, 1) | {"indices": None})
    (first, one), (second, other) = (sparse_mlp(**inputs, activation="silu") for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rest": None}, "no rest"),
        ({"c_up": None, "cs_up": None}, "no c_up, cs_up"),
        ({"c_gate": None}, "no c_gate"),
        ({"rest": torch.tensor(1)}, "rest is torch.int64"),
        ({"c_down": torch.zeros(88, 3, 32, dtype=torch.uint8)}, "c_down has shape"),
        ({"c_up": torch.zeros(88, 1, 24, dtype=torch.uint8)}, "c_up has shape"),
        ({"cs_up": torch.zeros(87, 1)}, "cs_up has shape"),
        ({"indices": None, "down_norms": None}, "needs indices"),
        ({"w_gate": None, "b_gate": None}, "no w_gate"),
    ],
    ids=str,
)
def test_what_is_refused(wrong, message):
    inputs = rest_inputs("llama", (41, 88, 1, 1, 3), torch.float32, 1) | wrong
    with pytest.raises(ValueError, match=message):
        sparse_mlp(**on_device(inputs), activation="silu")
