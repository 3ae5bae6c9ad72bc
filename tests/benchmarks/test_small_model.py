"""Training of small models: which text it uses, that the loss falls, and that the checkpoint loads."""

from __future__ import annotations

import inspect
import statistics
from dataclasses import replace

import pytest
import torch

from shadowllm.benchmarks import small_model
from shadowllm.models.decoder import Decoder
from shadowllm.models.registry import load_model
from tests.conftest import build_tokenizer

pytestmark = pytest.mark.slow


def shorten(monkeypatch, family, **recipe):
    """Train with less: two windows of 64 tokens per step."""
    monkeypatch.setattr(small_model, "SEQLEN", 64)
    monkeypatch.setattr(small_model, "documents", lambda: ["What matters is said again and again. " * 40])
    monkeypatch.setitem(small_model.RECIPES, family, replace(small_model.RECIPES[family], batch=2, **recipe))


def test_it_never_reads_what_benchmarks_evaluate_on():
    held_out = inspect.getdoc(statistics.median)
    texts = list(small_model.documents())
    assert len(texts) > 300
    assert not any(held_out[:60] in text for text in texts)


@pytest.mark.parametrize(("family", "layers"), [("opt", 8), ("llama", 6)])
def test_it_learns_and_loads(monkeypatch, tmp_path, family, layers):
    shorten(monkeypatch, family, warmup=1)
    ticks = []
    model = small_model.train(build_tokenizer(), family, steps=6, advance=ticks.append)
    assert ticks == [1] * 6
    model.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    spec, weights, checkpoint = load_model(tmp_path)
    assert (spec.family, spec.activation, spec.n_layers) == (family, "relu", layers)
    ids = torch.tensor([checkpoint.tokenizer()("What matters is said again and again.").input_ids])
    with torch.no_grad():
        logits = Decoder(spec, weights.load())(ids)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert loss < 0.8 * torch.tensor(float(spec.vocab_size)).log()


@pytest.mark.parametrize("family", small_model.RECIPES)
def test_tokens_that_the_text_never_has_share_a_row(monkeypatch, family):
    """A row of their own would have come to the same: the loss over all tokens is that which was learned by."""
    shorten(monkeypatch, family, learning_rate=0.0)
    tokenizer, losses = build_tokenizer(), []
    over_few = small_model.cross_entropy
    monkeypatch.setattr(small_model, "cross_entropy", lambda *args: losses.append(over_few(*args)) or losses[-1])
    batches = []
    draw = small_model._batch
    monkeypatch.setattr(small_model, "_batch", lambda *args: batches.append(draw(*args)) or batches[-1])
    model = small_model.train(tokenizer, family, steps=1)
    seen = torch.tensor(sorted(set(tokenizer("What matters is said again and again. " * 40).input_ids)))
    never = [token for token in range(len(tokenizer)) if token not in seen]
    rows = model.lm_head.weight.detach()
    assert len(never) > 1
    assert (rows[never] == rows[never[0]]).all()
    assert len(rows[seen].unique(dim=0)) == len(seen)
    ids = seen[batches[0]]
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, losses[0])
