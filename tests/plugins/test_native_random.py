"""The native ops with random shapes and damaged inputs."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.plugins.registry import reference
from tests.plugins.native_model import STATES, built, run
from tests.plugins.ops.sparse_attention.native_inputs import ATTENTION_WEIGHTS, attention_inputs
from tests.plugins.ops.sparse_mlp.native_inputs import MLP_WEIGHTS, mlp_inputs

pytestmark = built


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes_and_damage(seed, isa):
    """Valid inputs give the reference's result. Damaged inputs give an error or a result, never a crash."""
    rng = np.random.default_rng(seed)
    kv_heads, group, head_dim, batch, seqlen = (int(n) for n in rng.integers(1, [4, 4, 40, 4, 20]))
    neurons, hidden, capacity = int(rng.integers(1, 120)), int(rng.integers(1, 200)), seqlen + int(rng.integers(0, 60))
    heads = kv_heads * group
    mlp = mlp_inputs("llama-biases", (hidden, neurons, batch, seqlen, int(rng.integers(1, neurons + 1))), seed)
    attention = attention_inputs(
        "llama",
        (
            hidden,
            heads,
            kv_heads,
            2 * head_dim,
            capacity,
            batch,
            seqlen,
            rng.integers(seqlen, capacity + 1, batch),
            int(rng.integers(0, heads + 1)),
        ),
    )
    for op, inputs, weights, attributes, sound in (
        ("SparseMLP", mlp, MLP_WEIGHTS, {"activation": "silu"}, reference("SparseMLP")),
        ("SparseAttention", attention, ATTENTION_WEIGHTS, {"n_heads": heads}, reference("SparseAttention")),
    ):
        exact = sound(**inputs, **attributes)[0]
        found = run(op, inputs, weights, threads=2, layer=1, **attributes)
        np.testing.assert_allclose(found, exact, rtol=0, atol=1e-5 * max(1, np.abs(exact).max()))
        victim = rng.choice([name for name, value in inputs.items() if value is not None])
        damaged = inputs | {victim: damage(rng, inputs[victim])}
        try:
            run(op, damaged, weights, layer=1, **attributes)
        except (STATES.InvalidArgument, STATES.RuntimeException) as error:  # of a run, of the session's creation
            assert f"{op} layer 1: " in str(error)  # noqa: PT017 - harmless damage raises no error


def damage(rng: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Integers out of range, or floats of another shape."""
    if array.dtype == np.int32:
        return rng.choice(np.array([-(2**31), -1, 0, 1, 5, 1000, 2**31 - 1], dtype=np.int32), array.shape)
    return np.ones(rng.integers(0, 4, int(rng.integers(0, 6))), dtype=np.float32)
