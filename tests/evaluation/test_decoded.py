"""The whole comparison of decoding with dense, from Python and from the command line."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace

import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.cli import main
from shadowllm.errors import UserError
from shadowllm.eval_config import Generation
from shadowllm.evaluation.decoded import Decoding, rows
from shadowllm.models.sparsity import Budget
from tests.tokenizers import export, llama3

SMALL = Generation(prompts=2, new_tokens=12, problems=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export(llama3(), tmp_path_factory.mktemp("decoded"), max_position_embeddings=1024)


def test_everything_kept_is_dense_and_less_is_not(folder):
    whole, part = Decoding(folder, [Budget(), Budget(heads=0.5, neurons=0.05, rest="drop")], SMALL).run()
    assert (whole.agreement.identical, whole.agreement.agreement) == (1, 1)
    assert [(score.agreement, score.problems) for score in whole.scores] == [(1, 2)] * 3
    assert part.agreement.identical < 1
    found = rows([whole, part])
    assert [row["rest"] for row in found["generation"]] == [None, "drop"]
    assert [row["neuron_budget"] for row in found["reasoning"]] == [1.0] * 3 + [0.05] * 3
    json.dumps(found)


def test_text_and_budget_are_the_given_ones(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The shadow of a model is small. " * 40)
    (found,) = Decoding(folder, options=SMALL, texts=[str(text)]).run()
    assert found.budget == Budget(heads=0.5, neurons=0.5)  # the bundle's own
    assert len(found.agreement.lengths) == 2


def test_prompts_leave_room_for_the_new_tokens(folder):
    positions = read_manifest(folder).spec.max_seqlen
    decoding = Decoding(folder, options=replace(SMALL, new_tokens=positions - 9))
    assert {len(prompt) for prompt in decoding._prompts} == {9}


def test_refused_before_anything_is_decoded(folder, bundle, tmp_path):
    with pytest.raises(UserError, match="3 fractions"):
        Decoding(folder, [Budget(neurons=(0.1, 0.2, 0.3))], SMALL)
    with pytest.raises(UserError, match=r"2048 new ones exceed .*; ask for fewer new tokens"):
        Decoding(folder, options=Generation(new_tokens=2048))
    with pytest.raises(UserError, match="exceed the model's 64 positions; the generated problems need"):
        Decoding(bundle(), options=SMALL)
    without = tmp_path / "bundle"
    shutil.copytree(folder, without)
    manifest = json.loads((without / "manifest.json").read_text())
    del manifest["files"]["tokenizer.json"]
    (without / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="has no tokenizer"):
        Decoding(without, options=SMALL)


def test_results_on_text_are_saved_before_decoding(folder, tmp_path, monkeypatch):
    out = tmp_path / "eval.json"
    monkeypatch.setattr(Decoding, "run", lambda self: sys.exit("stopped"))
    text = ["--tokens", "64", "--seqlen", "32", "--selector", "static", "--generate", "--new-tokens", "12"]
    with pytest.raises(SystemExit, match="stopped"):
        main(["eval", str(folder), *text, "--json", str(out)])
    assert len(json.loads(out.read_text())["results"]) == 1


def test_command(folder, tmp_path, capsys):
    out = tmp_path / "eval.json"
    text = ["--tokens", "64", "--seqlen", "32", "--selector", "static", "--neuron-budget", "1", "0.25"]
    sizes = ["--generate", "--prompts", "2", "--new-tokens", "12", "--problems", "2"]
    assert main(["eval", str(folder), *text, *sizes, "--json", str(out)]) == 0
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert len(found["results"]) == 2
    assert [row["neuron_budget"] for row in found["generation"]] == [1, 0.25]
    assert [row["task"] for row in found["reasoning"]] == ["addition", "copying", "retrieval"] * 2
    assert "decoded text" in printed
    assert "retrieval" in printed
    assert main(["eval", str(folder), *text]) == 0
    assert "decoded text" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        (["--new-tokens", "64"], "--new-tokens does nothing without --generate"),
        (["--generate", "--head-unit", "kv_group"], "--head-unit does nothing with --generate"),
        (["--generate", "--aggregate", "sequence"], "--aggregate does nothing with --generate"),
        (["--generate", "--tasks", "arc_easy"], "--generate does nothing with --tasks"),
    ],
)
def test_options_that_do_nothing(folder, capsys, given, flag):
    assert main(["eval", str(folder), *given]) == 1
    assert flag in capsys.readouterr().err
