"""The four functions of ``import shadowllm`` on tiny bundles."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import shadowllm
from shadowllm.bundle.manifest import read_manifest
from shadowllm.cli import main
from shadowllm.config import Calibration, Target
from shadowllm.evaluation.quality import Result
from shadowllm.evaluation.tuning import tune
from shadowllm.runtime import open_session, open_slots
from shadowllm.runtime.model import Model

QUICK = Calibration(tokens=512, seqlen=32)


@pytest.fixture(scope="module")
def model(bundle):
    with shadowllm.load(bundle()) as opened:
        yield opened


def run_command(capsys, folder, *options) -> dict:
    capsys.readouterr()
    assert main(["run", str(folder), "--prompt", "Hello", "--max-new-tokens", "8", "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)["results"][0]


class TestImport:
    def test_it_is_instant(self):
        code = "import shadowllm, sys; print(sorted({'torch', 'onnxruntime', 'numpy'} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "[]\n"

    def test_names(self):
        assert dir(shadowllm) == sorted(shadowllm.__all__)
        assert all(getattr(shadowllm, name).__doc__ for name in shadowllm.__all__)
        with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
            _ = shadowllm.nonsense

    def test_one_version(self):
        project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
        assert shadowllm.__version__ == project["version"]

    def test_no_room_imports_the_package_itself(self):
        root = Path(__file__).parents[2]
        rooms = ("models", "bundle", "plugins", "predictor", "exporter", "runtime", "evaluation")
        files = [path for room in rooms for path in (root / room).rglob("*.py")]
        own = re.compile(rf"^ *(import shadowllm$|from shadowllm import .*\b({'|'.join(shadowllm.__all__)})\b)", re.M)
        assert files
        assert [str(path) for path in files if own.search(path.read_text())] == []


@pytest.mark.usefixtures("quick_exports")
class TestExport:
    def test_relu_needs_no_budget(self, checkpoint, tmp_path, capsys):
        """The other options that a lossless bundle cannot have are refused before any work is done."""
        model, out = checkpoint("llama-relu"), tmp_path / "out"
        for options, words in (
            ({"budget": shadowllm.Budget(neurons=0.5)}, "computes every neuron that fires"),
            ({"target": Target(speedup=1.2)}, "a target chooses budgets"),
            ({"rest": "shadow"}, "leave out --rest shadow"),
        ):
            with pytest.raises(shadowllm.UserError, match=words):
                shadowllm.export(model, out, selector="relu", **options)
        with pytest.raises(shadowllm.UserError, match="the model has silu"):
            shadowllm.export(checkpoint("llama-gqa"), out, selector="relu")
        made = shadowllm.export(model, out, selector="relu", calibration=QUICK)
        assert (made.budget, made.rest) == (shadowllm.Budget(), "drop")
        assert all(0.2 < share < 0.8 for share in made.predictor["fired"])
        assert made.validation["selection_agreement"] == 1
        found = run_command(capsys, out)
        assert found["decodes"] == "sparse"
        assert all(0.2 < share < 0.8 for share in found["fired"])
        with pytest.raises(shadowllm.UserError, match="no budget to tune"):
            tune(out, Target(speedup=1.2))
        results = shadowllm.evaluate(out, tokens=64, seqlen=32, heads=[1.0, 0.5])
        assert results[1].perplexity == pytest.approx(results[0].perplexity, rel=1e-5)
        assert results[2].perplexity != pytest.approx(results[0].perplexity, rel=1e-3)

    def test_an_activation_that_the_file_does_not_say(self, checkpoint, tmp_path):
        options = {"activation": "fatrelu", "activation_threshold": 0.05, "selector": "relu", "calibration": QUICK}
        with pytest.warns(UserWarning, match="'fatrelu' is used instead"):
            made = shadowllm.export(checkpoint("llama-relu"), tmp_path / "out", **options)
        assert (made.spec.activation, made.spec.activation_threshold) == ("fatrelu", 0.05)
        assert made.validation["transformers"] == {"skipped": "transformers has no activation 'fatrelu'"}
        assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_act_param"] == 0.05

    def test_makes_a_bundle(self, checkpoint, tmp_path):
        budget = shadowllm.Budget(neurons=0.5)
        made = shadowllm.export(
            checkpoint("llama-gqa"), tmp_path / "out", budget=budget, selector="static", calibration=QUICK
        )
        assert made.budget == read_manifest(tmp_path / "out").budget == budget
        assert made.validation
        assert made.predictor["kind"] == "static"

    def test_takes_a_predictor_by_its_file(self, checkpoint, bundle, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        made = shadowllm.export(
            str(checkpoint("llama-gqa")),
            "~/out",
            predictor=bundle() / "predictor.safetensors",
            dtype="fp16",
            head_unit="kv_group",
            validate=False,
        )
        assert (made.dtype, made.spec.head_unit, made.validation) == ("float16", "kv_group", {})
        assert (made.rest, made.allocation["target"]) == ("shadow", {"ppl_increase": 0.05})
        assert made.allocation["measured"]["ppl_increase"] <= 0.05

    def test_mistakes(self, checkpoint, bundle, tmp_path):
        with pytest.raises(shadowllm.UserError, match="exists already"):
            shadowllm.export(checkpoint("llama-gqa"), bundle())
        with pytest.raises(shadowllm.UserError):
            shadowllm.export(tmp_path / "absent", tmp_path / "out")
        with pytest.raises(shadowllm.UserError, match="a target that chooses one; leave out one of them"):
            shadowllm.export("model", tmp_path / "out", budget=shadowllm.Budget(), target=Target(speedup=2))
        with pytest.raises(shadowllm.UserError, match=r"the budget is 0\.5; give a Budget"):
            shadowllm.export("model", tmp_path / "out", budget=0.5)
        for name in ("overwrite", "validate", "trust_remote_code"):
            with pytest.raises(shadowllm.UserError, match=f"{name} is 'no'"):
                shadowllm.export("model", tmp_path / "out", **{name: "no"})

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"selector": "oracle"}, "selector 'oracle' is not supported; use one of shadow, layerwise"),
            ({"head_unit": "head"}, "head_unit 'head' is not supported; use one of query_head, kv_group"),
            ({"rest": ["drop"]}, r"rest \['drop'\] is not supported; use one of shadow, drop"),
            ({"dtype": "fp8"}, "dtype 'fp8' is not supported; use one of fp32, fp16"),
            ({"dtype": None}, "dtype None is not supported"),
            ({"weight_dtype": "int2"}, "weight_dtype 'int2' is not supported; use one of int8, int6, int4"),
            ({"activation": "mish"}, "activation 'mish' is not supported"),
            ({"target": 0.05}, r"the target is 0\.05; give a Target, for example Target\(ppl_increase=0\.02\)"),
            ({"engines": "tensorrt_rtx"}, "engines is 'tensorrt_rtx'; give a list"),
            ({"engines": ["tensorrt_rtx"]}, "an engine is 'tensorrt_rtx'; give an EngineOptions, for example"),
            ({"calibration": "a.txt"}, "the calibration is 'a.txt'; give a Calibration, for example"),
            ({"training": {}}, "the training is {}; give a TrainConfig, for example"),
        ],
        ids=str,
    )
    def test_values_of_another_kind_are_refused_before_the_work(self, tmp_path, options, words):
        with pytest.raises(shadowllm.UserError, match=words):
            shadowllm.export("a model that is not read", tmp_path / "out", **options)


class TestGenerate:
    def test_text_as_the_command_has_it(self, model, bundle, capsys):
        found = run_command(capsys, bundle())
        assert shadowllm.generate(model, "Hello", 8) == found["texts"][0]
        options = ("--temperature", "5", "--top-k", "7", "--seed", "3", "--repetition-penalty", "1.5")
        found = run_command(capsys, bundle(), *options)
        sampled = shadowllm.generate(model, "Hello", 8, temperature=5, top_k=7, seed=3, repetition_penalty=1.5)
        assert sampled == found["texts"][0]

    def test_ids_for_ids(self, model, bundle, capsys):
        ids = model.tokenizer("Hello").input_ids
        assert shadowllm.generate(model, ids, max_new_tokens=8) == run_command(capsys, bundle())["tokens"][0]

    def test_stream(self, model):
        pieces = shadowllm.generate(model, "Hello", 8, stream=True)
        assert isinstance(pieces, Iterator)
        found = list(pieces)
        assert "".join(found) == shadowllm.generate(model, "Hello", 8)
        assert len(found) > 1
        ids = model.tokenizer("Hello").input_ids
        assert list(shadowllm.generate(model, ids, 8, stream=True)) == shadowllm.generate(model, ids, 8)

    @pytest.mark.parametrize(
        ("prompt", "options", "words"),
        [
            ([5], {"top_k": 1.5, "temperature": 1}, "options.top_k is 1.5"),
            ([5], {"temperature": "1"}, "options.temperature is '1'"),
            ([5], {"seed": 1.5}, "options.seed is 1.5"),
            ([5], {"no_repeat_ngram_size": True}, "no_repeat_ngram_size is True"),
            ([5], {"beams": 2}, "beams"),
            ([5], {"stop": 5}, "stop is 5"),
            ([5], {"stop": ["a", 5]}, "no text"),
            ([5], {"lossless": "yes"}, "lossless is 'yes'; give True or False"),
            ([5], {"chat": 0}, "chat is 0"),
            ([5], {"stream": "no"}, "stream is 'no'"),
            (["a"], {}, "not integers"),
            ([5, 6], {"chat": True}, "chat template is for texts, and a prompt is token ids"),
            ([5, 6], {"chat_template": "default"}, "chat template is for texts, and a prompt is token ids"),
            ([[5, 6]], {}, "not integers"),
            (None, {}, "not integers"),
            ((token for token in [5]), {}, "not integers"),
        ],
    )
    def test_options_of_a_wrong_type(self, model, prompt, options, words):
        with pytest.raises(shadowllm.UserError, match=words):
            shadowllm.generate(model, prompt, 2, **options)

    def test_numbers_of_numpy(self, model):
        plain = shadowllm.generate(model, [5], 4, temperature=0.5, top_k=9, seed=3)
        options = {"temperature": np.float32(0.5), "top_k": np.int64(9), "seed": np.int64(3)}
        assert shadowllm.generate(model, np.array([5]), 4, **options) == plain

    def test_one_text_at_a_time(self, model):
        pieces = shadowllm.generate(model, [3, 4], 8, stream=True)
        next(pieces)
        other = shadowllm.generate(model, [5], 8)
        with pytest.raises(shadowllm.UserError, match="another text was begun"):
            next(pieces)
        assert other == shadowllm.generate(model, [5], 8)
        ended = shadowllm.generate(model, [3, 4], 1, stream=True)
        next(ended)
        shadowllm.generate(model, [5], 1)
        assert not list(ended)

    def test_stop_strings(self, model):
        text = shadowllm.generate(model, "Hello", 8)
        assert shadowllm.generate(model, "Hello", 8, stop=text[3]) == text[: text.index(text[3])]
        assert shadowllm.generate(model, "Hello", 8, stop=["never there", text[3]]) == text[: text.index(text[3])]

    def test_budgets_and_backends(self, bundle, capsys):
        everything = shadowllm.Budget()
        with shadowllm.load(bundle(), "torch", budget=everything) as one, shadowllm.load(bundle(), "ort-dense") as two:
            assert one.session.decodes == "sparse"
            assert two.session.decodes == "dense"
            assert shadowllm.generate(one, "Hello", 8) == shadowllm.generate(two, "Hello", 8)
            one.set_budget(shadowllm.Budget(neurons=0.1, heads=0.25))
            narrow = run_command(
                capsys, bundle(), "--backend", "torch", "--neuron-budget", "0.1", "--head-budget", "0.25"
            )
            assert shadowllm.generate(one, "Hello", 8) == narrow["texts"][0]

    def test_mistakes(self, model, bundle, tmp_path):
        with pytest.raises(shadowllm.UserError, match="not open"):
            shadowllm.generate(shadowllm.load(bundle()), "Hello")
        with pytest.raises(shadowllm.UserError):
            shadowllm.load(tmp_path)
        with pytest.raises(shadowllm.UserError, match="no backend"):
            shadowllm.load(bundle(), "abacus")
        with pytest.raises(shadowllm.UserError, match="prepack is 'yes'"):
            shadowllm.load(bundle(), prepack="yes")
        with pytest.raises(shadowllm.UserError, match="threads is '2'; give a whole number"):
            shadowllm.load(bundle(), threads="2")
        with pytest.raises(shadowllm.UserError, match="'all' rows is no number of rows; give a whole number, or None"):
            shadowllm.Budget(shortlist="all")
        with pytest.raises(shadowllm.UserError, match="sparse layers"):
            shadowllm.load(bundle(), budget=shadowllm.Budget(neurons=(0.5,) * 7))
        for budget in (0.5, None, "x"):
            with pytest.raises(shadowllm.UserError, match=r"the budget is .*; give a Budget"):
                model.set_budget(budget)
        for folder in (None, 5, b"bundle"):
            with pytest.raises(shadowllm.UserError, match=r"the bundle is .*, which is no path"):
                shadowllm.load(folder)
        for prompt, options in (
            ("", {}),
            ([], {}),
            ([10**6], {}),
            ("Hello", {"max_new_tokens": 0}),
            ("Hello", {"temperature": -1}),
            ("Hello", {"stop": ""}),
            ("Hello", {"chat": True}),
        ):
            with pytest.raises(shadowllm.UserError):
                shadowllm.generate(model, prompt, **options)


def test_paths_are_text_or_paths_and_may_begin_at_home(bundle, monkeypatch):
    folder = bundle()
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in (folder, str(folder), f"~/{folder.name}"):
        assert read_manifest(path) == read_manifest(folder)
        for backend in ("ort", "torch"):
            assert open_session(path, backend) is not None
            assert open_slots(path, backend, 1) is not None
        assert Model(path).bundle == shadowllm.load(path).bundle == folder


def test_lossless_text_is_that_of_dense(bundle):
    folder = bundle("llama-gqa", kind="quantized-shadow", rest="shadow")
    with shadowllm.load(folder, "ort-dense", threads=1) as dense:
        expected = shadowllm.generate(dense, "Hello", 16)
    budget = shadowllm.Budget(neurons=0.6, heads=0.75, rest="drop")
    with shadowllm.load(folder, threads=1, budget=budget, prepack=True) as model:
        assert shadowllm.generate(model, "Hello", 16, lossless=True) == expected
        streamed = shadowllm.generate(model, "Hello", 16, lossless=True, draft_length=3, stream=True)
        assert "".join(streamed) == expected


class TestEvaluate:
    def test_results_as_the_command_has_them(self, bundle, tmp_path, capsys):
        found = shadowllm.evaluate(
            bundle(), [__file__], tokens=64, seqlen=32, selectors=("static", "oracle"), neurons=(0.5, 1.0), heads=(1.0,)
        )
        assert all(isinstance(result, Result) for result in found)
        assert [result.selector for result in found] == ["dense", "static", "static", "oracle", "oracle"]
        options = ["--selector", "static", "oracle", "--neuron-budget", "0.5", "1", "--head-budget", "1"]
        report = tmp_path / "eval.json"
        text = ["--text", __file__, "--tokens", "64", "--seqlen", "32", "--json", str(report)]
        assert main(["eval", str(bundle()), *text, *options]) == 0
        rows = json.loads(report.read_text())["results"]
        assert [row["perplexity"] for row in rows] == [result.perplexity for result in found[1:]]

    def test_mistakes(self, bundle, tmp_path):
        for folder, options in (
            (tmp_path, {}),
            (bundle(), {"texts": ["absent.txt"]}),
            (bundle(), {"selectors": ["magic"], "tokens": 64, "seqlen": 32}),
            (bundle(), {"tokens": 8}),
            (bundle(), {"seqlen": 1}),
        ):
            with pytest.raises(shadowllm.UserError):
                shadowllm.evaluate(folder, **options)
