"""Tuning a bundle: measurements meet the target, the manifest records it, and an impossible target is refused."""

from __future__ import annotations

import shutil

import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.cli import main
from shadowllm.config import Target
from shadowllm.errors import UserError
from shadowllm.evaluation.tuning import tune
from shadowllm.models.sparsity import Budget
from shadowllm.runtime import open_session

pytestmark = pytest.mark.slow

QUICK = {"tokens": 512, "seqlen": 32}


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle("llama-blocks", kind="quantized-shadow"), tmp_path / "bundle")


def test_a_perplexity_target_is_met_and_used(copy):
    before = read_manifest(copy)
    tuned = tune(copy, Target(ppl_increase=0.01), **QUICK)
    assert tuned.allocation["target"] == {"ppl_increase": 0.01}
    assert tuned.allocation["measured"]["ppl_increase"] <= 0.01
    assert read_manifest(copy).allocation == tuned.allocation
    assert read_manifest(copy).files == before.files
    budget = Budget(**read_manifest(copy).budgets)
    assert len(budget.neurons) == len(budget.heads) == 2
    assert budget.mean().neurons < 1
    with open_session(copy, "ort") as session:
        session.prefill([[3, 4]])


def test_groups_of_heads_are_tuned_beside_neurons(bundle, tmp_path):
    """Two groups: half of the heads, or all of them."""
    copy = shutil.copytree(bundle("llama-blocks", kind="quantized-shadow", head_unit="kv_group"), tmp_path / "bundle")
    tuned = tune(copy, Target(ppl_increase=0.01), **QUICK)
    assert tuned.allocation["measured"]["ppl_increase"] <= 0.01
    assert Budget(**tuned.budgets).mean().neurons < 1


def test_a_looser_target_keeps_less(copy):
    kept = [Budget(**tune(copy, Target(ppl_increase=share), **QUICK).budgets).mean().neurons for share in (0.003, 0.1)]
    assert kept[1] < kept[0]


def test_a_speedup_out_of_reach_says_what_is_within(copy):
    before = read_manifest(copy)
    with pytest.raises(UserError, match="a speedup of 1000 is out of reach: the sparsest budget tried gave"):
        tune(copy, Target(speedup=1000), **QUICK)
    assert read_manifest(copy) == before


@pytest.mark.parametrize("given", [{}, {"ppl_increase": 0.1, "speedup": 2}, {"ppl_increase": 0}, {"speedup": 1}])
def test_targets_that_ask_for_nothing(given):
    with pytest.raises(UserError):
        Target(**given)


def test_command(copy, capsys):
    quick = ["--tokens", "512", "--seqlen", "32"]
    assert main(["tune", str(copy), "--target-ppl-increase", "1%", *quick]) == 0
    shown = capsys.readouterr().out
    assert "layer by layer" in shown
    assert "for perplexity +1.0%; measured perplexity +" in shown
    assert main(["tune", str(copy)]) == 1
    assert "no target" in capsys.readouterr().err
    assert main(["tune", str(copy), "--target-ppl-increase", "much"]) == 1
