"""Bundles with the selector relu: dense logits, fewer rows, and the share of neurons that fired."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from shadowllm.bundle.cost_model import Itemsizes, fired_shares, step_traffic
from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.sparse_pays import dense_reasons, sparse_pays
from shadowllm.bundle.weights import read_weights
from shadowllm.cli import main
from shadowllm.errors import UserError
from shadowllm.evaluation.speed.traffic import traffic_of
from shadowllm.evaluation.speed.worker import StepTimer
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget, SparseLayers
from shadowllm.predictor.silence import fired_shares as measured_shares
from shadowllm.runtime import open_session
from shadowllm.runtime.generation.text import load_tokenizer
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.torch_session import TorchSession
from tests.bundles import make_bundle
from tests.tiny import token_windows

PROMPT, FORCED = [5, 17, 42, 8, 61], [3, 90, 14, 14, 55]


def logits_of(session, forced=FORCED):
    session.reset(1)
    found = [session.prefill([PROMPT]).copy()]
    return np.stack(found + [session.decode(np.array([token])).copy() for token in forced])


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def with_activation(source, target, **changes):
    """A copy of a checkpoint with another activation in its config."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


# Relative to the largest logit: only the order of float32 sums differs.
TOLERANCE = 1e-5


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["llama-relu", "opt"])
def test_decode_equals_dense(bundle, variant, dtype, native):
    folder = bundle(variant, dtype=dtype, kind="relu")
    with OrtSession(folder, "sparse", native=native) as sparse, OrtSession(folder, "dense") as dense:
        assert distance(logits_of(sparse), logits_of(dense)) < TOLERANCE
        assert all(0.2 < share < 0.8 for share in sparse.fired)
        assert dense.fired is None


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("weight_dtype", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["llama-blocks-relu", "opt-blocks"])
def test_integer_rows_equal_all_of_them(bundle, variant, weight_dtype, native):
    """Against a sparse session at full budget, because the dense graph has other integers: those of transposed down."""
    found = []
    for kind in ("relu", "static"):
        folder = bundle(variant, kind=kind, weight_dtype=weight_dtype)
        with OrtSession(folder, "sparse", native=native, exact=True) as one:
            one.set_budget(Budget())
            found.append(logits_of(one))
    assert distance(*found) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({"hidden_act": "relu2"}, "float32"),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.1}, "float32"),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.1}, "bfloat16"),
        ({"hidden_act": "drelu"}, "float32"),
    ],
    ids=str,
)
def test_other_relu_like_activations(checkpoint, tmp_path, changes, dtype):
    model = with_activation(checkpoint("llama-relu"), tmp_path / "model", **changes)
    (tmp_path / "bundle").mkdir()
    make_bundle(model, tmp_path / "bundle", dtype, kind="relu")
    found = []
    for session in (
        OrtSession(tmp_path / "bundle", "dense"),
        OrtSession(tmp_path / "bundle", "sparse"),
        OrtSession(tmp_path / "bundle", "sparse", native=False),
        TorchSession.open(tmp_path / "bundle"),
    ):
        with session:
            found.append((logits_of(session), session.fired))
    for logits, fired in found[1:]:
        assert distance(logits, found[0][0]) < TOLERANCE
        assert fired == found[1][1]


@pytest.mark.parametrize("kind", [OrtSession, TorchSession])
def test_shares_are_known_after_a_sparse_step_only(bundle, kind):
    folder = bundle("llama-relu", kind="relu")
    with kind(folder, "sparse") if kind is OrtSession else kind.open(folder) as session:
        session.prefill([[5, 17, 42]])
        assert session.fired is None
        session.decode(np.array([3]))
        assert len(session.fired) == 2
        session.verify(np.array([[3, 4]]))
        assert session.fired is None
        session.decode(np.array([3]))
        session.prefill([[5]])
        assert session.fired is None
        session.decode(np.array([3]))
        session.reset()
        assert session.fired is None


def test_a_dense_step_has_no_shares_at_a_later_budget(bundle):
    with OrtSession(bundle("llama-relu", kind="relu")) as session:
        logits_of(session)
        assert session.decodes == "dense"
        session.set_budget(Budget(heads=0.25))
        assert session.decodes == "sparse"
        assert session.fired is None
        session.decode(np.array([3]))
        fired = session.fired
        session.set_budget(Budget())
        assert session.fired == fired


def test_run_reports_the_mean_of_the_steps(bundle, capsys):
    folder = bundle("llama-relu", kind="relu")
    main(["run", str(folder), "--prompt", "The sea", "--max-new-tokens", "4", "--head-budget", "0.25", "--json"])
    [result] = json.loads(capsys.readouterr().out)["results"]
    steps = []
    with OrtSession(folder) as session:
        session.set_budget(Budget(heads=0.25))
        session.prefill([load_tokenizer(folder, session.manifest)("The sea").input_ids])
        for token in result["tokens"][0][:-1]:
            session.decode(np.array([token]))
            steps.append(session.fired)
    assert len(steps) == 3
    assert result["fired"] == pytest.approx(np.mean(steps, axis=0).tolist())


def test_a_batch_reports_the_mean_of_its_sequences(bundle):
    prompts, tokens = [[5, 17, 42], [8, 61]], np.array([3, 90])
    found, fired = [], []
    with OrtSession(bundle("llama-relu", kind="relu"), "sparse") as session:
        session.reset(2)
        session.prefill(prompts)
        found.append(session.decode(tokens).copy())
        fired.append(session.fired)
        for prompt, token in zip(prompts, tokens, strict=True):
            session.reset(1)
            session.prefill([prompt])
            found.append(session.decode(token[None]).copy())
            fired.append(session.fired)
    np.testing.assert_allclose(found[0], np.concatenate(found[1:]), atol=1e-5 * np.abs(found[0]).max())
    np.testing.assert_allclose(fired[0], np.mean(fired[1:], axis=0))


@pytest.mark.parametrize("silent", [0.0, 0.25, 0.875])
def test_bytes_fall_with_the_silence(checkpoint, tmp_path, silent):
    """A low bias makes a known share of the neurons silent. The others have a high bias, so they all fire."""
    model = LlamaForCausalLM.from_pretrained(checkpoint("llama-relu"))
    with torch.no_grad():
        for layer in model.model.layers:
            bias = layer.mlp.gate_proj.bias
            bias.copy_(torch.where(torch.arange(len(bias)) % 8 < 8 * silent, -50.0, 50.0))
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "bundle").mkdir()
    make_bundle(tmp_path / "model", tmp_path / "bundle", kind="relu")
    manifest = read_manifest(tmp_path / "bundle")
    with OrtSession(tmp_path / "bundle", "sparse") as sparse, OrtSession(tmp_path / "bundle", "dense") as dense:
        assert distance(logits_of(sparse), logits_of(dense)) < TOLERANCE
        fired = sparse.fired
        assert StepTimer(sparse).generate(PROMPT, 3)["fired"] == fired  # as `bench` reports it
    assert fired == [1 - silent] * 2
    traffic = traffic_of(manifest, "torch", Budget(), 8, 8, fired)
    spec, layers = manifest.spec, manifest.sparse_layers
    width, neurons = spec.hidden_size, spec.intermediate_size
    rows = neurons * (width + 1) + (1 - silent) * neurons * (2 * width + 1)  # gate; then up and down; and biases
    assert traffic.parts["active MLP rows"] == 4 * layers.count * (rows + width)

    spec, weights, _ = load_model(tmp_path / "model")
    measured = measured_shares(layers, weights.load(), token_windows(spec))
    assert measured == pytest.approx(fired)
    manifest = replace(manifest, predictor=manifest.predictor | {"fired": measured})
    assert sparse_pays(manifest, Budget()) is (silent > 0)
    doubtful = [reason for layer, reason in dense_reasons(manifest, Budget()).items() if layer != "0"]
    assert all("does not pay off" in reason for reason in doubtful)
    assert len(doubtful) == (0 if silent else layers.count)


def test_a_share_that_was_not_measured_counts_as_all(bundle):
    manifest = read_manifest(bundle("llama-relu", kind="relu"))
    assert fired_shares(manifest) == [1.0, 1.0]
    assert not sparse_pays(manifest, Budget())
    with OrtSession(bundle("llama-relu", kind="relu")) as session:
        logits_of(session)
        assert session.decodes == "dense"
        assert session.fired is None
    assert fired_shares(read_manifest(bundle("llama-relu"))) is None
    every = Budget().counts(SparseLayers(manifest.spec, 1))
    dense, all_fire = (
        step_traffic(manifest.spec, Itemsizes.of(4), 5, every, fired=fired) for fired in (None, [1.0, 1.0])
    )
    assert dense.parts == all_fire.parts


@pytest.mark.parametrize("fired", [[0.5], [0.5, 1.5], ["0.5", "0.5"]])
def test_damaged_shares_are_refused(bundle, tmp_path, fired):
    shutil.copytree(bundle("llama-relu", kind="relu"), tmp_path / "bundle")
    path = tmp_path / "bundle" / "manifest.json"
    data = json.loads(path.read_text())
    data["predictor"]["fired"] = fired
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match="fired"):
        read_manifest(tmp_path / "bundle")


@pytest.mark.parametrize("backend", ["ort", "torch"])
def test_a_neuron_budget_is_refused(bundle, backend):
    with open_session(bundle("opt", kind="relu"), backend) as session:
        session.set_budget(Budget(heads=0.5))
        with pytest.raises(UserError, match="computes every neuron that fires"):
            session.set_budget(Budget(neurons=(0.5, 1.0)))


def test_heads_are_selected_as_by_other_per_layer_predictors(bundle):
    folder, found = bundle("llama-relu", kind="relu"), []
    with OrtSession(folder, "sparse") as ours, TorchSession.open(folder) as theirs:
        for session in (ours, theirs):
            session.set_budget(Budget(heads=0.5))
            found.append(logits_of(session))
        assert (ours.selection["heads"][:, 2:] == -1).all()
    assert distance(*found) < TOLERANCE
    assert read_weights(folder, read_manifest(folder)).predictor.kind == "relu"
