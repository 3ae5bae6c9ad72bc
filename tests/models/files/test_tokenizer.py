"""Tokenizers of checkpoints: they are read as in transformers, or an error names the cause."""

from __future__ import annotations

import importlib.util
import json

import pytest

from shadowllm.errors import UserError
from shadowllm.models.files.tokenizer import encode, has_tokenizer, load_tokenizer, text_encoder
from tests.tokenizers import llama2, llama3


@pytest.fixture
def folder(tmp_path):
    llama3().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, trust=False):
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder, None, trust)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ['{"a": "', "\x00\x01", "", "[" * 100_000], ids=lambda text: text[:4])
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_text(content)
    assert f"{folder / name} is damaged or cut short" in refused(folder)


def test_a_tokenizer_of_a_newer_version(folder):
    edit(folder / "tokenizer.json", pre_tokenizer={"type": "OfTheFuture"})
    error = refused(folder)
    assert f"{folder / 'tokenizer.json'} cannot be read by tokenizers" in error
    assert "pip install --upgrade tokenizers" in error


def test_code_of_its_own_needs_the_flag(folder):
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    edit(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": [None, "own.Own"]})
    assert "--trust-remote-code" in refused(folder)
    assert type(load_tokenizer(folder, None, True)).__name__ == "Own"


def test_an_unknown_class_beside_tokenizer_json(folder):
    edit(folder / "tokenizer_config.json", tokenizer_class="NotOfTransformers")
    assert load_tokenizer(folder, None, False)("the sea").input_ids == llama3()("the sea").input_ids


@pytest.mark.parametrize(
    ("start", "missing", "remedy"),
    [
        (b"\n\x0e", "sentencepiece", "shadowllm[sentencepiece]"),
        (b"\n\x0e", "google.protobuf", "shadowllm[sentencepiece]"),
        (b"IQ== 0\n", "tiktoken", "pip install tiktoken"),
    ],
)
def test_a_missing_package_is_named(folder, monkeypatch, start, missing, remedy):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(start)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else object())
    error = refused(folder)
    assert f"{folder / 'tokenizer.model'} is read by the package {missing.removeprefix('google.')}" in error
    assert remedy in error


def test_a_vocabulary_without_its_merges(folder):
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    edit(folder / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert "has vocab.json, and neither merges.txt nor tokenizer.json" in refused(folder)


def test_there_is_none(folder):
    assert has_tokenizer(folder, None)
    (folder / "tokenizer.json").unlink()
    assert not has_tokenizer(folder, None)
    assert "no tokenizer in" in refused(folder)


def test_truncation_and_padding_of_the_file_are_off(folder):
    tokenizer = llama3()
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=9, pad_token="<|end|>", pad_id=1)
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    backend = load_tokenizer(folder, None, False).backend_tokenizer
    assert backend.truncation is None
    assert backend.padding is None


def test_a_token_the_model_lacks_is_named():
    tokenizer = llama2()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert text_encoder(tokenizer)("the <image>")[-1] == rows
    with pytest.raises(UserError, match=f"'<image>' with id {rows}, and the model has only {rows}"):
        text_encoder(tokenizer, rows)("the <image>")
    assert text_encoder(tokenizer, rows + 1)("the <image>")[-1] == rows


@pytest.mark.parametrize("special", [False, True])
def test_a_tokenizer_that_fails_on_a_text_is_named(special):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"the": 0}, unk_token="<unk>"))
    with pytest.raises(UserError, match=r"the tokenizer cannot read the text 'sea' \(WordLevel error"):
        encode(PreTrainedTokenizerFast(tokenizer_object=inner), "sea", None, special)


def test_a_pointer_of_git_lfs_is_named(folder):
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in refused(folder)
