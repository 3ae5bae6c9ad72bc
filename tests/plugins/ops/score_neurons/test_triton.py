"""Compares the Triton kernel with the NumPy reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from shadowllm.bundle.quantisation import Quantisation, quantise
from shadowllm.plugins.ops.score_neurons import reference
from shadowllm.plugins.ops.score_neurons.launcher import score_neurons
from shadowllm.plugins.ops.select_topk.launcher import select_topk
from tests.plugins.triton_ops import DEVICE, MLP_FORMS, on_device, with_types

pytestmark = pytest.mark.slow

COPY = Quantisation(bits=4, block=64)
COPY_SIZES = [  # D, F, B, S
    (41, 7, 1, 1),
    (576, 88, 1, 1),
    (300, 33, 3, 1),
    (130, 20, 17, 1),
    (130, 40, 2, 37),
    (64, 33, 1, 70),
]


def copy_inputs(form: str, size: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor | None]:
    width, neurons, batch, seqlen = size
    _, gated, biases = MLP_FORMS[form]
    generator, rows = torch.Generator().manual_seed(width), (1 + gated) * neurons
    data, scales = quantise((torch.randn(rows, width, generator=generator) / width**0.5).numpy(), COPY)
    return {
        "x": torch.randn(batch, seqlen, width, generator=generator).to(dtype),
        "copy": torch.from_numpy(data).unflatten(1, (COPY.blocks(width), -1)),
        "scales": torch.from_numpy(scales),
        "b_gate": torch.randn(neurons, generator=generator).to(dtype) if biases and gated else None,
        "b_up": torch.randn(neurons, generator=generator).to(dtype) if biases else None,
        "down_norms": torch.rand(neurons, generator=generator),
        "count": torch.tensor(neurons // 2).int(),
    }


@pytest.mark.parametrize(("form", "size", "dtype"), with_types(MLP_FORMS, COPY_SIZES))
def test_score_neurons(form, size, dtype):
    """The copy is exact in any type and sums are in float32, as in the reference with the same x."""
    activation = MLP_FORMS[form][0]
    inputs = copy_inputs(form, size, dtype)
    found = score_neurons(**on_device(inputs), activation=activation)
    numbers = {
        n: None if t is None else t.float().numpy() if t.is_floating_point() else t.numpy() for n, t in inputs.items()
    }
    del numbers["count"]
    wanted = reference.score_neurons(**numbers, activation=activation)
    np.testing.assert_allclose(found.cpu().numpy(), wanted, rtol=1e-5, atol=1e-5 * wanted.max())


@pytest.mark.parametrize("tokens", [(1, 1), (1, 20)])
def test_nothing_is_scored_where_all_are_kept(tokens):
    inputs = copy_inputs("llama", (130, 20, *tokens), torch.float32)
    inputs["copy"][:], inputs["scales"][:], inputs["count"] = 255, torch.nan, torch.tensor(20).int()
    scores = score_neurons(**on_device(inputs), activation="silu")
    assert select_topk(scores, inputs["count"].view(1).to(DEVICE), 20).tolist() == [list(range(20))]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"activation": "tanh"}, "no activation 'tanh'"),
        ({"down_norms": torch.ones(21)}, "for 21 neurons"),
        ({"x": torch.ones(1, 1, 193)}, "for x"),
        ({"x": torch.ones(1, 1, 128)}, "for x"),
        ({"copy": torch.zeros(40, 3, 24, dtype=torch.uint8)}, "for 20 neurons"),
        ({"copy": torch.zeros(40, 3, 32, dtype=torch.int8)}, "copy is torch.int8"),
        ({"scales": torch.ones(40, 2)}, "scales has shape"),
    ],
    ids=str,
)
def test_what_no_scores_come_of(wrong, match):
    inputs = copy_inputs("llama", (130, 20, 1, 1), torch.float32) | {"activation": "silu"} | wrong
    with pytest.raises(ValueError, match=match):
        score_neurons(**{name: t.to(DEVICE) if isinstance(t, Tensor) else t for name, t in inputs.items()})
