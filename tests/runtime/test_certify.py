"""The certificate of a shortlist: the largest logit is that of the whole table at every position."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.weights import read_weights
from shadowllm.cli import main
from shadowllm.evaluation.decoded import Decoded, rows
from shadowllm.evaluation.generation import compare_texts
from shadowllm.evaluation.quality import evaluate
from shadowllm.runtime import Budget
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.recomputed_rows import RecomputedRows
from shadowllm.runtime.torch_session import TorchSession
from tests.bundles import make_bundle
from tests.conftest import VARIANTS, build_tokenizer, build_transformers_model

TEXT = np.random.default_rng(7).integers(0, 97, 40).tolist()


@pytest.fixture(scope="module")
def adversarial(tmp_path_factory):
    """A bundle whose output rows differ by less than a step of the low-bit copy, so that the copy's order is random."""
    model, folder = build_transformers_model(*VARIANTS["llama-blocks"]), tmp_path_factory.mktemp("adversarial")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        rows = model.lm_head.weight
        rows.copy_(
            torch.randn(rows.shape[1:], generator=generator) + 0.02 * torch.randn(rows.shape, generator=generator)
        )
    model.save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    made = {}
    for weight_dtype in (None, "int8"):
        made[weight_dtype] = folder / f"bundle-{weight_dtype}"
        made[weight_dtype].mkdir()
        make_bundle(
            folder / "model", made[weight_dtype], kind="quantized-shadow", weight_dtype=weight_dtype, rest="shadow"
        )
    return made


def decoded(session, text, budget, prompt=4):
    """The most probable tokens after each token of a text, and the rows that were computed exactly for them."""
    session.set_budget(budget)
    session.reset()
    session.prefill([text[:prompt]])
    found = [(session.decode(np.array([token]))[0].argmax(), session.recomputed[0]) for token in text[prompt:]]
    return tuple(np.array(part) for part in zip(*found, strict=True))


@pytest.mark.parametrize("weight_dtype", [None, "int8"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda folder: OrtSession(folder, "sparse"), id="ort-native"),
        pytest.param(lambda folder: OrtSession(folder, "sparse", native=False), id="ort-function-bodies"),
        pytest.param(TorchSession.open, id="torch"),
    ],
)
def test_a_certified_token_is_that_of_the_whole_table(adversarial, weight_dtype, kind):
    with kind(adversarial[weight_dtype]) as session:
        # A certified step does not round the input of an integer table to 8 bits, here for all rows of the table.
        whole, _ = decoded(session, TEXT, Budget(shortlist=session.spec.vocab_size, certify=True))
        guessed, few = decoded(session, TEXT, Budget(shortlist=1))
        proved, counts = decoded(session, TEXT, Budget(shortlist=1, certify=True))
    assert (guessed != whole).mean() > 0.5
    assert (few == 1).all()
    assert (proved == whole).all()
    assert (counts > 1).all()


def test_an_evaluation_reports_the_rows_of_the_certificate(adversarial):
    folder = adversarial[None]
    manifest = read_manifest(folder)
    read, windows = read_weights(folder, manifest), torch.tensor([TEXT])
    found = {}
    for certificate in (None, read.certificate):
        _, result = evaluate(
            manifest.spec,
            read.sparse,
            read.predictor,
            "quantized-shadow",
            windows,
            neuron_budgets=[1.0],
            shortlists=[2],
            copies=read.copies,
            certificate=certificate,
        )
        found[result.certify] = result
    assert found[False].recomputed_rows == {"mean": 2.0, "fallback_share": 0.0}
    assert found[False].top1_agreement < 0.5
    assert found[True].recomputed_rows["mean"] > 2
    assert found[True].recomputed_rows["fallback_share"] == 1.0
    assert found[True].top1_agreement == 1.0


def test_commands_report_what_a_certificate_costs(adversarial, tmp_path, capsys):
    budget = ["--neuron-budget", "0.2", "--shortlist", "2", "--certify"]
    prompt = ["--prompt", "abcd", "--max-new-tokens", "6"]
    assert main(["run", str(adversarial[None]), *prompt, *budget, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["results"]
    assert found["budget"]["certify"] is True
    assert found["recomputed_rows"]["mean"] > 2
    report, text = tmp_path / "eval.json", ["--text", __file__, "--tokens", "32", "--seqlen", "32"]
    selector = ["--selector", "quantized-shadow"]
    assert main(["eval", str(adversarial[None]), *text, *selector, *budget, "--json", str(report)]) == 0
    assert json.loads(report.read_text())["results"][0]["recomputed_rows"]["fallback_share"] > 0
    assert "beyond the shortlist" in capsys.readouterr().out


def test_a_comparison_of_texts_counts_the_rows(adversarial):
    budget = Budget(neurons=0.2, shortlist=2, certify=True)
    recomputed = RecomputedRows(budget)
    with OrtSession(adversarial[None], "sparse") as session:
        session.set_budget(budget)
        agreement = compare_texts(session, [TEXT[:8]], [TEXT[8:16]], recomputed=recomputed)
    (row,) = rows([Decoded(budget, agreement, [], recomputed.summary())])["generation"]
    assert row["certify"] is True
    assert row["recomputed_rows"]["mean"] > 2


def test_without_a_shortlist_a_certificate_changes_nothing(adversarial):
    with OrtSession(adversarial[None], "sparse") as session:
        whole, counts = decoded(session, TEXT, Budget(certify=True))
        plain, _ = decoded(session, TEXT, Budget())
    assert (whole == plain).all()
    assert (counts == 97).all()
