"""Tokenizers of GGUF files: they are those of the original models, with what llama.cpp takes a missing key to mean."""

from __future__ import annotations

import importlib.util
import json

import gguf
import pytest

from shadowllm.errors import UserError
from shadowllm.models.files.tokenizer import has_tokenizer, load_tokenizer
from tests.models.checkpoints import add_key
from tests.tokenizers import llama2, llama3

needs_newer = pytest.mark.skipif(
    importlib.util.find_spec("transformers.integrations.gguf") is None,
    reason="this version of transformers reads less of a GGUF tokenizer",
)


def vocabulary(tokenizer, kind):
    """A tokenizer as keys of a GGUF file."""
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    control, normal = (int(kind) for kind in (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL))
    special = set(tokenizer.all_special_tokens) | {"<|header|>"}
    return {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(token) for token in range(len(tokens))],
        "tokenizer.ggml.token_type": [control if token in special else normal for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in inner["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
    }


def byte_level(**keys):
    return vocabulary(llama3(), "gpt2") | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def write(folder, keys, arch="llama"):
    """Write a file without tensors."""
    writer = gguf.GGUFWriter(folder / "a.gguf", arch)
    for key, value in keys.items():
        add_key(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(folder, keys, arch="llama"):
    write(folder, keys, arch)
    return load_tokenizer(folder, "a.gguf", False)


@pytest.mark.parametrize("tokens", [None, ["<unk>", "<s>", "</s>", "a"]])
def test_a_file_has_one_if_it_holds_tokens(tmp_path, tokens):
    write(tmp_path, {"tokenizer.ggml.tokens": tokens} if tokens else {"general.name": "tiny"})
    assert has_tokenizer(tmp_path, "a.gguf") == bool(tokens)
    with pytest.raises(UserError, match="the tokenizer in .* cannot be read" if tokens else "no tokenizer in .*gguf"):
        load_tokenizer(tmp_path, "a.gguf", False)


@pytest.mark.parametrize("arch", ["granite", "smollm3"])
def test_architectures_whose_config_transformers_does_not_read(tmp_path, arch):
    if importlib.util.find_spec("transformers.integrations.gguf") is None:
        with pytest.raises(UserError, match="a newer version of transformers may read it"):
            load(tmp_path, byte_level(pre="llama-bpe"), arch)
        return
    tokenizer = load(tmp_path, byte_level(pre="llama-bpe"), arch)
    assert tokenizer("the sea<|end|>").input_ids == llama3()("the sea<|end|>").input_ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_the_tokenizer_is_that_of_the_file_and_not_one_beside_it(tmp_path):
    alone = load(tmp_path, byte_level(pre="llama-bpe"))
    llama2().save_pretrained(tmp_path)
    beside = load_tokenizer(tmp_path, "a.gguf", False)
    assert beside("the sea").input_ids == alone("the sea").input_ids != llama2()("the sea").input_ids
    assert beside.eos_token == alone.eos_token == "<|end|>"


@pytest.mark.parametrize(
    ("keys", "adds"),
    [
        ({"pre": "llama-bpe"}, True),
        ({"pre": "tekken"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
        ({"pre": "gpt-2", "add_bos_token": True}, True),
        ({"pre": "gpt-2"}, False),
        ({"pre": "qwen2"}, False),
    ],
)
def test_bos_is_added_as_in_llama_cpp(tmp_path, keys, adds):
    tokenizer = load(tmp_path, byte_level(**keys))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved", None, False)
    for one in (tokenizer, again):
        assert (one("the sea").input_ids[0] == tokenizer.bos_token_id) is adds


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("gpt-2", False)])
@needs_newer
def test_a_word_that_no_merges_give(tmp_path, pre, whole):
    keys = byte_level(pre=pre)
    keys["tokenizer.ggml.tokens"][-1] = "zzz"  # in place of the result of the last merge
    keys["tokenizer.ggml.merges"].pop()
    ids = load(tmp_path, keys)("zzz", add_special_tokens=False).input_ids
    assert (ids == [len(keys["tokenizer.ggml.tokens"]) - 1]) is whole


@pytest.mark.parametrize(("pre", "says"), [(None, "does not say how text is split"), ("new", "splits text as 'new'")])
@needs_newer
def test_an_unknown_way_to_split_text_is_named(tmp_path, pre, says):
    with pytest.warns(UserWarning, match=says):
        load(tmp_path, byte_level(**({"pre": pre} if pre else {})))


@pytest.mark.parametrize("arch", ["llama", "phi3", "gemma"])
@pytest.mark.parametrize("keys", [{}, {"tokenizer.ggml.add_space_prefix": False}], ids=["default", "no-prefix"])
@needs_newer
def test_the_space_before_a_text(tmp_path, arch, keys):
    tokenizer = load(tmp_path, vocabulary(llama2(), "llama") | keys, arch)
    prefixed = not keys and arch != "gemma"
    assert tokenizer.tokenize("the sea")[0].startswith("\u2581") is prefixed
    for text in ["the sea"] if prefixed else ["the sea", " the sea"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
