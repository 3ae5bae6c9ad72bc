"""Compares tokenizing and decoding of bundles with transformers on the original checkpoints."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from shadowllm.bundle.manifest import file_hash, read_manifest
from shadowllm.errors import UserError
from shadowllm.runtime.generation.text import (
    StopText,
    TextStream,
    encode_prompt,
    load_tokenizer,
    plain_encoder,
    stopping_tokens,
)
from tests.bundles import make_bundle
from tests.tokenizers import KINDS, export, llama2, llama3, save_model

TEXTS = ["the sea", " the  small sea\n", "é日本🙂 x", "</s>the <|end|>", "sea <s> y", "\n", " ", "a" * 3000]
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TEMPLATES = [
    "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}",
    "{{ strftime_now('%Y') }}{{ messages[0]['content'] }}",
    "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
    "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}",
    "日{{ messages[0]['content'] | tojson }}{% if tools is not none %}TOOLS{% endif %}",
    "{{ messages[0]['content'] }}{% if add_generation_prompt %}<|header|>{% endif %}",
]


class Exported:
    """A bundle, its tokenizer, and the checkpoint's tokenizer as read by transformers."""

    def __init__(self, tokenizer, folder, **options):
        self.bundle = export(tokenizer, folder, **options)
        self.manifest = read_manifest(self.bundle)
        self.tokenizer = load_tokenizer(self.bundle, self.manifest)
        self.reference = AutoTokenizer.from_pretrained(folder / "model")

    def prompt(self, text, **options):
        return encode_prompt(self.bundle, self.manifest, self.tokenizer, text, **options)


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    return Exported(KINDS[request.param](), tmp_path_factory.mktemp(request.param))


class TestIds:
    @pytest.mark.parametrize("text", TEXTS)
    def test_they_are_those_of_the_checkpoint(self, exported, text):
        right = exported.reference(text).input_ids
        assert exported.prompt(text) == right
        assert right[0] == exported.reference.bos_token_id
        plain = exported.reference(text, add_special_tokens=False).input_ids
        assert plain_encoder(exported.tokenizer, exported.manifest)(text) == plain

    def test_a_class_that_builds_its_tokenizer_anew(self, tmp_path):
        model, bundle = save_model(tmp_path / "model", llama2()), tmp_path / "bundle"
        config = json.loads((model / "tokenizer_config.json").read_text())
        (model / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizer"}))
        bundle.mkdir()
        manifest = make_bundle(model, bundle)
        reference, tokenizer = AutoTokenizer.from_pretrained(model), load_tokenizer(bundle, manifest)
        assert type(reference).__name__ in ("LlamaTokenizer", "TokenizersBackend")  # the latter in transformers 5.0
        for text in TEXTS:
            assert encode_prompt(bundle, manifest, tokenizer, text) == reference(text).input_ids

    def test_a_limit_in_the_file_does_not_count(self, tmp_path):
        tokenizer = llama3()
        tokenizer.backend_tokenizer.enable_truncation(4)
        tokenizer.backend_tokenizer.enable_padding(length=9, pad_token="<|end|>", pad_id=1)
        exported = Exported(tokenizer, tmp_path)
        assert exported.prompt(TEXTS[2]) == llama3()(TEXTS[2]).input_ids
        stored = json.loads((exported.bundle / "tokenizer.json").read_text())
        assert stored["truncation"] is None
        assert stored["padding"] is None

    def test_a_token_without_a_row(self, tmp_path):
        tokenizer = llama3()
        rows = len(tokenizer)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        exported = Exported(tokenizer, tmp_path, rows=rows)
        with pytest.raises(UserError, match=f"'<image>' with id {rows}"):
            exported.prompt("see <image>")
        with pytest.raises(UserError, match=f"'<image>' with id {rows}"):
            plain_encoder(exported.tokenizer, exported.manifest)("see <image>")

    def test_a_damaged_or_foreign_file_is_refused(self, exported, tmp_path):
        shutil.copytree(exported.bundle, tmp_path / "copy")
        (tmp_path / "copy" / "added_tokens.json").write_text('{"<own>": 3}')
        with pytest.raises(UserError, match=r"does not list added_tokens\.json"):
            load_tokenizer(tmp_path / "copy", exported.manifest)
        (tmp_path / "copy" / "added_tokens.json").unlink()
        (tmp_path / "copy" / "tokenizer_config.json").write_text("{}")
        with pytest.raises(UserError, match=r"tokenizer_config.json is damaged"):
            load_tokenizer(tmp_path / "copy", exported.manifest)

    def test_a_bundle_of_newer_versions(self, exported, tmp_path):
        copy, path = tmp_path / "copy", tmp_path / "copy" / "tokenizer.json"
        shutil.copytree(exported.bundle, copy)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": {"type": "OfTheFuture"}}))
        manifest = replace(exported.manifest, files=exported.manifest.files | {path.name: file_hash(path)})
        with pytest.raises(UserError, match=r"tokenizer.json cannot be read by tokenizers"):
            load_tokenizer(copy, manifest)

    @pytest.mark.parametrize(("text", "words"), [("", "empty"), ("caf\udce9", "not UTF-8")])
    def test_refused(self, exported, text, words):
        with pytest.raises(UserError, match=words):
            exported.prompt(text)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Exported(llama3(), tmp_path_factory.mktemp("chat"))


class TestChat:
    @pytest.mark.parametrize("template", TEMPLATES)
    def test_ids_are_those_of_transformers(self, plain, template):
        plain.tokenizer.chat_template = template
        right = plain.tokenizer.apply_chat_template(
            [{"role": "user", "content": "the é sea"}], add_generation_prompt=True, return_dict=False
        )
        assert plain.prompt("the é sea", chat=True) == right

    @pytest.mark.parametrize(
        ("template", "words"),
        [
            (None, "has no chat template; give the prompt without a chat template"),
            ("{{ raise_exception('only two of us') }}", "only two of us"),
            ("{% if %}", "does not render"),
            ("{{ messages[0]['content'] + 1 }}", "does not render"),
            ("{{ ''.__class__.__mro__ }}", "does not render"),
            (
                "{% for c in messages[0].content %}{{ c.text }}{% endfor %}",
                "what the chat template of .* has no tokens",
            ),
            ("{{ '\\ud800' }}", "what the chat template of .* not UTF-8"),
        ],
    )
    def test_what_fails_is_one_line(self, plain, template, words):
        plain.tokenizer.chat_template = template
        with pytest.raises(UserError, match=words) as caught:
            plain.prompt("the sea", chat=True)
        assert "\n" not in str(caught.value)

    def test_several_templates(self, tmp_path):
        tokenizer = llama3()
        tokenizer.chat_template = {"default": PLAIN, "loud": PLAIN + "!"}
        exported = Exported(tokenizer, tmp_path)
        assert "additional_chat_templates/loud.jinja" in exported.manifest.files
        assert exported.prompt("sea", chat=True) == llama3()("sea", add_special_tokens=False).input_ids
        loud = exported.prompt("sea", chat=True, template="loud")
        assert loud == llama3()("sea!", add_special_tokens=False).input_ids
        with pytest.raises(UserError, match="'quiet'; choose one of these chat templates: default, loud"):
            exported.prompt("sea", chat=True, template="quiet")
        exported.tokenizer.chat_template.pop("default")
        with pytest.raises(UserError, match="none is the default; choose one of these chat templates: loud"):
            exported.prompt("sea", chat=True)
        (exported.bundle / "additional_chat_templates" / "loud.jinja").write_text("{{ 1 }}")
        with pytest.raises(UserError, match=r"loud.jinja is damaged"):
            load_tokenizer(exported.bundle, exported.manifest)


def words_with_cleaning():
    """A word tokenizer whose text transformers cleans up."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "it", "is", ".", ",", "'", "s", "do", "n't", "?", "!", "'s", "'re", " "]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=True
    )


class TestStream:
    @pytest.mark.parametrize("kind", [*KINDS, "cleaned"])
    @pytest.mark.parametrize("seed", range(40))
    def test_pieces_are_the_text_decoded_at_once(self, kind, seed):
        """Random tokens from the whole vocabulary, with invalid bytes, after a text or at the start."""
        tokenizer = words_with_cleaning() if kind == "cleaned" else KINDS[kind]()
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(0, len(tokenizer) + 3, (60,), generator=generator).tolist()
        tokens += tokenizer("the é日🙂 sea", add_special_tokens=False).input_ids + tokens[: seed % 7]
        prompt = [] if seed % 3 == 0 else tokenizer(["the sea", "it is ."][seed % 2]).input_ids
        stream = TextStream(tokenizer, prompt)
        pieces = [stream.push(token) for token in tokens] + [stream.finish()]
        before = tokenizer.decode(prompt, skip_special_tokens=True)
        assert "".join(pieces) == tokenizer.decode([*prompt, *tokens], skip_special_tokens=True)[len(before) :]

    def test_text_comes_as_soon_as_it_is_certain(self):
        tokenizer = llama2()
        prompt, tokens = tokenizer("the").input_ids, tokenizer("small sea éa", add_special_tokens=False).input_ids
        stream = TextStream(tokenizer, prompt)
        assert [stream.push(token) for token in tokens] == [" small", " sea", " ", "", "", "éa"]
        assert stream.finish() == ""

    def test_the_inner_tokenizer_does_too(self):
        stream = TextStream(llama3().backend_tokenizer)
        tokens = llama3()("the 🙂", add_special_tokens=False).input_ids
        assert "".join(map(stream.push, tokens)) == "the 🙂"
        unfinished = TextStream(llama3().backend_tokenizer)
        assert "".join(map(unfinished.push, tokens[:-1])) == "the "
        assert unfinished.finish() == "\ufffd"

    @pytest.mark.parametrize("before", ["a", "日", "\ufffd"])
    @pytest.mark.parametrize("inside", range(5))
    def test_a_character_that_begins_in_the_prompt_is_given(self, before, inside):
        tokenizer = llama2()
        ids = tokenizer(before + "🙂", add_special_tokens=False).input_ids
        start = len(ids) - 4 + inside
        stream = TextStream(tokenizer, ids[:start])
        tokens = ids[start:] + tokenizer("the sea", add_special_tokens=False).input_ids
        expected = " the sea" if inside == 4 else "🙂 the sea"
        assert "".join(map(stream.push, tokens)) + stream.finish() == expected

    def test_rows_without_a_token_say_nothing(self):
        tokenizer = llama3()
        stream = TextStream(tokenizer, tokenizer("the").input_ids)
        assert stream.push(len(tokenizer) + 5) == ""
        assert stream.push(tokenizer("!", add_special_tokens=False).input_ids[0]) == "!"


class TestStops:
    @pytest.mark.parametrize(
        ("stops", "text"),
        [
            ((), "one, two, three"),
            (("two",), "one, "),
            (("w",), "one, t"),
            ((", th", "three"), "one, two"),
            (("e", "ne, tw"), "on"),
            (("o, thr", "o, thx"), "one, tw"),
            (("threee", "x"), "one, two, three"),
        ],
    )
    @pytest.mark.parametrize("width", [1, 2, 3, 5, 20])
    def test_the_text_ends_before_the_first(self, stops, text, width):
        whole, stop = "one, two, three", StopText(stops)
        pieces = [stop.push(whole[i : i + width]) for i in range(0, len(whole), width)]
        assert "".join(pieces) + stop.finish() == text
        assert stop.stopped == (text != whole)

    def test_only_what_may_begin_one_is_kept_back(self):
        stop = StopText(["###"])
        assert [stop.push(piece) for piece in ("a#", "b", "##", "#c")] == ["a", "#b", "", ""]

    def test_within_tokens(self):
        tokenizer = llama2()
        tokens = tokenizer("the small sea", add_special_tokens=False).input_ids
        stream = TextStream(tokenizer, stops=["mall s"])
        assert "".join(map(stream.push, tokens)) + stream.finish() == "the s"
        assert stream.stopped

    @pytest.mark.parametrize(("stop", "before"), [("é", "a"), ("aé", ""), ("\n", "aé")])
    def test_it_ends_with_the_byte_that_completes_it(self, stop, before):
        tokenizer = llama2()
        tokens = tokenizer("aé\n\n", add_special_tokens=False).input_ids
        stream, pieces = TextStream(tokenizer, stops=[stop]), []
        while not stream.stopped:
            pieces.append(stream.push(tokens.pop(0)))
        assert "".join(pieces).lstrip() == before
        assert tokenizer.decode(tokens) == ("\n" if stop == "\n" else "\n\n")

    def test_its_last_byte_also_ends_text_with_a_clean_up(self):
        """Nothing follows, so neither the clean-up nor another byte can change what comes before."""
        tokenizer = llama2()
        tokens = tokenizer("the" + 12 * "é" + "\n", add_special_tokens=False).input_ids
        tokenizer.clean_up_tokenization_spaces = True
        stream = TextStream(tokenizer, stops=["\n"])
        assert "".join(map(stream.push, tokens)) == "the" + 12 * "é"
        assert stream.stopped

    def test_the_prompt_is_not_searched(self):
        tokenizer = llama2()
        prompt, tokens = (tokenizer(text, add_special_tokens=False).input_ids for text in ("the sea", "small"))
        stream = TextStream(tokenizer, prompt, ["a sm", "the", "sea small"])
        assert "".join(map(stream.push, tokens)) + stream.finish() == " small"
        assert not stream.stopped

    def test_an_empty_one_is_refused(self):
        with pytest.raises(UserError, match="stop string is empty"):
            stopping_tokens(llama2(), ["a", ""])

    def test_one_may_lie_in_a_special_token(self):
        tokenizer = llama3()
        header = tokenizer.convert_tokens_to_ids("<|header|>")
        assert stopping_tokens(tokenizer, ["<|header|>"]) == stopping_tokens(tokenizer, ["x", "eader"]) == [header]
        assert stopping_tokens(tokenizer, ["head of"]) == stopping_tokens(tokenizer, []) == []
