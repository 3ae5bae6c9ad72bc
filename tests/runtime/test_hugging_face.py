"""A bundle behind the interface of transformers writes what the checkpoint writes there."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessorList, MinPLogitsWarper, TextStreamer, pipeline

import shadowllm
from shadowllm import Budget, ShadowForCausalLM, UserError
from shadowllm.runtime.torch_session import TorchSession
from tests.bundles import BUDGET

PROMPTS = ["The sea", "A shadow of a model", "x"]
TOKENS = torch.tensor([[5, 6, 7]])
VARIANT = "llama-gqa"
OTHER_FAMILIES = ["opt", "qwen2", "qwen3", "gemma", "gemma3", "mistral"]
DENSE = [(VARIANT, "ort-dense"), (VARIANT, "torch-dense"), *((family, "ort-dense") for family in OTHER_FAMILIES)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=DENSE, ids="-".join)
def pair(request, bundle, checkpoint):
    """A dense bundle, and its checkpoint in transformers."""
    variant, backend = request.param
    with ShadowForCausalLM.from_pretrained(bundle(variant), backend) as model:
        yield model, AutoModelForCausalLM.from_pretrained(checkpoint(variant), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def dense(pair):
    return pair[0]


@pytest.fixture(scope="module")
def reference(pair):
    return pair[1]


@pytest.fixture(scope="module")
def sparse(bundle):
    with ShadowForCausalLM.from_pretrained(bundle(VARIANT), "ort") as model:
        yield model


def padded(model):
    """Uneven prompts, padded on the left."""
    tokenizer = model.tokenizer
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    return tokenizer(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 1, "min_length": 30},
        {"logits_processor": LogitsProcessorList([MinPLogitsWarper(0.2)])},
    ],
    ids=["greedy", "penalty", "ngrams", "length", "min-p"],
)
def test_generates_what_transformers_generates(options, dense, reference):
    inputs = padded(dense)
    ours, theirs = (
        model.generate(**inputs, max_new_tokens=24, pad_token_id=2, **options) for model in (dense, reference)
    )
    assert torch.equal(ours, theirs)


def test_samples_what_transformers_samples(dense, reference):
    found = []
    for model in (dense, reference):
        torch.manual_seed(5)
        options = {"do_sample": True, "min_p": 0.02, "temperature": 0.7, "num_return_sequences": 2}
        found.append(model.generate(**padded(dense), max_new_tokens=12, pad_token_id=2, **options))
    assert found[0].shape[0] == 2 * len(PROMPTS)
    assert torch.equal(*found)


def test_stop_strings_end_the_text(dense, reference):
    inputs, tokenizer = padded(dense), dense.tokenizer
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "pad_token_id": 0}
    whole = reference.generate(**inputs, **options)
    stop = tokenizer.decode(whole[0, -8:-6])
    options |= {"stop_strings": [stop], "tokenizer": tokenizer}
    ours, theirs = (model.generate(**inputs, **options) for model in (dense, reference))
    assert torch.equal(ours, theirs)
    assert ours[0, whole.shape[1] - 6 :].eq(0).all()
    assert whole[0, -1] != 0


def test_a_pipeline_and_a_streamer(dense, reference, capsys, caplog):
    generator = pipeline("text-generation", model=dense, tokenizer=dense.tokenizer)
    streamer = TextStreamer(dense.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"pad_token_id": 2, "do_sample": False}  # pipelines sample by default
    (found,) = generator("The sea", max_new_tokens=10, return_full_text=False, streamer=streamer, **options)
    expected = pipeline("text-generation", model=reference, tokenizer=dense.tokenizer)
    (text,) = expected("The sea", max_new_tokens=10, return_full_text=False, **options)
    assert found["generated_text"] == text["generated_text"]
    assert "not supported" not in caplog.text
    assert text["generated_text"] in capsys.readouterr().out


def test_a_pipeline_with_a_batch(dense, reference):
    padded(dense)  # its tokenizer pads from now on
    options = {"batch_size": 2, "max_new_tokens": 8, "pad_token_id": 2, "do_sample": False}
    ours, theirs = (
        pipeline("text-generation", model=model, tokenizer=dense.tokenizer)(PROMPTS, **options)
        for model in (dense, reference)
    )
    assert ours == theirs


def test_logits_of_every_token_with_and_without_padding(dense, reference):
    inputs = padded(dense)
    ours, theirs = dense(**inputs).logits, reference(**inputs).logits
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[kept], theirs[kept], atol=1e-4, rtol=1e-4)


def test_a_mask_of_one_row_is_that_of_all(dense):
    tokens, mask = torch.tensor([[5, 6, 7], [9, 10, 11]]), torch.tensor([[1, 0, 1]])
    assert torch.equal(dense(tokens, attention_mask=mask).logits, dense(tokens, mask.expand(2, 3)).logits)


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        ([[5, 6, 7], [9, 10, 11]], {"attention_mask": torch.ones(2, 2)}, "mask of shape"),
        ([[5, 6, 7], [9, 10, 11]], {"attention_mask": torch.ones(2, 4)}, "mask of shape"),
        ([[5, 6, 7], [9, 10, 11]], {"attention_mask": torch.ones(3, 3)}, "mask of shape"),
        ([[5, 6, 7]], {"attention_mask": torch.ones(3)}, "mask of shape"),
        ([[5, 6, 7]], {"logits_to_keep": torch.tensor([0])}, "logits_to_keep"),
        ([[]], {}, "the prompt is empty"),
        ([5, 6], {}, r"the tokens have the shape \(2,\)"),
    ],
)
def test_calls_that_are_refused(dense, tokens, options, words):
    with pytest.raises(UserError, match=words):
        dense(torch.tensor(tokens, dtype=torch.int64), **options)


def test_other_arguments_of_forward_are_refused_by_name(dense):
    with pytest.raises(UserError, match="does not take labels, position_ids"):
        dense(TOKENS, labels=TOKENS, position_ids=TOKENS, use_cache=None)


def test_only_a_model_of_pytorch_keeps_its_threads(dense):
    found = []

    def asked(input_ids, scores):
        found.append(torch.get_num_threads())
        return scores

    torch.set_num_threads(2)  # `one_thread` restores the number
    dense.generate(TOKENS, max_new_tokens=1, pad_token_id=0, logits_processor=[asked])
    assert found == [2 if isinstance(dense._model.session, TorchSession) else 1]


@pytest.mark.parametrize(
    "inner",
    [
        lambda model, options: model.generate(TOKENS, **options),
        lambda model, _: model(TOKENS),
        lambda model, _: model(TOKENS, logits_to_keep=1),
        lambda model, _: model(TOKENS, continues=True),
    ],
    ids=["generate", "score", "prompt", "step"],
)
def test_a_text_inside_another_is_refused_and_the_model_still_works(inner, dense):
    """There is one cache, so the second text would change the first."""
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    expected = dense.generate(TOKENS, **options)

    def nested(input_ids, scores):
        inner(dense, options)

    with pytest.raises(UserError, match="generates another text; wait for its end"):
        dense.generate(TOKENS, **options, logits_processor=[nested])
    torch.testing.assert_close(dense.generate(TOKENS, **options), expected)


def test_sparse_text_is_that_of_our_own_generation(sparse, bundle):
    inputs = sparse.tokenizer(PROMPTS[1], return_tensors="pt", return_token_type_ids=False)
    prompt = inputs["input_ids"][0].tolist()
    with shadowllm.load(bundle(VARIANT), budget=BUDGET) as model:
        expected = shadowllm.generate(model, prompt, max_new_tokens=20)
    written = sparse.generate(**inputs, max_new_tokens=20, pad_token_id=2)
    assert written[0, len(prompt) :].tolist() == expected


def test_a_budget_of_one_call_does_not_stay(sparse):
    inputs = sparse.tokenizer(PROMPTS[1], return_tensors="pt", return_token_type_ids=False)
    options = {"max_new_tokens": 20, "pad_token_id": 2, "output_logits": True, "return_dict_in_generate": True}
    before, once, after = (
        sparse.generate(**inputs, budget=budget, **options).logits[1]
        for budget in (None, Budget(neurons=0.1, heads=0.25), None)
    )
    assert not torch.equal(before, once)
    assert torch.equal(before, after)
    assert sparse.budget == BUDGET


def test_a_text_ends_with_the_positions_of_the_model(sparse, bundle):
    inputs = sparse.tokenizer(PROMPTS[1], return_tensors="pt", return_token_type_ids=False)
    with shadowllm.load(bundle(VARIANT), budget=BUDGET) as model:
        expected = shadowllm.generate(model, inputs["input_ids"][0].tolist(), max_new_tokens=80)
    written = sparse.generate(**inputs, max_new_tokens=80, pad_token_id=2)[0]
    assert written[inputs["input_ids"].shape[1] :].tolist() == expected
    assert len(written) == sparse.config.max_position_embeddings + 1


def test_a_sparse_bundle_drafts_for_a_model_of_transformers(sparse, checkpoint):
    inputs = sparse.tokenizer(PROMPTS[1], return_tensors="pt", return_token_type_ids=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint(VARIANT), dtype=torch.float32)
    options = {"max_new_tokens": 12, "pad_token_id": 2}
    assert torch.equal(model.generate(**inputs, **options, assistant_model=sparse), model.generate(**inputs, **options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "beam_search"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"prompt_lookup_num_tokens": 2}, "assisted_generation"),
        ({"assistant_model": object()}, "assisted_generation"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "paged"}, "paged"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"prefill_chunk_size": 2}, "prefill_chunk_size"),
        ({"output_attentions": True, "output_hidden_states": True}, "output_attentions, output_hidden_states"),
        ({"position_ids": torch.tensor([[1, 2, 3]])}, "position_ids"),
        ({"continues": True}, "continues"),
        ({"attention_mask": torch.tensor([[1, 1, 0]])}, "last token"),
    ],
)
def test_refuses_what_a_session_cannot_do(options, said, sparse):
    with pytest.raises(UserError, match=said):
        sparse.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, pad_token_id=2, **options)


def test_positions_that_count_the_tokens_of_each_row_are_accepted(dense):
    inputs = padded(dense)
    positions = inputs["attention_mask"].cumsum(dim=-1) - 1
    given, own = (dense.generate(**inputs, **more, max_new_tokens=4) for more in ({"position_ids": positions}, {}))
    assert torch.equal(given, own)


@pytest.mark.parametrize("pair", DENSE[:2], indirect=True, ids="-".join)
def test_the_harness_scores_and_generates_as_with_transformers(dense, reference):
    """lm-evaluation-harness pads on the right to score, and on the left to generate."""
    harness = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    from lm_eval.api.instance import Instance

    found = []
    for model in (dense, reference):
        lm = harness.HFLM(pretrained=model, tokenizer=dense.tokenizer, batch_size=2, max_length=64, device="cpu")
        texts = [("The sea", " is wide"), ("A", " shadow of a model")]
        asked = [Instance("loglikelihood", {}, pair, row) for row, pair in enumerate(texts)]
        likelihoods = [score for score, _ in lm.loglikelihood(asked, disable_tqdm=True)]
        options = {"until": ["zz"], "max_gen_toks": 8}
        asked = [Instance("generate_until", {}, (text, options), row) for row, (text, _) in enumerate(texts)]
        found.append((likelihoods, lm.generate_until(asked, disable_tqdm=True)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-3)
    assert found[0][1] == found[1][1]
