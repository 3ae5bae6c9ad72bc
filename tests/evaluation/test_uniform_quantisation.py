"""The uniformly quantised dense model: its bytes, its rounding, and its quality beside that of selectors."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from shadowllm.bundle.cost_model import Itemsizes, step_traffic
from shadowllm.bundle.quantisation import WEIGHT_DTYPES, dequantise, quantise
from shadowllm.bundle.weight_names import is_quantised
from shadowllm.cli import main
from shadowllm.evaluation.uniform_quantisation import bits_for, evaluate_uniform, uniform_bytes, uniform_weights
from shadowllm.models.decoder import Decoder
from tests.tiny import token_windows


def test_the_bits_are_the_most_that_the_bytes_allow(tiny):
    spec, _ = tiny
    for bits in range(2, 9):
        needed = uniform_bytes(spec, bits, 100)
        assert bits_for(spec, needed, 100) == bits
        assert bits_for(spec, needed - 1, 100) == (bits - 1 if bits > 2 else None)
    assert bits_for(spec, step_traffic(spec, Itemsizes.of(4), 100).total, 100) == 8


@pytest.mark.parametrize("kind", WEIGHT_DTYPES)
def test_blocks_are_those_of_integer_bundles(tiny, kind):
    _, weights = tiny
    q = WEIGHT_DTYPES[kind]
    found = uniform_weights(weights, q.bits)
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        if not is_quantised(name):
            assert found[name] is tensor
            continue
        inputs_last = tensor.T if name.endswith(("o_proj.weight", "down_proj.weight")) else tensor
        data, scales = quantise(inputs_last.contiguous().numpy(), q)
        wanted = dequantise(data, scales, inputs_last.shape[1], q)
        mine = found[name].T if inputs_last is not tensor else found[name]
        assert np.array_equal(mine.numpy(), wanted)


def test_quality_falls_with_the_bits(tiny):
    spec, weights = tiny
    windows, told = token_windows(spec), []
    found = evaluate_uniform(spec, weights, (2, 4, 8), windows, told.append)
    assert list(found) == [2, 4, 8]
    assert sum(told) == 3 * len(windows)
    assert found[2].kl > 4 * found[4].kl > 16 * found[8].kl > 0
    assert [found[bits].selector for bits in found] == ["uniform-int2", "uniform-int4", "uniform-int8"]
    logits = torch.cat([Decoder(spec, uniform_weights(weights, 4))(window) for window in windows.split(1)])
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    assert found[4].perplexity == pytest.approx(float(nll.exp()), rel=1e-5)


def test_eval_reports_the_rival_of_every_row(bundle, tmp_path, capsys):
    options = ["--selector", "oracle", "--neuron-budget", "0.1", "1", "--tokens", "64", "--seqlen", "32"]
    assert main(["eval", str(bundle()), *options, "--json", str(tmp_path / "eval.json")]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    rivals = {row["bits"]: row for row in found["uniform"]}
    assert {row["uniform_bits"] for row in found["results"]} - {None} == set(rivals)
    for row in found["results"]:
        if row["uniform_bits"]:
            assert rivals[row["uniform_bits"]]["bytes_per_token"] <= row["bytes_per_token"]
    assert 8 in rivals  # everything active reads as much as float32 dense
    printed = capsys.readouterr().out
    assert f"{rivals[8]['perplexity']:.2f} (int8)" in printed
