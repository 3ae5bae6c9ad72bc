"""Compares the lm-evaluation-harness adapter, on tasks of a few lines, with likelihoods computed by hand."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'shadowllm[lm-eval]')")

from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.weights import read_weights
from shadowllm.cli import main
from shadowllm.errors import UserError
from shadowllm.evaluation import lm_tasks
from shadowllm.evaluation.lm_tasks import BundleLM
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparsity import Budget
from shadowllm.predictor.selectors import Context, MaskedDecoder, make_selector
from shadowllm.runtime import Sampling, generate, open_session
from shadowllm.runtime.generation.text import load_tokenizer
from tests.tokenizers import KINDS, export

TASKS = {
    "pick": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "read": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
}
DOCS = [
    {"question": "The sun is", "choices": [" hot", " cold"], "answer": 0, "text": "Shadows are long at noon. " * 4},
    {"question": "Two and two", "choices": [" five", " four"], "answer": 1, "text": "A short one."},
]


def request(*arguments):
    return Instance("loglikelihood", {}, arguments, 0)


def decoders(folder):
    """Dense and masked likelihoods, as the adapter should return them."""
    manifest = read_manifest(folder)
    read = read_weights(folder, manifest)
    context = Context(manifest.spec, read.sparse, predictor=read.predictor)
    masked = MaskedDecoder(context, make_selector("quantized-shadow", context), Budget(heads=0.5, neurons=0.3))
    return {"dense": Decoder(manifest.spec, read.dense), "quantized-shadow": masked}


@pytest.fixture(scope="module")
def folder(bundle):
    return bundle("llama-blocks", kind="quantized-shadow")


@pytest.mark.parametrize("selector", ["dense", "quantized-shadow"])
def test_likelihoods_by_hand(folder, selector):
    lm = BundleLM(folder, selector, Budget(heads=0.5, neurons=0.3))
    tokenizer = load_tokenizer(folder, read_manifest(folder))
    whole, context = (tokenizer(text).input_ids for text in ("The sun is hot", "The sun is"))
    with torch.no_grad():
        logits = decoders(folder)[selector](torch.tensor([whole]))[0].log_softmax(dim=-1)
    steps = range(len(context), len(whole))
    expected = sum(float(logits[i - 1, whole[i]]) for i in steps)
    greedy = all(int(logits[i - 1].argmax()) == whole[i] for i in steps)
    ((found, likeliest),) = lm.loglikelihood([request("The sun is ", "hot")])  # a trailing space joins what follows
    assert found == pytest.approx(expected, rel=1e-5)
    assert likeliest == greedy


def test_samples_of_a_task_differ_and_follow_its_options(folder):
    """A task may ask for several samples of the same text."""
    options = {"do_sample": True, "temperature": 5.0, "top_k": 3, "max_gen_toks": 12}
    requests = [Instance("generate_until", {}, ("The sun is", dict(options)), 0) for _ in range(3)]
    found = BundleLM(folder, "dense").generate_until(requests)
    assert len(set(found)) == 3
    assert found == BundleLM(folder, "dense").generate_until(requests)
    one = [Instance("generate_until", {}, ("The sun is", options | {"top_k": 1}), 0) for _ in range(2)]
    assert len(set(BundleLM(folder, "dense").generate_until(one))) == 1


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, Sampling()),
        ({"temperature": 0.0, "repetition_penalty": "1.5"}, Sampling(temperature=0.0, repetition_penalty=1.5)),
        ({"temperature": "2", "top_p": 0.5}, Sampling(temperature=2.0, top_p=0.5)),
        ({"temperature": 2, "do_sample": False}, Sampling()),
        ({"temperature": 2, "min_p": "1e-5", "do_sample": True}, Sampling(temperature=2.0, min_p=1e-5)),
    ],
    ids=str,
)
def test_the_options_of_a_task_mean_what_they_mean_to_the_harness(folder, monkeypatch, said, expected):
    given = []

    def no_text(session, prompts, most, sampling, stops):
        given.append((most, sampling))
        return iter(())

    monkeypatch.setattr(lm_tasks, "generate", no_text)
    options = {"until": "x", "max_new_tokens": 7, **said}
    BundleLM(folder, "dense").generate_until([Instance("generate_until", {}, ("The sun is", options), 0)])
    assert given == [(7, expected)]


def test_a_selector_is_checked_before_the_first_task_runs(folder, monkeypatch):
    monkeypatch.setattr(lm_tasks, "simple_evaluate", lambda *_, **__: pytest.fail("a task ran"))
    with pytest.raises(UserError, match="quantised-shadow"):
        list(lm_tasks.run_tasks(folder, ["x"], [("quantised-shadow", Budget())]))


def test_a_long_text_is_read_in_windows(folder):
    lm = BundleLM(folder, "dense")
    text = DOCS[0]["text"]  # 104 tokens, 64 positions
    tokens = lm.tok_encode(text)
    decoder = decoders(folder)["dense"]
    parts = [([1, *tokens[:63]], tokens[:64]), (tokens[39:103], tokens[64:])]
    with torch.no_grad():
        expected = sum(
            float(decoder(torch.tensor([seen]))[0].log_softmax(-1)[range(-len(said), 0), said].sum())
            for seen, said in parts
        )
    assert lm.loglikelihood_rolling([request(text)]) == [pytest.approx(expected, rel=1e-5)]


def test_generation_is_the_sessions_and_stops(folder):
    options = {"until": ["~"], "max_gen_toks": 12}
    lm = BundleLM(folder, None, Budget(heads=0.5, neurons=0.3))
    (found,) = lm.generate_until([request("Hello", options)])
    with open_session(folder, "ort") as session:
        session.set_budget(Budget(heads=0.5, neurons=0.3))
        steps = generate(session, [lm.tok_encode("Hello")], 12, stop_ids=session.spec.eos_token_ids)
        written = load_tokenizer(folder, read_manifest(folder)).decode([token for (token,) in steps])
    assert found == written.split("~")[0]
    stop = written[3]
    (cut,) = lm.generate_until([request("Hello", options | {"until": stop})])
    assert cut == written.split(stop)[0]
    with pytest.raises(UserError, match="oracle selector does not generate"):
        BundleLM(folder, "oracle").generate_until([request("Hello", options)])


def test_command(folder, tmp_path, capsys):
    (tmp_path / "docs.json").write_text("\n".join(map(json.dumps, DOCS)))
    files = {"data_files": {"test": str(tmp_path / "docs.json")}}
    names = []
    for name, task in TASKS.items():
        whole = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"} | task
        (tmp_path / f"{name}.yaml").write_text(json.dumps(whole))  # JSON is YAML
        names.append(str(tmp_path / f"{name}.yaml"))
    out = tmp_path / "tasks.json"
    assert (
        main(["eval", str(folder), "--tasks", *names, "--neuron-budget", "1", "--head-budget", "1", "--json", str(out)])
        == 0
    )
    rows = json.loads(out.read_text())["tasks"]
    assert [(row["selector"], row["task"]) for row in rows] == [
        (selector, task) for selector in ("dense", "quantized-shadow") for task in TASKS
    ]
    lm = BundleLM(folder, "dense")
    right = 0
    for doc in DOCS:
        found = [
            likelihood for likelihood, _ in lm.loglikelihood([request(doc["question"], c) for c in doc["choices"]])
        ]
        right += found.index(max(found)) == doc["answer"]
    for row in rows[::2]:  # everything kept is dense
        assert row["metrics"]["acc"] == right / 2
    assert rows[1]["metrics"]["bits_per_byte"] == pytest.approx(rows[3]["metrics"]["bits_per_byte"])
    capsys.readouterr()
    assert main(["eval", str(folder), "--tasks", "no_such_task"]) == 1
    assert "cannot run no_such_task" in capsys.readouterr().err


@pytest.fixture(scope="module", params=["llama3", "llama2"])
def beside_the_harness(request, tmp_path_factory):
    """A bundle's dense model, and its checkpoint in the harness's own model class."""
    from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

    tmp = tmp_path_factory.mktemp(request.param)
    bundle = export(KINDS[request.param](), tmp)
    theirs = HFLM(pretrained=str(tmp / "model"), device="cpu", batch_size=1, dtype="float32")
    return BundleLM(bundle, "dense"), theirs


def test_likelihoods_are_the_harness_own(beside_the_harness):
    """BOS is where the harness puts it: once before a context, and alone if there is no context."""
    ours, theirs = beside_the_harness
    bos = theirs.tokenizer.bos_token
    pairs = [("the sea is", " small"), ("the sea ", "of"), ("", "the shadow"), (f"{bos}the sea", " é"), (" a", " 日")]
    found = [lm.loglikelihood([request(*pair) for pair in pairs]) for lm in (ours, theirs)]
    for (mine, likeliest), (right, is_likeliest) in zip(*found, strict=True):
        assert mine == pytest.approx(right, rel=1e-4)
        assert likeliest == is_likeliest
    texts = ["the sea", "the shadow of a model is small; " * 12]
    rolling = [lm.loglikelihood_rolling([request(text) for text in texts]) for lm in (ours, theirs)]
    assert rolling[0] == pytest.approx(rolling[1], rel=1e-4)
    for text in (*texts, f"{bos}x"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)


def test_generated_text_is_the_harness_own(beside_the_harness):
    ours, theirs = beside_the_harness
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    assert ours.generate_until([request("the sea", options)]) == theirs.generate_until([request("the sea", options)])
