"""Activations: each computes what transformers computes, on every backend that has formulas of its own."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import get_args

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig
from transformers.activations import ACT2FN

from shadowllm.config import Source
from shadowllm.errors import UserError
from shadowllm.models.activations import NAMES, RELU_LIKE, Activation, read_activation
from shadowllm.models.decoder import Decoder, activate, mlp_product
from shadowllm.models.registry import load_model
from shadowllm.plugins import activation_nodes, reference
from shadowllm.plugins.function_body import OPSET
from tests.conftest import build_transformers_model
from tests.models.checkpoints import logits, write_gguf

OF_TRANSFORMERS = sorted(set(NAMES) & set(ACT2FN))
POINTS = torch.cat((torch.linspace(-12, 12, 1001), torch.tensor([0.0, -0.0, 1e-30, -1e4, 1e4])))
THRESHOLD = 0.5


def test_names():
    assert set(NAMES.values()) == set(get_args(Activation))
    assert set(NAMES) - set(OF_TRANSFORMERS) == {"fatrelu", "drelu"}


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_each_is_that_of_transformers(name):
    """``gelu_new``, ``gelu_fast`` and ``gelu_pytorch_tanh`` are one formula with different roundings."""
    theirs = ACT2FN[name](POINTS.double())
    torch.testing.assert_close(activate(NAMES[name], 0.0, POINTS.double()), theirs, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(activate(NAMES[name], 0.0, POINTS), ACT2FN[name](POINTS), rtol=1e-5, atol=1e-6)


def test_those_that_transformers_does_not_have():
    wanted = torch.where(POINTS > THRESHOLD, POINTS, 0)
    assert torch.equal(activate("fatrelu", THRESHOLD, POINTS), wanted)
    assert activate("fatrelu", THRESHOLD, torch.tensor([THRESHOLD])).item() == 0
    gate, up = POINTS, POINTS.flip(0) + 3
    assert torch.equal(mlp_product("drelu", 0.0, gate, up), gate.clamp_min(0) * up.clamp_min(0))


class Graph:
    """The smallest `activation_nodes.NodeBuilder`."""

    def __init__(self):
        self.nodes = []

    def op(self, op_type, *inputs, **attributes):
        self.nodes.append(ir.node(op_type, inputs, attributes))
        return self.nodes[-1].outputs[0]

    def number(self, value):
        return self.op("Constant", value_float=value)


def with_nodes(activation, gate, up):
    g, inputs = Graph(), [ir.val(name, dtype=ir.DataType.FLOAT, shape=gate.shape) for name in ("gate", "up")]
    y = activation_nodes.times_up(
        g, activation, activation_nodes.activate(g, activation, THRESHOLD, inputs[0]), inputs[1]
    )
    y.name, y.dtype = "y", ir.DataType.FLOAT
    model = ir.Model(ir.Graph(inputs, [y], nodes=g.nodes, opset_imports={"": OPSET}, name="g"), ir_version=11)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"gate": gate, "up": up})[0]


@pytest.mark.parametrize("activation", get_args(Activation))
def test_numpy_and_onnx_agree_with_pytorch(activation):
    gate, up = POINTS.clamp(-12, 12), POINTS.flip(0).clamp(-12, 12) + 3
    threshold = THRESHOLD if activation == "fatrelu" else 0.0
    wanted = mlp_product(activation, threshold, gate, up)
    for found in (
        reference.mlp_product(activation, threshold, gate.numpy(), up.numpy()),
        with_nodes(activation, gate.numpy(), up.numpy()),
    ):
        torch.testing.assert_close(torch.from_numpy(np.asarray(found)), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", RELU_LIKE)
def test_a_relu_like_activation_is_zero_below_its_threshold(activation):
    assert not activate(activation, THRESHOLD, torch.linspace(-9, 0, 10)).any()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden_act": "tanh"}, "activation 'tanh' is not supported"),
        ({"hidden_act": "gelu_10"}, "'gelu_10'"),
        ({"hidden_act": "leaky_relu"}, "'leaky_relu'"),
        ({"hidden_act": ["relu"]}, "not supported"),
        ({"hidden_act": "fatrelu"}, "without a threshold"),
    ],
)
def test_others_are_refused_by_name(config, words):
    with pytest.raises(UserError, match=words):
        read_activation(SimpleNamespace(**config))


def test_only_the_name_that_the_family_has_is_read(checkpoint, tmp_path):
    with pytest.raises(UserError, match="'mish'"):
        read_activation(OPTConfig(activation_function="mish"))
    stray = edited(checkpoint("llama-gqa"), tmp_path / "stray", activation_function="relu")
    assert load_model(stray)[0].activation == "silu"
    stray = edited(checkpoint("gemma3"), tmp_path / "gemma", hidden_act="silu")
    with pytest.warns(UserWarning, match="'relu' is used instead"):
        assert load_model(stray, activation="relu")[0].activation == "relu"


def edited(source, target, **changes):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


@pytest.mark.parametrize("name", ["relu2", "gelu_new", "gelu_fast", "quick_gelu", "swish"])
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_models_follow_transformers(checkpoint, tmp_path, family, name):
    key = "activation_function" if family == "opt" else "hidden_act"
    folder = edited(checkpoint(family), tmp_path / "model", **{key: name})
    spec, weights, _ = load_model(folder)
    found = logits(Decoder(spec, weights.load()))
    torch.testing.assert_close(found, logits(AutoModelForCausalLM.from_pretrained(folder)), atol=2e-5, rtol=0)


def test_the_config_of_minicpm_s(checkpoint, tmp_path):
    changes = {"hidden_act": "fatrelu", "hidden_act_param": 0.01}
    spec, weights, _ = load_model(edited(checkpoint("llama-gqa"), tmp_path / "model", **changes))
    assert (spec.activation, spec.activation_threshold) == ("fatrelu", 0.01)
    gates = Decoder(spec, weights.load()).gate_activation(1, torch.randn(50, spec.hidden_size))
    assert gates[gates != 0].min() > 0.01


@pytest.mark.parametrize("threshold", [-1.0, float("nan"), "0.1"])
def test_nonsense_thresholds_are_refused(checkpoint, tmp_path, threshold):
    changes = {"hidden_act": "fatrelu", "hidden_act_param": threshold}
    with pytest.raises(UserError, match="threshold"):
        load_model(edited(checkpoint("llama-gqa"), tmp_path / "model", **changes))


def test_drelu_needs_a_gate(checkpoint, tmp_path):
    with pytest.raises(UserError, match="dReLU without a gate"):
        load_model(edited(checkpoint("opt"), tmp_path / "model", activation_function="drelu"))


class TestGivenActivation:
    def test_a_gguf_file_does_not_say_it(self, tmp_path):
        model = build_transformers_model("llama", {"hidden_act": "relu"})
        write_gguf(tmp_path / "a.gguf", model)
        assert load_model(tmp_path / "a.gguf")[0].activation == "silu"
        spec, weights, opened = load_model(tmp_path / "a.gguf", activation="relu")
        torch.testing.assert_close(logits(Decoder(spec, weights.load())), logits(model), atol=2e-5, rtol=0)
        assert opened.config.hidden_act == "relu"

    @pytest.mark.filterwarnings("ignore:keys of the GGUF")
    def test_with_a_threshold(self, tmp_path):
        write_gguf(tmp_path / "a.gguf", build_transformers_model("llama", {}))
        spec, _, _ = load_model(tmp_path / "a.gguf", activation="fatrelu", activation_threshold=0.01)
        assert (spec.activation, spec.activation_threshold) == ("fatrelu", 0.01)

    def test_gemma_3_has_another_name_for_it(self, checkpoint):
        with pytest.warns(UserWarning, match="'relu' is used instead"):
            assert load_model(checkpoint("gemma3"), activation="relu")[0].activation == "relu"

    def test_it_stands_above_the_config_with_a_warning(self, checkpoint):
        with pytest.warns(UserWarning, match="config.json says that the activation is 'relu', and 'drelu' is used"):
            assert load_model(checkpoint("llama-relu"), activation="drelu")[0].activation == "drelu"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"activation": "tanh"}, "'tanh' is not supported"),
            ({"activation_threshold": 0.1}, "only fatrelu"),
            ({"activation": "relu", "activation_threshold": 0.1}, "only fatrelu"),
        ],
    )
    def test_nonsense_is_refused(self, options, words):
        with pytest.raises(UserError, match=words):
            Source("model", **options)


@pytest.mark.filterwarnings("ignore:config.json says that the activation is")
def test_with_another_activation_it_is_another_model(checkpoint):
    """Traces and predictors are bound to the fingerprint."""
    given = (None, "relu", "silu", "fatrelu", "fatrelu")
    thresholds = (None, None, None, 0.01, 0.02)
    plain, same, *others = (
        load_model(checkpoint("llama-relu"), activation=name, activation_threshold=threshold)[1].fingerprint()
        for name, threshold in zip(given, thresholds, strict=True)
    )
    assert same == plain
    assert len({plain, *others}) == 4
