"""Fused attention has the same outputs as the standard nodes, under the same names."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes import PreconditionError

from shadowllm.bundle.manifest import read_manifest
from shadowllm.plugins import native_ops
from shadowllm.runtime.ort.fuse_attention import FuseAttention
from tests.plugins.native_model import built

CAPACITY = 20


def load(folder, fuse, native=False):
    model = ir.load(folder / "dense.onnx")
    if fuse:
        FuseAttention(read_manifest(folder).spec, native)(model)
    return model


def run(folder, model, steps):
    """Run steps of ``(input_ids, positions)`` over one cache; every output of each step."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # it warns of caches that are not bound in place
    native_ops.register(options)
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    spec = read_manifest(folder).spec
    empty = np.zeros((2, spec.n_kv_heads, CAPACITY, spec.head_dim), dtype=np.float32)
    cache = {f"{layer}.{part}": empty.copy() for layer in range(spec.n_layers) for part in ("key", "value")}
    names, found = [value.name for value in session.get_outputs()], []
    for ids, positions in steps:
        feeds = {
            "input_ids": np.array(ids),
            "position_ids": np.array(positions),
            "logits_to_keep": np.full((2, 1), len(ids[0]) - 1),
        }
        outputs = session.run(None, feeds | {f"past_key_values.{name}": array for name, array in cache.items()})
        found.append(dict(zip(names, outputs, strict=True)))
        cache = {name: found[-1][f"present.{name}"] for name in cache}
    return found


SIZES_OF_16 = ("llama-head-dim-16", "opt-head-dim-16", "qwen3", "smollm3")


@pytest.mark.parametrize(
    ("variant", "op"),
    [(variant, "GroupQueryAttention") for variant in SIZES_OF_16]
    + [
        pytest.param(variant, "CachedAttention", marks=built)
        for variant in (*SIZES_OF_16, "llama-head-dim", "opt", "phi3")
    ],
)
def test_the_fused_graph_equals_the_standard_one(bundle, variant, op):
    folder = bundle(variant)
    standard, fused = load(folder, False), load(folder, True, native=op == "CachedAttention")
    kinds = [node.op_type for node in fused.graph]
    assert kinds.count(op) == read_manifest(folder).spec.n_layers
    assert not {"Attention", "TensorScatter", "RotaryEmbedding"} & set(kinds)
    # A prompt, a step at the same position, then one where the second sequence has fallen behind. Only the native op
    # takes several tokens after different pasts.
    steps = [([[5, 17, 42], [8, 61, 3]], [[0, 1, 2]] * 2), ([[7], [9]], [[3], [3]]), ([[11], [12]], [[4], [2]])]
    if op == "CachedAttention":
        steps.append(([[3, 4], [5, 6]], [[5, 6], [3, 4]]))
    expected, found = run(folder, standard, steps), run(folder, fused, steps)
    for (_, positions), ours, theirs in zip(steps, found, expected, strict=True):
        assert list(ours) == list(theirs)
        for name, array in theirs.items():
            for row, visible in enumerate(np.max(positions, axis=1) + 1):
                # Cache entries after the end of a sequence are not used.
                there = np.s_[row] if name == "logits" else np.s_[row, :, :visible]
                assert np.abs(ours[name][there] - array[there]).max() < 1e-5 * np.abs(array[there]).max(), name


@pytest.mark.parametrize("op", ["GroupQueryAttention", pytest.param("CachedAttention", marks=built)])
@pytest.mark.parametrize("variant", ["mistral", "gemma3"])
def test_windows(bundle, variant, op):
    """The prompt, and the past of each step, are as long as the window, one token shorter or longer, and far longer."""
    folder = bundle(variant)
    window = read_manifest(folder).spec.window
    standard, fused = load(folder, False), load(folder, True, native=op == "CachedAttention")
    for length in (window - 1, window, window + 1, 2 * window + 1):
        prompt = (np.arange(2 * length).reshape(2, length) % 97, np.tile(np.arange(length), (2, 1)))
        steps = [prompt, ([[7], [9]], [[length], [length]]), ([[11], [12]], [[length + 1], [2]])]
        if op == "CachedAttention":
            steps.append((np.array([[3, 4], [5, 6]]), np.array([[length, length + 1], [3, 4]])))
        for ours, theirs in zip(run(folder, fused, steps), run(folder, standard, steps), strict=True):
            assert np.abs(ours["logits"] - theirs["logits"]).max() < 1e-5 * np.abs(theirs["logits"]).max(), length


@pytest.mark.parametrize("variant", ["llama-head-dim", "opt"])
def test_a_head_size_that_the_op_does_not_take_is_left_alone(bundle, variant):
    folder = bundle(variant)
    assert [n.op_type for n in load(folder, True).graph] == [n.op_type for n in load(folder, False).graph]


def test_a_foreign_graph_is_refused(bundle):
    folder = bundle("opt-head-dim-16")
    model = load(folder, False)
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.replace_input_with(1, model.graph.inputs[-1])
    with pytest.raises(PreconditionError, match="TensorScatter"):
        FuseAttention(read_manifest(folder).spec)(model)
