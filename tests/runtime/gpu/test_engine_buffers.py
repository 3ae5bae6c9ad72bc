"""Buffers and bindings of an engine session, computed from sizes and names."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from shadowllm.benchmarks.random_model import shape_spec
from shadowllm.models.sparsity import SparseLayers
from shadowllm.runtime.gpu.engine_buffers import (
    Limits,
    buffer_of,
    buffers,
    constants,
    layout,
    memory_of,
    shape_of,
)

SPEC = replace(shape_spec("tiny-llama"), n_layers=3)
LIMITS = Limits(batch=4, seqlen=8, capacity=24)


def test_layout_keeps_buffers_apart_and_aligned():
    found = buffers(SparseLayers(SPEC, 1), "float16", 2, LIMITS)
    offsets, size = layout(found)
    spans = sorted((offsets[name], offsets[name] + buffer.nbytes) for name, buffer in found.items())
    assert all(start % 256 == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= size
    assert found["cache.2.value"].nbytes == 2 * 2 * 24 * 8 * 2


def test_shapes_follow_the_phase():
    found = buffers(SparseLayers(SPEC, 1), "float16", 2, LIMITS)
    assert shape_of(found[buffer_of("input_ids", "prefill")], 5) == (2, 5)
    assert shape_of(found[buffer_of("input_ids", "decode")], 1) == (2, 1)
    assert shape_of(found[buffer_of("hidden", "prefill")], 5) == (2, 5, 32)
    assert shape_of(found[buffer_of("logits_to_keep", "prefill")], 5) == (2, 1)
    assert shape_of(found[buffer_of("past_key_values.1.key", "prefill")], 5) == (2, 2, 24, 8)
    assert shape_of(found[buffer_of("neuron_indices", "decode")], 1) == (2, 48)
    assert [buffer_of("shortlist", phase) for phase in ("prefill", "decode")] == ["all_shortlist", "shortlist"]
    assert shape_of(found["all_shortlist"], 5) == ()


def test_a_dense_session_has_no_selection():
    found = buffers(SparseLayers(SPEC, SPEC.n_layers), "float16", 1, LIMITS)
    assert "hidden" not in found
    assert constants(found) == {}
    assert not any("head" in name or "neuron" in name for name in found)


def test_a_prefill_selects_everything():
    contents = constants(buffers(SparseLayers(SPEC, 1), "float16", 1, LIMITS))
    np.testing.assert_array_equal(contents["all_head_indices"], [[0, 1, 2, 3]] * 2)
    np.testing.assert_array_equal(contents["all_neuron_counts"], [48, 48])
    assert contents["all_shortlist"] == SPEC.vocab_size
    assert all(array.dtype == np.int32 for array in contents.values())


def test_memory_adds_up():
    found = buffers(SparseLayers(SPEC, 1), "bfloat16", 1, LIMITS)
    memory = memory_of([], found, workspace=1000)
    assert memory.cache == 3 * 2 * (2 * 24 * 8) * 2
    assert memory.cache + memory.activations == sum(buffer.nbytes for buffer in found.values())
    assert "workspace 0.0 MB" in str(memory)
