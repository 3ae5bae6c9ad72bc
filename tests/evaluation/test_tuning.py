"""Tuning a bundle: measurements meet the target, the manifest records it, and an impossible target is refused."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from functools import partial

import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.weights import read_weights
from shadowllm.cli import main
from shadowllm.config import Target
from shadowllm.errors import UserError
from shadowllm.evaluation import draft_tuning
from shadowllm.evaluation.draft_tuning import Measured, tune_drafts
from shadowllm.evaluation.quality import evaluate
from shadowllm.evaluation.tuning import tune
from shadowllm.models.sparsity import Budget
from shadowllm.predictor.calibration import measuring_windows
from shadowllm.runtime import open_session
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
from tests.bundles import read_only

pytestmark = pytest.mark.slow

QUICK = {"tokens": 256, "seqlen": 32}


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
    quick = ["--tokens", "256", "--seqlen", "32"]
    assert main(["tune", str(copy), "--target-ppl-increase", "1%", *quick]) == 0
    shown = capsys.readouterr().out
    assert "layer by layer" in shown
    assert "for perplexity +1.0%; measured perplexity +" in shown
    assert main(["tune", str(copy)]) == 1
    assert "no target" in capsys.readouterr().err
    assert main(["tune", str(copy), "--target-ppl-increase", "much"]) == 1
    assert main(["tune", str(copy), "--target-ppl-increase", "1%", "--threads", "2", *quick]) == 1
    assert "--threads does nothing without --target-speedup or --lossless" in capsys.readouterr().err


def test_a_mixed_budget_is_one_for_all_layers_and_has_a_shortlist(with_copies, bytes_only):
    tuned = tune(with_copies, Target(ppl_increase=0.01), **QUICK)
    assert tuned.allocation["measured"]["ppl_increase"] <= 0.01
    budget = read_manifest(with_copies).budget
    assert budget.neurons < 1
    assert isinstance(budget.heads, float)
    assert budget.shortlist is None or budget.shortlist < 97
    looser = tune(with_copies, Target(ppl_increase=0.2), **QUICK)
    assert looser.budget.neurons <= budget.neurons
    assert looser.budget.heads <= budget.heads


def evaluated_increase(folder, budget, texts=(), **options):
    """The increase of the perplexity by a budget, on the text that `tune` measures with."""
    manifest = read_manifest(folder)
    read = read_weights(folder, manifest)
    encode = plain_encoder(load_tokenizer(folder, manifest), manifest)
    windows = measuring_windows(manifest.spec, read.sparse, encode, manifest.predictor, texts=texts, **QUICK)
    dense, found = evaluate(
        manifest.spec,
        read.sparse,
        read.predictor,
        "quantized-shadow",
        windows,
        head_budgets=[budget.heads],
        neuron_budgets=[budget.neurons],
        copies=read.copies,
        **options,
    )
    return found.perplexity / dense.perplexity - 1


def test_the_rest_and_the_proof_of_the_default_budget_stay(with_copies):
    """With a rest that is dropped by default, that is what is measured, and layers have fractions of their own."""
    manifest = read_manifest(with_copies)
    replace(manifest, budgets=asdict(Budget(rest="drop", certify=True))).write(with_copies)
    budget = tune(with_copies, Target(ppl_increase=0.05), **QUICK).budget
    assert (budget.rest, budget.certify, budget.shortlist) == ("drop", True, None)
    assert isinstance(budget.neurons, tuple)
    measured = read_manifest(with_copies).allocation["measured"]["ppl_increase"]
    assert measured == pytest.approx(evaluated_increase(with_copies, budget, rests=["drop"]), rel=1e-3, abs=1e-6)


def test_a_mixed_budget_is_shown(with_copies, capsys):
    manifest = read_manifest(with_copies)
    replace(manifest, budgets={"heads": 0.5, "neurons": 0.25, "shortlist": 20, "rest": None}).write(with_copies)
    assert main(["inspect", str(with_copies)]) == 0
    expected = "25% of neurons, 50% of heads, 20 rows of the output table, the rest from the low-bit copy"
    assert expected in capsys.readouterr().out


@pytest.mark.parametrize(
    ("predictor", "verb"),
    [
        ({"kind": "quantized-shadow"}, "calibrated"),
        ({"kind": "layerwise"}, "trained"),
        ({"kind": "layerwise", "networks": "PowerInfer"}, "calibrated"),
    ],
)
def test_only_networks_that_were_trained_are_said_to_be(with_copies, capsys, predictor, verb):
    manifest = read_manifest(with_copies)
    predictor = manifest.predictor | {"tokens": 900, "criterion": "l2norm"} | predictor
    replace(manifest, predictor=predictor).write(with_copies)
    assert main(["inspect", str(with_copies)]) == 0
    assert f", {verb} on 900 tokens by l2norm" in capsys.readouterr().out


def test_the_increase_of_a_mixed_budget_is_that_of_an_evaluation(with_copies, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("What is measured while tuning is measured as in an evaluation. " * 9)
    manifest = tune(with_copies, Target(ppl_increase=0.05), texts=[str(text)], **QUICK)
    budget = manifest.budget
    increase = evaluated_increase(with_copies, budget, [str(text)], shortlists=[budget.shortlist])
    assert manifest.allocation["measured"]["ppl_increase"] == pytest.approx(increase, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("choose", [partial(tune, target=Target(ppl_increase=0.05)), tune_drafts])
def test_text_that_the_predictor_was_calibrated_on_is_left_out(with_copies, tmp_path, choose):
    text = tmp_path / "text.txt"
    text.write_text("What was calibrated on tells nothing. " * 9)
    manifest = read_manifest(with_copies)
    calibrated = {"text": "text.txt", "tokens": 280, "held_out_tokens": 40}
    replace(manifest, predictor=manifest.predictor | calibrated).write(with_copies)
    with pytest.raises(UserError, match="too short: 0 windows of 32 tokens without the first 320 tokens of"):
        choose(with_copies, texts=[str(text)], **QUICK)


def test_drafts_are_measured_and_used(with_copies, capsys):
    """The manifest gets the fastest budget that was measured; lossless decoding drafts with it."""
    before = read_manifest(with_copies)
    tuned, found = tune_drafts(with_copies, threads=1, **QUICK)
    assert before.budget == tuned.budget == found[0].budget
    assert len({measured.budget for measured in found}) == len(found) > 3
    best = max(measured.speedup(measured.best_length) for measured in found)
    assert read_manifest(with_copies).drafting["measured"]["speedup"] == pytest.approx(best)
    assert read_manifest(with_copies).draft_budget in {measured.budget for measured in found}
    assert main(["inspect", str(with_copies)]) == 0
    assert "times as fast as dense" in capsys.readouterr().out
    assert main(["tune", str(with_copies), "--lossless", "--tokens", "256", "--seqlen", "32", "--threads", "1"]) == 0
    assert capsys.readouterr().out.count("acceptance") == len(found) + 1


def test_the_prompts_of_drafts_need_one_copy_of_the_model(with_copies, monkeypatch):
    monkeypatch.setattr(draft_tuning, "read_weights", read_only("sparse"))
    prompts = draft_tuning._prompts(with_copies, read_manifest(with_copies), (), **QUICK)
    assert {len(prompt) for prompt in prompts} == {16}


def test_the_speedup_of_drafts():
    """Half of the drafted tokens are right: two drafts give 1.75 tokens for 2 * 0.2 + 1.2 dense steps."""
    measured = Measured(Budget(), acceptance=0.5, draft_seconds=0.2, verify_seconds={1: 1.0, 3: 1.2, 9: 2.0})
    assert measured.speedup(2) == pytest.approx(1.75 / 1.6)
    assert measured.best_length == 2
    assert Measured(Budget(), 0.1, 0.5, {1: 1.0, 2: 1.2}).best_length == 0


def test_too_little_text_for_drafts(with_copies):
    with pytest.raises(UserError, match="too short to measure drafts"):
        tune_drafts(with_copies, tokens=32, seqlen=8, threads=1)
