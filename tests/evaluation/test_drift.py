"""Compares recall at run time with a count by hand on the reference."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from shadowllm.bundle import weights as bundle_weights
from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.weights import read_weights
from shadowllm.cli import main
from shadowllm.errors import UserError
from shadowllm.evaluation.drift import runtime_recall
from shadowllm.models.sparsity import Budget
from shadowllm.predictor.traces import Tracer
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
from shadowllm.runtime.ort.session import OrtSession
from tests.bundles import read_only


def windows(n=3, seqlen=12):
    return torch.randint(3, 97, (n, seqlen), generator=torch.Generator().manual_seed(2))


def test_an_exact_selector_cannot_drift(bundle):
    folder = bundle("llama-relu", kind="relu")
    with OrtSession(folder, "sparse") as session, pytest.raises(UserError, match="the selector relu is exact"):
        runtime_recall(session, {}, windows())


@pytest.mark.parametrize(("criterion", "decoded"), [("l2norm", 6), ("plainact", 5)])
def test_a_static_choice_is_scored_as_counted_by_hand(bundle, tmp_path, criterion, decoded):
    """No loss depends on the last token, so a criterion with gradients does not tell what is important there."""
    folder = shutil.copytree(bundle(kind="static"), tmp_path / "bundle")
    manifest = read_manifest(folder)
    manifest = replace(manifest, predictor=manifest.predictor | {"criterion": criterion})
    manifest.write(folder)
    read = read_weights(folder, manifest)
    with OrtSession(folder, "sparse") as session:
        found = runtime_recall(session, read.sparse, windows())
    hits = wanted = 0
    for window in windows():
        traced = Tracer(manifest.spec, read.sparse, criterion).trace(window[None]).neurons[6 : 6 + decoded]
        for layer, ranking in enumerate(read.predictor.tensors["neurons.scores"]):
            chosen = set(ranking.topk(44).indices.tolist())
            for scores in traced[:, layer]:
                hits, wanted = hits + len(chosen & set(scores.topk(44).indices.tolist())), wanted + 44
    assert found.tokens == 3 * decoded
    assert found.neurons == pytest.approx(hits / wanted)
    assert (found.expected_heads, found.expected_neurons) == (0.5, 0.5)


def test_in_place_choices_beat_chance_and_everything_kept_is_all_there_is(bundle):
    folder = bundle("llama-blocks", kind="quantized-shadow")
    weights = read_weights(folder, read_manifest(folder)).sparse
    with OrtSession(folder, "sparse") as session:
        found = runtime_recall(session, weights, windows(), Budget(neurons=(0.25, 0.5), heads=0.5))
        assert found.neurons > found.expected_neurons + 0.2
        assert found.expected_neurons == pytest.approx((0.25 * 24 + 0.5 * 48) / 72)
        assert runtime_recall(session, weights, windows(1), Budget()).neurons == 1


def test_one_token_is_no_text(bundle):
    with OrtSession(bundle(), "sparse") as session, pytest.raises(UserError, match="nothing to decode"):
        runtime_recall(session, {}, windows(seqlen=1))


def test_one_decoded_token_has_no_loss_after_it(bundle, tmp_path):
    folder = shutil.copytree(bundle(kind="static"), tmp_path / "bundle")
    manifest = read_manifest(folder)
    replace(manifest, predictor=manifest.predictor | {"criterion": "fisher"}).write(folder)
    with OrtSession(folder, "sparse") as session, pytest.raises(UserError, match="nothing to decode; give windows"):
        runtime_recall(session, {}, windows(seqlen=3))


def test_command(bundle, tmp_path, capsys):
    text = tmp_path / "served.txt"
    text.write_text("The shadow of a model says what matters. " * 10)
    folder = str(bundle("llama-blocks", kind="quantized-shadow"))
    quick = ["--tokens", "64", "--seqlen", "16"]
    assert main(["drift", folder, "--text", str(text), *quick, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"text", "calibration"}
    assert all(0 < found[name]["neurons"] <= 1 for name in found)
    assert main(["drift", folder, "--text", str(text), *quick]) == 0
    assert "of the important heads" in capsys.readouterr().out


def test_the_command_needs_one_copy_of_the_model(with_copies, tmp_path, monkeypatch):
    monkeypatch.setattr(bundle_weights, "read_weights", read_only("sparse"))
    (tmp_path / "text").write_text("The shadow of a model says what matters. " * 10)
    assert main(["drift", str(with_copies), "--text", str(tmp_path / "text"), "--tokens", "32", "--seqlen", "16"]) == 0


def test_text_of_the_calibration_is_named_and_not_decoded_again(bundle, tmp_path, capsys):
    """The row "calibration" is of text like the calibration's, and no row is of text that was calibrated on."""
    folder = shutil.copytree(bundle("llama-blocks", kind="quantized-shadow"), tmp_path / "bundle")
    manifest = read_manifest(folder)
    calibrated = {"text": "corpus.txt", "tokens": 56, "held_out_tokens": 8}
    replace(manifest, predictor=manifest.predictor | calibrated).write(folder)
    text = tmp_path / "corpus.txt"
    text.write_text("The shadow of a model says what matters. " * 10)
    command = ["drift", str(folder), "--text", str(text), "--tokens", "64", "--seqlen", "16", "--json"]
    assert main(command) == 1
    assert "was calibrated on corpus.txt; give text like it with --calibration-text" in capsys.readouterr().err
    assert main([*command, "--calibration-text", str(text)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == found["calibration"]  # the same 64 tokens, in another order
    encode = plain_encoder(load_tokenizer(folder, manifest), manifest)
    with OrtSession(folder, "sparse") as session:
        weights = read_weights(folder, manifest).sparse
        after = torch.tensor(encode(text.read_text())[64:128]).view(4, 16)
        assert found["text"] == asdict(runtime_recall(session, weights, after))
