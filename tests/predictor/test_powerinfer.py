"""Predictors that PowerInfer published: the scores are those of its code, and other files are refused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from shadowllm.bundle.predictor_file import Predictor
from shadowllm.config import TrainConfig
from shadowllm.errors import UserError
from shadowllm.evaluation.validation import validate
from shadowllm.exporter.write_bundle import write_bundle
from shadowllm.models.decoder import Decoder
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import SparseLayers
from shadowllm.predictor.networks import layer_neuron_scores
from shadowllm.predictor.powerinfer import read_networks
from shadowllm.predictor.tracefile import calibrate
from shadowllm.predictor.train import import_networks
from tests.bundles import BUDGET, make_predictor
from tests.tiny import split, token_windows

WIDTHS = (4, 6, 3)  # of the network of each layer


def networks(spec, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "fc1.weight": torch.randn(width, spec.hidden_size, generator=generator),
            "fc2.weight": torch.randn(spec.intermediate_size, width, generator=generator),
        }
        for width in WIDTHS
    ]


def written(folder, layers, save=torch.save, ending="pt"):
    folder.mkdir()
    for layer, tensors in enumerate(layers):
        save(tensors, folder / f"model_{layer}.{ending}")
    return folder


def write_gguf(path, layers, magic=b"PWRI"):
    """The tensors as PowerInfer's converter writes them, in float16."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_float32("powerinfer.sparse_threshold", 0.0)
    for layer, tensors in enumerate(layers):
        for name, tensor in tensors.items():
            writer.add_tensor(f"blk.{layer}.{name}", tensor.half().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.write_bytes(magic + path.read_bytes()[4:])


def predictor_of(spec, weights, folder):
    """A predictor whose networks are imported, and whose other tensors are random."""
    made = make_predictor(spec, "f00d", "layerwise")
    tensors = made.tensors | read_networks(folder, SparseLayers(spec, 1), weights)
    return replace(made, tensors=tensors, normed=False)


@pytest.fixture
def relu(checkpoint):
    spec, weights, _ = load_model(checkpoint("llama-relu"))
    return spec, dict(weights.load())


@torch.no_grad()
@pytest.mark.parametrize(("save", "ending"), [(torch.save, "pt"), (save_file, "safetensors")])
def test_the_scores_are_those_of_powerinfer(relu, checkpoint, tmp_path, save, ending):
    """They are computed from the hidden states of transformers, and divided by a factor of the token."""
    spec, weights = relu
    layers = networks(spec)
    predictor = predictor_of(spec, weights, written(tmp_path / "pi", layers, save, ending))
    predictor.save(tmp_path / "predictor.safetensors")
    predictor = Predictor.load(tmp_path / "predictor.safetensors")
    assert (predictor.rank, predictor.normed) == (6, False)
    seen, hidden = {}, []
    tokens = token_windows(spec, n=1)
    Decoder(spec, weights, input_hook=lambda layer, unit, x: seen.update({(layer, unit): x}))(tokens)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama-relu"), dtype=torch.float32)
    for block in model.model.layers:
        block.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
    model(tokens)
    for layer in (1, 2):
        h = hidden[layer]
        expected = F.relu(h @ layers[layer]["fc1.weight"].T) @ layers[layer]["fc2.weight"].T
        rms = (h.square().mean(-1, keepdim=True) + spec.norm_eps).sqrt()
        found = layer_neuron_scores(predictor, layer, seen[layer, "neurons"])
        torch.testing.assert_close(found * rms, expected, atol=2e-3, rtol=1e-4)


def test_gguf_files(relu, tmp_path):
    spec, weights = relu
    layers = [{name: tensor.half().float() for name, tensor in tensors.items()} for tensors in networks(spec)]
    sparse, path = SparseLayers(spec, 1), tmp_path / "a.gguf"
    expected = read_networks(written(tmp_path / "pi", layers), sparse, weights)
    for magic in (b"PWRI", b"GGUF"):
        write_gguf(path, layers, magic)
        found = read_networks(path, sparse, weights)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(UserError, match=r"a.gguf is damaged or truncated"):
        read_networks(path, sparse, weights)
    write_gguf(path, layers, b"ABCD")
    with pytest.raises(UserError, match=r"a.gguf is damaged or truncated .*magic"):
        read_networks(path, sparse, weights)
    write_gguf(path, layers[:2])
    with pytest.raises(UserError, match="no network of layer 2"):
        read_networks(path, sparse, weights)


def test_import_and_export(checkpoint, tmp_path):
    """The graphs select as the reference does, and the networks keep their recall."""
    spec, weights, opened = load_model(checkpoint("llama-relu"))
    loaded = weights.load()
    folder = written(tmp_path / "pi", networks(spec))
    traces = calibrate(spec, loaded, split(token_windows(spec, n=6), held_out=2), weights.fingerprint())
    config = TrainConfig(powerinfer=folder)
    predictor = import_networks(spec, traces, config, "layerwise", loaded)
    assert (predictor.record["networks"], predictor.rank) == ("PowerInfer", 6)
    assert predictor.record["held_out"].keys() == {"layerwise", "static"}
    assert "loss" in predictor.record["held_out"]["layerwise"]
    assert "loss" not in predictor.record["held_out"]["static"]  # a ranking learns nothing
    (tmp_path / "out").mkdir()
    write_bundle(tmp_path / "out", "model", weights, opened, predictor, budget=BUDGET)
    assert validate(tmp_path / "out", weights, predictor)["selection_agreement"] > 0.99
    with pytest.raises(UserError, match="make a layerwise predictor, not shadow"):
        import_networks(spec, traces, config, "shadow", loaded)


@pytest.mark.parametrize(
    "option",
    [{"rank": 16}, {"epochs": 2}, {"loss": "mse"}, {"learning_rate": 0.1}, {"weight_decay": 0.0}, {"batch_tokens": 8}],
)
def test_options_of_training_have_no_use(option):
    with pytest.raises(UserError, match=f"leave out {next(iter(option))}"):
        TrainConfig(powerinfer="pi", **option)
    assert TrainConfig(powerinfer="pi").powerinfer == Path("pi")


class Code:
    def __reduce__(self):
        return (print, ("code that ran",))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"fc1.weight": torch.ones(6, 40)},
            r"fc1.weight of the network of layer 1 in .*pi has .*\(6, 40\).* \(6, 48\)",
        ),
        ({"fc2.weight": torch.ones(88, 5)}, r"fc2.weight of .* has shape \(88, 5\).* needs \(88, 6\)"),
        ({"fc2.weight": torch.ones(87, 6)}, r"has shape \(87, 6\).* needs \(88, 6\)"),
        ({"fc1.weight": torch.ones(0, 48), "fc2.weight": torch.ones(88, 0)}, r"has shape \(0, 48\)"),
        ({"fc1.weight": torch.tensor(1.0)}, r"has shape \(\)"),
        ({"fc1.weight": torch.full((6, 48), torch.nan)}, "holds NaN, infinity or integers"),
        ({"fc1.weight": torch.ones(6, 48, dtype=torch.int8)}, "holds NaN, infinity or integers"),
        ({"fc1.bias": torch.ones(6)}, "fc1.bias is missing or unknown"),
        ({"fc1.weight": [1.0]}, "more than tensors"),
        ({"fc1.weight": Code()}, "more than tensors, which could run code"),
    ],
)
def test_other_tensors_are_refused(relu, tmp_path, capsys, change, words):
    spec, weights = relu
    layers = networks(spec)
    layers[1] |= change
    with pytest.raises(UserError, match=words):
        read_networks(written(tmp_path / "pi", layers), SparseLayers(spec, 1), weights)
    assert "code that ran" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_files_are_refused(relu, checkpoint, tmp_path):
    spec, weights = relu
    sparse = SparseLayers(spec, 1)
    folder = written(tmp_path / "pi", networks(spec))
    (folder / "model_0.pt").unlink()  # of a dense layer
    assert read_networks(folder, sparse, weights)
    torch.save({"fc1.weight": torch.ones(1)}, folder / "model_3.pt")
    with pytest.raises(UserError, match=r"networks of more layers than the model's 3"):
        read_networks(folder, sparse, weights)
    (folder / "model_3.pt").unlink()
    (folder / "model_1.pt").write_bytes(pickle.dumps(Code()))
    with pytest.raises(UserError, match=r"model_1.pt is damaged, or holds more than tensors"):
        read_networks(folder, sparse, weights)
    (folder / "model_1.pt").unlink()
    with pytest.raises(UserError, match="no network of layer 1"):
        read_networks(folder, sparse, weights)
    with pytest.raises(UserError, match="is no folder and no GGUF file"):
        read_networks(tmp_path / "none", sparse, weights)


def test_models_whose_input_cannot_be_recovered_are_refused(relu, checkpoint, tmp_path):
    spec, weights = relu
    folder = written(tmp_path / "pi", networks(spec))
    hidden = weights | {"layers.2.post_norm.weight": torch.zeros(spec.hidden_size)}
    with pytest.raises(UserError, match="layer 2 has a weight of zero"):
        read_networks(folder, SparseLayers(spec, 1), hidden)
    opt, opt_weights, _ = load_model(checkpoint("opt"))
    with pytest.raises(UserError, match="of opt models are not read"):
        read_networks(folder, SparseLayers(opt, 1), opt_weights)
