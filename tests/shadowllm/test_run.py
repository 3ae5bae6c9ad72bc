"""`shadowllm run` prints the model's text with any encoding of the terminal."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from shadowllm.cli import main
from tests.bundles import make_bundle
from tests.tokenizers import export, llama2, llama3, save_model

SAYS = ("\u2581sea", "\u2581small", "\u2581model")


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    """A bundle of a model that continues "the" with three words of one token each."""
    from transformers import AutoModelForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("speaking"), llama2()
    model = AutoModelForCausalLM.from_pretrained(save_model(folder, tokenizer))
    ids = tokenizer("the").input_ids
    with torch.no_grad():
        for word in SAYS:
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            model.lm_head.weight[tokenizer.vocab[word]] = 50 * hidden / hidden.norm()
            ids.append(tokenizer.vocab[word])
    model.save_pretrained(folder)
    (folder / "bundle").mkdir()
    make_bundle(folder, folder / "bundle")
    return folder / "bundle"


def run(capsys, bundle, *arguments):
    capsys.readouterr()
    assert main(["run", str(bundle), "--backend", "ort-dense", "--max-new-tokens", "3", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ([], " sea small model"),
        (["--stop", "small"], " sea "),
        (["--stop", "mall mo", "--stop", "l"], " sea sma"),
        (["--stop", "a s"], " se"),
        (["--stop", "model!"], " sea small model"),
    ],
)
def test_it_streams_and_reports_the_same(speaking, capsys, options, text):
    assert run(capsys, speaking, "--prompt", "the", *options) == f"the{text}\n"
    (found,) = json.loads(run(capsys, speaking, "--prompt", "the", "--json", *options))["results"]
    assert found["texts"] == [text]


def test_the_prompt_is_not_searched_for_stop_strings(speaking, capsys):
    found = json.loads(run(capsys, speaking, "--prompt", "the", "--stop", "he sea", "--json"))["results"][0]
    assert found["texts"] == [" sea small model"]


def test_sequences_of_a_batch_stop_by_themselves(speaking, capsys):
    alone = json.loads(run(capsys, speaking, "--prompt", "sea", "--json"))["results"][0]
    both = ["--prompt", "the", "--prompt", "sea", "--stop", "small", "--json"]
    found = json.loads(run(capsys, speaking, *both))["results"][0]
    assert found["texts"] == [" sea ", alone["texts"][0]]
    assert [len(tokens) for tokens in found["tokens"]] == [2, 3]


def test_options_reach_the_choice_of_tokens(speaking, capsys):
    from transformers import AutoModelForCausalLM

    ids = llama2()("the").input_ids
    model = AutoModelForCausalLM.from_pretrained(speaking.parent)
    for option, value in (("repetition_penalty", 1e3), ("no_repeat_ngram_size", 1)):
        right = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, **{option: value})[0, len(ids) :]
        flags = ["--prompt", "the", "--json", f"--{option.replace('_', '-')}", str(value), "--max-new-tokens", "6"]
        assert json.loads(run(capsys, speaking, *flags))["results"][0]["tokens"] == [right.tolist()]
    sampled = ["--prompt", "the", "--json", "--temperature", "50", "--seed", "5"]
    first, again, narrow = (
        json.loads(run(capsys, speaking, *sampled, *more))["results"][0]["tokens"]
        for more in ([], [], ["--min-p", "1"])
    )
    assert first == again != narrow
    assert narrow == [[llama2().vocab[word] for word in SAYS]]


def test_lossless(bundle, capsys):
    """The texts and tokens are those of dense, and a line says what the drafts gave."""
    folder = bundle("llama-gqa", kind="quantized-shadow", rest="shadow")
    options = [
        "--prompt",
        "the sea",
        "--prompt",
        "x",
        "--max-new-tokens",
        "12",
        "--threads",
        "1",
        "--neuron-budget",
        "0.5",
    ]
    lossless = ["--lossless", "--draft-length", "3", "--prepack"]

    def results(*arguments):
        assert main(["run", str(folder), *options, *arguments]) == 0
        return json.loads(capsys.readouterr().out)["results"]

    ours, dense = results("--json", *lossless, "--against", "ort-dense")
    assert ours["tokens"] == dense["tokens"]
    assert ours["lossless"]["drafted"] > 0
    assert ours["recomputed_rows"] == {}  # every token comes from a dense step
    assert ours["lossless"]["drafts"] + ours["lossless"]["dense_steps"] > 0
    assert dense["lossless"]["drafted"] == 0  # a dense session has nothing to draft
    assert results("--json")[0]["lossless"] is None
    assert main(["run", str(folder), "--prompt", "the sea", "--max-new-tokens", "6", *lossless]) == 0
    assert "ort: lossless: " in capsys.readouterr().err
    assert main(["run", str(folder), "--prompt", "x", "--draft-length", "3"]) == 1
    assert "decoding is not lossless" in capsys.readouterr().err
    assert main(["run", str(folder), "--prompt", "x", "--prepack", "--backend", "torch"]) == 1
    assert "'torch' does not pack weights" in capsys.readouterr().err


def test_a_prompt_from_a_file_or_standard_input(speaking, capsys, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_bytes(b"\xef\xbb\xbfthe")
    assert run(capsys, speaking, "--prompt-file", str(tmp_path / "prompt.txt")) == "the sea small model\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("the é".encode()), encoding="ascii"))
    assert run(capsys, speaking, "--prompt-file", "-").startswith("the é")
    monkeypatch.setattr(sys, "stdin", None)  # Python has this value after `<&-`
    assert main(["run", str(speaking), "--prompt-file", "-"]) == 1
    assert "standard input is closed" in capsys.readouterr().err


def test_several_templates_by_name(tmp_path, capsys):
    tokenizer = llama3()
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "other": "{{ bos_token }}other"}
    bundle = export(tokenizer, tmp_path)
    plain, named = (
        run(capsys, bundle, "--prompt", "x", "--json", *more) for more in (["--chat"], ["--chat-template", "other"])
    )
    assert json.loads(plain)["results"][0]["tokens"] != json.loads(named)["results"][0]["tokens"]
    assert main(["run", str(bundle), "--prompt", "x", "--chat-template", "none"]) == 1
    assert "choose one of these chat templates: default, other" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "no prompt"),
        (["--prompt", "x", "--stop", ""], "stop string is empty"),
        (["--prompt-file", "absent.txt"], "cannot read absent.txt"),
        (["--prompt-file", "latin.txt"], "latin.txt is not UTF-8"),
        (["--prompt", "caf\udce9"], "bytes that are not UTF-8"),
        (["--prompt", "x", "--stop", "caf\udce9"], "bytes that are not UTF-8"),
        (["--prompt", "x", "--temperature", "nan"], "temperature nan"),
        (["--prompt", "x", "--seed", "-1"], "the seed is -1"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--prompt", "x", "--max-new-tokens", str(10**30)], "--max-new-tokens is 1000"),
        (["--prompt", "x", "--threads", "0"], "--threads is 0"),
    ],
)
def test_mistakes(speaking, capsys, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert main(["run", str(speaking), *options]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


class TestEncodings:
    """Uses real processes, because Python sets a stream's encoding when it starts."""

    PROMPT = "sea 🙂 日"

    def start(self, bundle, *arguments, **environment):
        command = [sys.executable, "-m", "shadowllm.cli", *arguments]
        return subprocess.run(
            [*command[:4], str(bundle), *command[4:]], capture_output=True, timeout=120, env=os.environ | environment
        )

    def test_what_it_lacks_is_replaced(self, speaking):
        options = ["--max-new-tokens", "1", "--prompt", self.PROMPT, "--against", "ort-dense"]
        done = self.start(speaking, "run", *options, PYTHONIOENCODING="cp1252")
        assert done.returncode == 0, done.stderr
        assert b"sea ? ?" in done.stdout

    def test_arguments_and_files_are_utf8_in_every_locale(self, tmp_path):
        tokenizer = llama3()
        tokenizer.chat_template = "日{{ messages[0].content }}"
        bundle = export(tokenizer, tmp_path)
        plain = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        options = ["--max-new-tokens", "3", "--prompt", self.PROMPT, "--chat", "--json"]
        results = [self.start(bundle, "run", *options, **environment) for environment in (plain, {"PYTHONUTF8": "1"})]
        assert [done.returncode for done in results] == [0, 0], results[0].stderr
        found = [json.loads(done.stdout) for done in results]
        assert found[0]["prompts"] == [self.PROMPT]
        assert found[0]["results"][0]["tokens"] == found[1]["results"][0]["tokens"]


def test_markup_in_a_prompt_is_text(speaking, capsys):
    assert "[bold]the[/]" in run(capsys, speaking, "--prompt", "[bold]the[/]", "--against", "ort-dense")


@pytest.mark.parametrize(
    "command",
    [
        ["run", "OUT", "--prompt", "see <image>"],
        ["eval", "OUT", "--text", "TEXT", "--tokens", "64", "--seqlen", "32", "--selector", "static"],
        ["drift", "OUT", "--text", "TEXT"],
        ["tune", "OUT", "--text", "TEXT", "--target-ppl-increase", "2%"],
        ["export", "MODEL", "NEW", "--calibration-text", "TEXT", "--calibration-seqlen", "32"],
    ],
)
def test_a_token_the_model_lacks_is_named_everywhere(tmp_path, capsys, command):
    tokenizer = llama3()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    out = export(tokenizer, tmp_path, rows=rows)
    (tmp_path / "text").write_text("see <image> and the sea " * 50)
    places = {"OUT": out, "TEXT": tmp_path / "text", "MODEL": tmp_path / "model", "NEW": tmp_path / "new"}
    assert main([str(places.get(word, word)) for word in command]) == 1
    assert f"the token '<image>' with id {rows}, and the model has only {rows}" in capsys.readouterr().err


def test_the_copy_of_a_bundle_with_an_unlisted_file(speaking, capsys, tmp_path):
    shutil.copytree(speaking, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").write_text("{{ 1 }}")
    assert main(["run", str(tmp_path / "copy"), "--prompt", "x"]) == 1
    assert "does not list chat_template.jinja" in capsys.readouterr().err
