"""The server, with OpenAI's own client over a real connection."""

from __future__ import annotations

import json
import queue
import threading
import urllib.error
from pathlib import Path

import numpy as np
import pytest

from shadowllm.errors import UserError
from shadowllm.evaluation.speed.traffic import traffic_of
from shadowllm.models.sparsity import Budget
from shadowllm.runtime import open_session
from shadowllm.runtime.generation.completion import Completion, make_request
from shadowllm.runtime.generation.text import encode_chat, load_tokenizer
from shadowllm.runtime.torch_slots import TorchSlots
from shadowllm.serve.schema import Message
from shadowllm.serve_config import ServeConfig
from tests.runtime.serving.paused_slots import PausedSlots
from tests.shadowllm.serve.conftest import TEMPLATE, record_of, running

openai = pytest.importorskip("openai", reason="the official client is not installed (pip install openai)")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def client(server):
    return server.client()


@pytest.fixture(scope="module")
def alone(bundle):
    """A function that returns what `shadowllm run` generates."""
    from shadowllm.bundle.manifest import read_manifest

    folder = bundle()
    manifest = read_manifest(folder)
    tokenizer = load_tokenizer(folder, manifest)

    def generate(prompt, n, budget=None, **options):
        request = make_request(folder, manifest, lambda: tokenizer, [prompt], n, **options)
        with open_session(folder, "torch") as session:
            session.set_budget(budget or manifest.budget)
            completion = Completion(request)
            for _ in completion.grow(session):
                pass
        return completion.texts[0] if isinstance(prompt, str) else tokenizer.decode(completion.tokens[0])

    def chat(messages, n):
        chatting = load_tokenizer(folder, manifest)
        chatting.chat_template = TEMPLATE
        return generate(encode_chat(folder, manifest, chatting, messages), n)

    generate.chat = chat
    return generate


class TestTexts:
    def test_a_completion(self, client, alone, server):
        found = client.completions.create(model="tiny", prompt="Hello", max_tokens=7)
        assert found.choices[0].text == alone("Hello", 7)
        assert found.object == "text_completion"
        assert found.usage.prompt_tokens == 5
        assert found.usage.total_tokens == 5 + found.usage.completion_tokens
        assert server.is_idle()

    def test_budget_and_seed_are_those_of_the_request(self, client, alone):
        options = {"temperature": 1.2, "top_p": 0.95, "seed": 5}
        for given, budget in (
            ({"neurons": 0.2, "heads": [0.25, 0.5]}, Budget(neurons=0.2, heads=(0.25, 0.5))),
            ("exact", Budget()),
        ):
            found = client.completions.create(
                model="tiny", prompt="Once", max_tokens=20, extra_body={"sparsity": given, "top_k": 30}, **options
            )
            assert found.choices[0].text == alone("Once", 20, budget, top_k=30, **options)

    def test_several_prompts_and_texts(self, client, alone):
        found = client.completions.create(
            model="tiny", prompt=["One", "Two"], n=2, max_tokens=6, temperature=1.0, seed=3
        )
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        texts = [alone(prompt, 6, temperature=1.0, seed=seed) for prompt in ("One", "Two") for seed in (3, 4)]
        assert [choice.text for choice in found.choices] == texts
        assert found.usage.prompt_tokens == 6

    def test_token_ids_and_stop_strings(self, client, alone):
        ids = [40, 50, 60]
        whole = alone(ids, 12)
        found = client.completions.create(model="tiny", prompt=ids, max_tokens=12, stop=whole[3:5])
        assert found.choices[0].text == whole[: whole.index(whole[3:5])]
        assert found.choices[0].finish_reason == "stop"

    def test_a_stream_is_the_whole_text(self, client, alone):
        stream = client.completions.create(
            model="tiny", prompt="Hello", max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == alone("Hello", 9)
        assert chunks[-1].choices == []
        assert chunks[-1].usage.prompt_tokens == 5
        assert [chunk.model_dump(exclude_unset=True)["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        plain = list(client.completions.create(model="tiny", prompt="Hello", max_tokens=9, stream=True))
        assert not any("usage" in chunk.model_fields_set for chunk in plain)
        assert chunks[-2].choices[0].finish_reason in ("stop", "length")

    def test_a_chat(self, client, alone):
        messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
        expected = alone.chat(messages, 8)
        found = client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=8)
        assert (found.choices[0].message.role, found.choices[0].message.content) == ("assistant", expected)
        parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        stream = client.chat.completions.create(model="tiny", messages=messages[:1] + parts, max_tokens=8, stream=True)
        chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected

    def test_a_chat_goes_on_with_the_message_of_an_answer(self, client, alone):
        first = [{"role": "user", "content": "Hi"}]
        answer = client.chat.completions.create(model="tiny", messages=first, max_tokens=4).choices[0].message
        plain = [*first, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "So"}]
        for sent in (answer, answer.model_dump() | {"tool_calls": []}):
            messages = [*first, sent, {"role": "user", "content": "So"}]
            found = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
            assert found.choices[0].message.content == alone.chat(plain, 4)
        called = plain[1] | {"tool_calls": [{"id": "1"}]}
        with pytest.raises(openai.BadRequestError, match="tool_calls"):
            client.chat.completions.create(model="tiny", messages=[*first, called], max_tokens=4)

    def test_two_limits_that_differ(self, client):
        messages = [{"role": "user", "content": "Hi"}]
        with pytest.raises(openai.BadRequestError, match="max_completion_tokens and max_tokens differ"):
            client.chat.completions.create(model="tiny", messages=messages, max_tokens=3, max_completion_tokens=4)
        with pytest.raises(openai.BadRequestError, match="at most 1024") as error:
            client.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=5000)
        assert error.value.param == "max_completion_tokens"

    def test_log_probabilities(self, client):
        found = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], max_tokens=3, logprobs=True, top_logprobs=2
        )
        for entry in found.choices[0].logprobs.content:
            assert entry.top_logprobs[0].token == entry.token  # it is greedy
            assert entry.top_logprobs[0].logprob == entry.logprob >= entry.top_logprobs[1].logprob
            assert bytes(entry.bytes).decode() == entry.token
        found = client.completions.create(model="tiny", prompt="Hello", max_tokens=3, logprobs=2)
        logprobs = found.choices[0].logprobs
        assert [len(top) for top in logprobs.top_logprobs] == [2] * 3  # it is greedy, so the token is the first one
        assert "".join(logprobs.tokens) == found.choices[0].text
        assert [max(top.values()) for top in logprobs.top_logprobs] == logprobs.token_logprobs
        assert logprobs.text_offset == [0, 1, 2]
        chunks = client.completions.create(model="tiny", prompt="Hello", max_tokens=3, logprobs=2, stream=True)
        offsets = [each.choices[0].logprobs.text_offset for each in chunks if each.choices[0].logprobs]
        assert offsets == [[0], [1], [2]]

    def test_the_sampled_token_is_always_among_the_most_probable(self, client):
        options = {"max_tokens": 20, "temperature": 5.0, "seed": 1}
        for wanted in (0, 2):
            found = client.completions.create(model="tiny", prompt="Hello", logprobs=wanted, **options).choices[0]
            sizes = set()
            for token, logprob, top in zip(
                found.logprobs.tokens, found.logprobs.token_logprobs, found.logprobs.top_logprobs, strict=True
            ):
                assert top[token] == logprob
                assert list(top.values()) == sorted(top.values(), reverse=True)
                sizes.add(len(top))
            assert sizes <= {wanted, wanted + 1}
            assert wanted + 1 in sizes  # it is hot enough to take other tokens

    def test_selections_in_a_stream(self, client):
        body = {"sparsity": {"neurons": 0.25, "heads": 0.5}, "shadowllm": {"selection": True}}
        stream = client.completions.create(model="tiny", prompt="Hello", max_tokens=3, stream=True, extra_body=body)
        found = [chunk.shadowllm for chunk in stream if getattr(chunk, "shadowllm", None)]
        assert found[0]["selection"] is None  # from the prompt, which is dense
        assert found[1]["selection"]["neurons"] == [22, 22]
        assert [layer.count("1") for layer in found[1]["selection"]["heads"]] == [2, 2]


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "words", "param"),
        [
            ({"temperature": -1.0}, "temperature -1.0 cannot be used", "temperature"),
            ({"max_tokens": 0}, "greater than or equal to 1", "max_tokens"),
            ({"max_tokens": 5000}, "at most 1024 are possible", "max_tokens"),
            ({"prompt": "x" * 65}, "the prompt has 65 tokens, and at most 64", "prompt"),
            ({"prompt": ""}, "the prompt is empty", "prompt"),
            ({"prompt": []}, "the list of prompts is empty", "prompt"),
            ({"prompt": [1, 97]}, "token 97 is outside", "prompt"),
            ({"n": 9}, "more than 8 texts", "n"),
            ({"stop": list("abcde")}, "more than 4 stop strings", "stop"),
            ({"stop": "x" * 200}, "more than 128 characters", "stop"),
            ({"stop": ""}, "a stop string is empty", None),
            ({"presence_penalty": 0.5}, "presence_penalty is not supported", "presence_penalty"),
            ({"extra_body": {"temprature": 1}}, "temprature is not supported", "temprature"),
            ({"extra_body": {"sparsity": {"neurons": 0}}}, "not a fraction in", "sparsity"),
            ({"extra_body": {"sparsity": {"neurons": [0.1, 0.2, 0.3]}}}, "the budget has 3 fractions", "sparsity"),
            ({"extra_body": {"sparsity": {"shortlist": 4}}}, "no low-bit copy", "sparsity"),
            (
                {"extra_body": {"sparsity": {"shortlist": 2**31}}},
                "a shortlist of 2147483648 rows is too large",
                "sparsity",
            ),
            ({"stream_options": {"include_usage": True}}, "stream_options needs stream", "stream_options"),
            ({"extra_body": {"sparsity": {"nerons": 1}}}, "not permitted", "sparsity"),
            ({"extra_body": {"sparsity": "dense"}}, '^.*sparsity: Input should be "exact" or an object', "sparsity"),
            ({"top_p": 2.0}, "top-p 2.0 is not in", "top_p"),
            ({"extra_body": {"min_p": -1}}, "min-p -1.0 is not in", "min_p"),
            ({"extra_body": {"repetition_penalty": 0}}, "penalty 0.0 is not above 0", "repetition_penalty"),
            ({"extra_body": {"draft_length": 3}}, "draft length", "draft_length"),
            ({"prompt": [[]]}, "is empty", "prompt"),
        ],
    )
    def test_a_mistake_is_named(self, client, server, options, words, param):
        with pytest.raises(openai.BadRequestError, match=words) as error:
            client.completions.create(**({"model": "tiny", "prompt": "Hello"} | options))
        assert (error.value.param, error.value.type) == (param, "invalid_request_error")
        assert "Traceback" not in error.value.message
        assert server.is_idle()

    def test_a_chat_that_is_too_long_is_a_mistake_in_its_messages(self, client):
        with pytest.raises(openai.BadRequestError, match="and at most 64 are possible") as error:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 65}])
        assert (error.value.param, error.value.code) == ("messages", "context_length_exceeded")

    def test_a_lossless_text_is_that_of_the_dense_model(self, client, server, alone):
        drafted = server.engine.counters.drafted
        for lossless in ({"lossless": True}, {"lossless": True, "draft_length": 3}):
            options = {"extra_body": lossless | {"sparsity": {"neurons": 0.1}}, "max_tokens": 20}
            found = client.completions.create(model="tiny", prompt="Hello", **options)
            assert found.choices[0].text == alone("Hello", 20, Budget())
        assert server.engine.counters.drafted > drafted
        with pytest.raises(openai.BadRequestError, match="draft length"):
            client.completions.create(model="tiny", prompt="Hello", extra_body={"draft_length": 3})
        assert server.is_idle()

    def test_values_without_an_effect_are_accepted(self, client):
        neutral = {"presence_penalty": 0, "logit_bias": {}, "echo": False, "best_of": 1, "user": "me", "suffix": None}
        client.completions.create(model="tiny", prompt="Hello", max_tokens=1, **neutral)

    def test_an_unknown_model(self, client):
        with pytest.raises(openai.NotFoundError, match="no model 'other'") as error:
            client.completions.create(model="other", prompt="Hello")
        assert error.value.code == "model_not_found"

    def test_images_and_tools_are_refused_by_name(self, client):
        image = [{"type": "image_url", "image_url": {"url": "data:"}}]
        with pytest.raises(openai.BadRequestError, match=r"messages\.0\.content"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": image}])
        tool = {"type": "function", "function": {"name": "f"}}
        with pytest.raises(openai.BadRequestError, match="tools is not supported"):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], tools=[tool])


class TestOperation:
    def test_models(self, client, server):
        (model,) = client.models.list().data
        assert (model.id, model.shadowllm["heads"], model.shadowllm["neurons"]) == ("tiny", 4, 88)
        assert client.models.retrieve("tiny").id == "tiny"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")

    def test_health_and_metrics(self, client, server):
        counters = server.engine.counters
        steps, read = counters.steps, counters.read_bytes
        client.completions.create(model="tiny", prompt="Hello", max_tokens=4)
        assert server.is_idle()
        status, _, text = server.get("/health")
        assert (status, json.loads(text)) == (200, {"status": "ok", "slots": 3, "running": 0, "waiting": 0})
        _, headers, text = server.get("/metrics")
        assert headers["Content-Type"].startswith("text/plain")
        values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        assert float(values["shadowllm_new_tokens_total"]) >= 4
        alone = traffic_of(server.model.manifest, "torch", server.model.budget, 5, 4).total
        assert counters.read_bytes - read == (counters.steps - steps) * alone > 0
        assert float(values["shadowllm_read_bytes_total"]) == counters.read_bytes
        assert float(values["shadowllm_slots_taken"]) == 0
        assert float(values['shadowllm_texts_total{outcome="length"}']) >= 1
        assert float(values['shadowllm_full_precision_share{unit="neurons"}']) < 1
        first = 'shadowllm_time_to_first_token_seconds_bucket{le="+Inf"}'
        assert float(values[first]) == float(values["shadowllm_time_to_first_token_seconds_count"]) >= 1
        assert 'shadowllm_http_requests_total{path="/v1/completions",status="200"}' in values

    def test_a_request_is_one_line_of_the_log_without_its_text(self, bundle):
        with running(bundle()) as server:
            server.client().completions.create(model="tiny", prompt="Secret!", max_tokens=2)
            record = record_of(server, "/v1/completions")
            lines = list(server.lines)
        assert sum("/v1/completions" in line for line in lines) == 1
        assert record["status"] == 200
        assert (record["prompt_tokens"], record["completion_tokens"], record["outcome"]) == (7, 2, "length")
        assert record["seconds"] > 0
        assert not any("Secret" in line for line in lines)

    def test_keys(self, bundle):
        with running(bundle(), keys=["first-key", "second-key"]) as server:
            for key in ("first-key", "second-key"):
                assert server.client(key).models.list().data
            for key in ("third-key", "first-ke", "first-key2"):
                with pytest.raises(openai.AuthenticationError, match="missing or wrong"):
                    server.client(key).completions.create(model="tiny", prompt="Hello")
            with pytest.raises(urllib.error.HTTPError, match="401"):
                server.get("/metrics")
            assert server.get("/health")[0] == 200
            assert not any("key2" in line or "third" in line for line in server.lines)
            assert server.is_idle()


def test_a_chat_template_gets_the_name_of_a_message():
    named = Message(role="developer", content="x", name="bob").plain()
    assert named == {"role": "system", "content": "x", "name": "bob"}


def test_a_full_queue_is_429_with_retry_after(bundle):
    with running(bundle(), PausedSlots(bundle(), 1), queue=0) as server:
        client = server.client()
        first = client.completions.create(model="tiny", prompt="Hello", max_tokens=5, stream=True)
        with pytest.raises(openai.RateLimitError, match="the queue is full") as error:
            client.completions.create(model="tiny", prompt="Hello", n=1)
        assert error.value.response.headers["retry-after"] == "1"
        with pytest.raises(openai.BadRequestError, match="holds 1 texts at once"):  # it would never have room
            client.completions.create(model="tiny", prompt="Hello", n=2)
        server.session.go.set()
        assert "".join(chunk.choices[0].text for chunk in first)
        assert client.completions.create(model="tiny", prompt="Hello", max_tokens=2).choices[0].text
        assert server.is_idle()


def test_a_deadline_is_an_error_of_its_own(bundle):
    with running(bundle(), PausedSlots(bundle(), 1), request_timeout=0.2) as server:
        threading.Timer(0.5, server.session.go.set).start()
        with pytest.raises(openai.InternalServerError, match="took too long") as error:
            server.client().completions.create(model="tiny", prompt="Hello", max_tokens=9)
        assert error.value.status_code == 504
        server.session.go.clear()
        stream = server.client().completions.create(model="tiny", prompt="Hello", max_tokens=9, stream=True)
        threading.Timer(0.5, server.session.go.set).start()
        with pytest.raises(openai.APIError, match="took too long"):
            list(stream)
        assert server.is_idle()


def test_stopping_lets_running_requests_finish(bundle):
    with running(bundle(), PausedSlots(bundle(), 1)) as server:
        stream = server.client().completions.create(model="tiny", prompt="Hello", max_tokens=6, stream=True)
        server.engine.drain(30)
        with pytest.raises(openai.InternalServerError, match="stopping") as error:
            server.client().completions.create(model="tiny", prompt="Hello")
        assert (error.value.status_code, error.value.response.headers["retry-after"]) == (503, "1")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            server.get("/health")
        server.session.go.set()
        assert len(list(stream)) >= 2


class DamagedSlots(TorchSlots):
    """Slots of a model that computes NaN after a prompt."""

    def step(self, tokens):
        return {slot: np.full_like(logits, np.nan) for slot, logits in super().step(tokens).items()}


@pytest.mark.parametrize("stream", [False, True])
def test_logits_that_are_nan_are_logged_as_such_and_not_as_a_bug(bundle, stream):
    with running(bundle(), DamagedSlots(bundle(), 1)) as server:
        with pytest.raises(openai.APIError, match="NaN or infinite logits"):
            list(server.client().completions.create(model="tiny", prompt="Hello", max_tokens=4, stream=stream))
        record = record_of(server, "/v1/completions")
        assert (record["status"], record["error"]) == (200 if stream else 500, "bad_logits")
        assert "a bug" not in server.lines
        assert server.is_idle()


class BrokenSlots(TorchSlots):
    def step(self, tokens):
        raise OSError("the device is lost")


def test_a_failed_session_is_reported(bundle):
    with running(bundle(), BrokenSlots(bundle(), 1)) as server:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="the model's session failed"):
                server.client().completions.create(model="tiny", prompt="Hello", max_tokens=4)
        with pytest.raises(urllib.error.HTTPError, match="503") as error:
            server.get("/health")
        assert json.loads(error.value.read())["status"] == "failed"


def test_a_failed_session_ends_the_server(bundle, monkeypatch):
    """So that a supervisor starts it again."""
    from shadowllm.serve import server as serving
    from shadowllm.serve.transport import listen

    config, ended = ServeConfig(port=0, model_name="tiny"), queue.SimpleQueue()

    def serve():
        try:
            serving.serve(serving.Deployment(bundle(), server=config))
        except UserError as error:
            ended.put(str(error))

    with listen(config) as listener:
        monkeypatch.setattr(serving, "listen", lambda _: listener)
        monkeypatch.setattr(serving, "open_slots", lambda *_: BrokenSlots(bundle(), 1))
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
        with pytest.raises(openai.InternalServerError, match="the model's session failed"):
            client.completions.create(model="tiny", prompt="Hello", max_tokens=4)
        assert "the session failed (the device is lost)" in ended.get(timeout=30)


@pytest.mark.parametrize(
    ("options", "address", "hosts"),
    [
        ({}, "127.0.0.1", {"localhost", "127.0.0.1", "[::1]"}),
        ({"host": "Box.local"}, "127.0.1.1", {"localhost", "127.0.0.1", "[::1]", "box.local"}),
        ({"host": "::1"}, "::1", {"localhost", "127.0.0.1", "[::1]"}),
        ({"host": "0.0.0.0"}, "0.0.0.0", None),
        ({"host": "192.168.0.7"}, "192.168.0.7", None),
        ({"api_keys": Path("keys")}, "127.0.0.1", None),
    ],
)
def test_a_server_that_only_this_machine_reaches_accepts_only_its_names(options, address, hosts):
    from shadowllm.serve.transport import accepted_hosts

    assert accepted_hosts(ServeConfig(**options), address) == hosts


def test_a_page_of_another_site_reaches_no_route(server):
    """It may have a name that leads to this machine (DNS rebinding)."""
    from fastapi.testclient import TestClient

    from shadowllm.serve.app import make_app
    from shadowllm.serve.keys import ApiKeys

    client = TestClient(make_app(server.model, ApiKeys(None), 3, {"localhost", "127.0.0.1", "[::1]"}))
    for path in ("/", "/health", "/metrics", "/v1/models"):
        for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:80", "[::1]", "[::1]:8000"):
            assert client.get(path, headers={"Host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "[::2]", ""):
            found = client.get(path, headers={"Host": host})
            assert (found.status_code, found.json()["error"]["code"]) == (403, "wrong_host")
