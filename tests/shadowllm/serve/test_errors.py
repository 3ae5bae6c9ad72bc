"""Errors of bodies name the field, and what it accepts."""

from __future__ import annotations

import json

import pytest

pydantic = pytest.importorskip("pydantic", reason="the server needs packages (pip install '.[serve]')")
pytest.importorskip("fastapi", reason="the server needs packages (pip install '.[serve]')")

PROMPT = "prompt: Input should be a text, a list of texts, token ids, or a list of lists of token ids"
SPARSITY = 'sparsity: Input should be "exact" or an object'


def error_of(body, chat=False):
    from shadowllm.serve.errors import api_error
    from shadowllm.serve.schema import ChatBody, CompletionBody

    with pytest.raises(pydantic.ValidationError) as raised:
        (ChatBody if chat else CompletionBody).model_validate_json(json.dumps(body))
    error = api_error(raised.value).content["error"]
    return error["param"], error["message"]


@pytest.mark.parametrize("prompt", [True, {"a": 1}, 1.5, ["x", 1], [1, "x"], [[1, 2], "x"], [1.5], [["x"]]])
def test_a_prompt(prompt):
    assert error_of({"prompt": prompt}) == ("prompt", PROMPT)


MANY = [{}] * 1000


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": MANY},
        {"prompt": [MANY]},
        {"prompt": "x", "stop": MANY},
        {"prompt": "x", "sparsity": {"neurons": MANY}},
        {"messages": MANY},
        {"messages": [{"role": "user", "content": MANY}]},
    ],
)
def test_not_every_item_of_a_list_has_an_error(body):
    """A body of 1 MiB would take 1 GiB of memory."""
    from shadowllm.serve.schema import ChatBody, CompletionBody

    with pytest.raises(pydantic.ValidationError) as raised:
        (ChatBody if "messages" in body else CompletionBody).model_validate_json(json.dumps(body))
    assert raised.value.error_count() <= 4  # one for each type that a field may have


def test_no_prompt():
    assert error_of({}) == ("prompt", "prompt: Field required")
    assert error_of([])[0] is None


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        ("dense", SPARSITY),
        (5, SPARSITY),
        ({"nerons": 1}, "sparsity.nerons: Extra inputs are not permitted"),
        ({"neurons": "x"}, "sparsity.neurons: Input should be a number or a list of numbers"),
        ({"heads": [1, "x"]}, "sparsity.heads: Input should be a number or a list of numbers"),
        ({"shortlist": 1.5}, 'sparsity.shortlist: Input should be a whole number or "all"'),
        ({"rest": "x"}, "sparsity.rest: Input should be 'shadow' or 'drop'"),
    ],
)
def test_a_budget(sparsity, message):
    assert error_of({"prompt": "x", "sparsity": sparsity}) == ("sparsity", message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (5, "content: Input should be a string, or a list of parts of the type text"),
        ([5], "content.0: Input should be an object"),
        ([{"type": "image_url"}], "content.0.type: Input should be 'text'"),
        ([{"type": "text", "text": 5}], "content.0.text: Input should be a valid string"),
    ],
)
def test_a_message(content, message):
    body = {"messages": [{"role": "user", "content": content}]}
    assert error_of(body, chat=True) == ("messages", f"messages.0.{message}")


def test_stop_strings():
    for stop in (5, ["a", 5]):
        assert error_of({"prompt": "x", "stop": stop}) == (
            "stop",
            "stop: Input should be a string or a list of strings",
        )


def test_a_model_that_computes_nan_is_no_mistake_of_the_client():
    import numpy as np

    from shadowllm.runtime.generation.chooser import Chooser
    from shadowllm.runtime.generation.sampling import Sampling
    from shadowllm.serve.errors import api_error

    with pytest.raises(Exception, match="NaN") as raised:
        Chooser([[0]], Sampling()).choose(np.full((1, 3), np.nan, dtype=np.float32))
    error = api_error(raised.value)
    assert (error.status, error.content["error"]["code"]) == (500, "bad_logits")


def test_a_bug_is_logged_and_counted_as_500(caplog):
    import asyncio

    from prometheus_client import CollectorRegistry, Counter

    from shadowllm.serve.log import RequestLog

    async def broken(scope, receive, send):
        raise RuntimeError

    requests = Counter("requests", "help", ["path", "status"], registry=CollectorRegistry())
    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    with caplog.at_level("INFO", "shadowllm.serve"), pytest.raises(RuntimeError):
        asyncio.run(RequestLog(broken, requests)(scope, None, None))
    record = json.loads(caplog.messages[-1])
    assert (record["status"], record["error"]) == (500, "internal_error")
    assert requests.labels("other", "500")._value.get() == 1
