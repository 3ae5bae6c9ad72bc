"""Tied embeddings: the stored tensors decide, as in transformers 5."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowllm.errors import UserError
from shadowllm.models.decoder import Decoder
from shadowllm.models.registry import load_model
from tests.models.checkpoints import copied, logits, rewrite

TABLES = {"llama-mqa-tied": "model.embed_tokens.weight", "opt": "model.decoder.embed_tokens.weight"}
TABLES["opt-350m"] = TABLES["opt"]


def head_only(tensors, table):
    return {"lm_head.weight" if name == table else name: t for name, t in tensors.items()}


def other_head(tensors, table):
    return tensors | {"lm_head.weight": tensors[table].flip(0).contiguous()}


def equal_head(tensors, table):
    return tensors | {"lm_head.weight": tensors[table].clone()}


@pytest.mark.parametrize("variant", TABLES)
@pytest.mark.parametrize(
    ("change", "tied", "words"),
    [(head_only, True, None), (other_head, False, "both are used"), (equal_head, True, None)],
)
def test_what_the_checkpoint_holds_decides(checkpoint, tmp_path, variant, change, tied, words):
    folder = copied(checkpoint(variant), tmp_path / "model", tie_word_embeddings=True)
    rewrite(folder, lambda tensors: change(tensors, TABLES[variant]))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        spec, weights, opened = load_model(folder)
    assert [words in str(each.message) for each in said] == [True] * bool(words)
    if variant != "opt-350m":  # its tables are never the same matrix
        assert spec.tied_embeddings is opened.config.tie_word_embeddings is tied
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(Decoder(spec, weights.load())), logits(theirs), atol=2e-5, rtol=0)


def test_an_untied_model_needs_its_head(checkpoint, tmp_path):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model")
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != "lm_head.weight"})
    with pytest.raises(UserError, match=r"lacks the tensor lm_head\.weight"):
        load_model(folder)
