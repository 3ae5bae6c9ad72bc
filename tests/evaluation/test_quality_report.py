"""The table and the plot of an evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.bundle.cost_model import Itemsizes, predictor_bytes, step_traffic
from shadowllm.bundle.manifest import read_manifest
from shadowllm.errors import UserError
from shadowllm.evaluation.quality import Result
from shadowllm.evaluation.quality_report import CONTEXT, plot, rows
from shadowllm.models.sparsity import Budget


def result(selector, neurons=1.0):
    return Result(
        selector=selector,
        head_budget=1.0,
        neuron_budget=float(np.mean(neurons)),
        budget=Budget(neurons=neurons),
        perplexity=20.0,
        kl=0.1,
        top1_agreement=0.9,
        head_recall=0.7,
        neuron_recall=0.8,
    )


@pytest.fixture(scope="module")
def found(bundle):
    manifest = read_manifest(bundle("llama-blocks", kind="quantized-shadow"))
    results = [
        result("dense"),
        *(result(name) for name in ("oracle", "quantized-shadow-2", "quantized-shadow")),
        result("quantized-shadow", 0.5),
    ]
    return manifest, rows(results, manifest, uniform={8: result("uniform-int8")})


def test_rows_hold_what_the_command_promises(found):
    _, table = found
    assert {"perplexity", "bytes_per_token"} <= table["dense"].keys()
    wanted = {"selector", "neuron_budget", "head_budget", "perplexity", "kl", "top1_agreement", "gap_closure"}
    assert all(wanted | {"bytes_per_token"} <= row.keys() for row in table["results"])
    assert [row["selector"] for row in table["results"]][:2] == ["oracle", "quantized-shadow-2"]


def test_bytes_are_the_steps_and_the_selectors(found):
    manifest, table = found
    dense = table["dense"]["bytes_per_token"]
    assert dense == step_traffic(manifest.spec, Itemsizes.of(4), CONTEXT).total
    oracle, two_bits, four_bits, half = (row["bytes_per_token"] for row in table["results"])
    copied = 2 * 2 * manifest.spec.intermediate_size * manifest.spec.hidden_size
    assert oracle == dense
    assert four_bits - dense == predictor_bytes(manifest, 4)
    assert four_bits - two_bits == copied * 2 / 8
    assert four_bits - half == 4 * 2 * 48 * 3 * 64  # 48 of 96 neurons of two layers


def test_bytes_of_a_budget_for_each_layer_are_those_of_its_layers(bundle):
    manifest = read_manifest(bundle("llama-blocks", kind="quantized-shadow"))
    found = rows([result("dense"), result("oracle", (0.255, 0.505)), result("oracle", 0.25)], manifest)
    both, quarter = (row["bytes_per_token"] for row in found["results"])
    assert "budget" not in found["results"][0]
    counts = Budget(neurons=(0.255, 0.505)).counts(manifest.sparse_layers).neurons
    assert both - quarter == 4 * int(counts.sum() - 2 * 24) * 3 * 64
    assert counts[0] != counts[1]


def test_figure(found, tmp_path):
    manifest, table = found
    plot(table, tmp_path / "quality.png", manifest.model)
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="cannot write"):
        plot(table, tmp_path / "no" / "quality.png", manifest.model)
