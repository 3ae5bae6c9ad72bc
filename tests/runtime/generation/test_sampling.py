"""Sampling options: their ranges, and their defaults from a bundle's generation config."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from shadowllm.bundle.manifest import file_hash, read_manifest
from shadowllm.errors import UserError
from shadowllm.runtime import Sampling
from shadowllm.runtime.generation.sampling import bundle_sampling, check_generation_config, generation_config

CONFIG = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "no_repeat_ngram_size": 3,
    "suppress_tokens": [5, 6],
    "begin_suppress_tokens": [7],
    "bad_words_ids": [[8, 9]],
    "stop_strings": ["###", "User:"],
    "do_sample": True,
    "eos_token_id": 2,
}
ALWAYS = Sampling(
    repetition_penalty=1.1,
    no_repeat_ngram_size=3,
    suppress_tokens=(5, 6),
    begin_suppress_tokens=(7,),
    bad_words_ids=((8, 9),),
)


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": value} for value in (-1, math.nan, math.inf, 1e-320, 1e-31, -0.5, 1e39)),
        {"top_k": -1},
        *({"top_p": value} for value in (1.5, -0.1, math.nan)),
        *({"min_p": value} for value in (-0.1, 1.1, math.nan)),
        *({"repetition_penalty": value} for value in (0, -1, math.nan, math.inf)),
        {"no_repeat_ngram_size": -1},
        *({"seed": value} for value in (-1, 2**63)),
    ],
)
def test_out_of_range(options):
    with pytest.raises(UserError, match=re.escape(str(next(iter(options.values()))))) as caught:
        Sampling(**options)
    assert caught.value.remedy


@pytest.mark.parametrize(
    "options", [{"temperature": 1e-30}, {"top_p": 1e-9}, {"top_p": 0}, {"seed": 2**63 - 1}, {"min_p": 1}]
)
def test_in_range(options):
    Sampling(**options)


def test_a_bad_word_that_ends_the_text_does_not_count():
    sampling = Sampling(bad_words_ids=((2,), (2, 3)))
    (found,) = sampling.processors(prompt_len=1, stop_ids=[2])
    assert set(found.sequence_bias) == {(2, 3)}


@pytest.fixture
def configured(bundle, tmp_path):
    """A copy of a bundle with another generation config, and its manifest."""

    def make(text):
        folder = tmp_path / "copy"
        shutil.copytree(bundle(), folder, dirs_exist_ok=True)
        path = folder / "generation_config.json"
        path.write_text(text if isinstance(text, str) else json.dumps(text))
        manifest = read_manifest(folder)
        return folder, replace(manifest, files=manifest.files | {path.name: file_hash(path)})

    return make


def test_what_is_left_out_comes_from_the_config(configured):
    folder, manifest = configured(CONFIG)
    assert bundle_sampling(folder, manifest, temperature=None, top_k=None) == (ALWAYS, ("###", "User:"))
    sampled, stops = bundle_sampling(folder, manifest, ["x"], temperature=1.0, top_k=0, seed=3)
    assert sampled == replace(ALWAYS, temperature=1.0, top_k=0, top_p=0.9, min_p=0.1, seed=3)
    assert stops == ("x",)
    given, _ = bundle_sampling(folder, manifest, repetition_penalty=1.0, no_repeat_ngram_size=0)
    assert given == replace(ALWAYS, repetition_penalty=1.0, no_repeat_ngram_size=0)


def test_a_config_that_is_given_is_not_read(configured):
    folder, manifest = configured(CONFIG)
    config = generation_config(folder, manifest)
    read = bundle_sampling(folder, manifest, temperature=1.0)
    (folder / "generation_config.json").unlink()
    assert bundle_sampling(folder, manifest, config=config, temperature=1.0) == read
    assert bundle_sampling(folder, manifest, config={}) == (Sampling(), ())


def test_a_config_without_any(configured):
    assert bundle_sampling(*configured({"eos_token_id": 2, "stop_strings": "one"})) == (Sampling(), ("one",))


def test_negative_ids_of_suppressed_tokens_have_no_effect(configured):
    """As in transformers: some configs say -1 for no token."""
    config = {"suppress_tokens": [-1, 5], "begin_suppress_tokens": [-1]}
    assert bundle_sampling(*configured(config)) == (Sampling(suppress_tokens=(5,)), ())


@pytest.mark.parametrize("config", [{"repetition_penalty": "1.7"}, {"suppress_tokens": [97]}, {"stop_strings": [""]}])
def test_the_config_of_a_model_that_no_text_could_be_generated_with(config):
    with pytest.raises(UserError, match=r"^model/g\.json has a value that cannot be used .*; mend that file$"):
        check_generation_config(Path("model/g.json"), config, vocab_size=97)


def test_options_of_sampling_are_no_reason_to_refuse_a_model():
    check_generation_config(Path("model/g.json"), CONFIG | {"top_k": -1}, vocab_size=97)


def test_what_is_not_done_is_named(configured, recwarn):
    bundle_sampling(*configured(CONFIG | {"num_beams": 1, "guidance_scale": None, "typical_p": 0.9}))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="not done here: num_beams, penalty_alpha, sequence_bias$"):
        bundle_sampling(*configured({"num_beams": 4, "penalty_alpha": 0.6, "sequence_bias": [[[3], 2.0]]}))
    with pytest.warns(UserWarning, match="not done here: typical_p$"):
        bundle_sampling(*configured({"typical_p": 0.9}), temperature=1.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("{", "damaged"),
        ("[1]", "damaged"),
        ({"repetition_penalty": "high"}, "cannot be used"),
        ({"repetition_penalty": -2}, "repetition penalty -2"),
        ({"suppress_tokens": [3, 97]}, "the token 97, and the model has 97"),
        ({"bad_words_ids": [[3, -1]]}, "the token -1"),
        ({"bad_words_ids": 3}, "cannot be used"),
        ({"stop_strings": ["a", 3]}, "cannot be used"),
        ({"stop_strings": ["a", ""]}, "a stop string is empty"),
        ({"stop_strings": {"a": 1}}, "stop_strings is {'a': 1}"),
        ({"suppress_tokens": [3.0]}, "suppress_tokens"),
        ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size is 2.5"),
        ({"repetition_penalty": True}, "repetition_penalty is True"),
        ('{"repetition_penalty": NaN}', "repetition_penalty is nan"),
        ('[["repetition_penalty", 2]]', "damaged"),
    ],
)
def test_a_config_that_cannot_be_used(configured, config, words):
    with pytest.raises(UserError, match=words) as caught:
        bundle_sampling(*configured(config))
    assert "generation_config.json" in caught.value.problem
    assert "mend that file" in caught.value.remedy


def test_what_the_user_gave_is_not_blamed_on_the_config(configured):
    with pytest.raises(UserError, match=r"^top-p 2 is not in"):
        bundle_sampling(*configured(CONFIG), top_p=2)
    for words, options in (
        ("suppresses the token 5000", {"suppress_tokens": [5000]}),
        ("suppresses the token -3", {"bad_words_ids": [[1, -3]]}),
    ):
        with pytest.raises(UserError, match=words) as caught:
            bundle_sampling(*configured(CONFIG), **options)
        assert "generation_config" not in caught.value.problem
    with pytest.raises(UserError, match="temperature"):
        bundle_sampling(*configured(CONFIG), temperature=10**400)
    given, _ = bundle_sampling(*configured({"top_k": "all"}), temperature=1, top_k=3)
    assert given.top_k == 3
    with pytest.raises(UserError, match=r"generation_config.json has a value .*top_k is 'all'"):
        bundle_sampling(*configured({"top_k": "all"}), temperature=1)


def test_a_damaged_config_is_not_read(configured):
    folder, manifest = configured(CONFIG)
    (folder / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"generation_config.json is damaged"):
        bundle_sampling(folder, manifest)
