"""Many clients at once: every text is the one that the request gives alone, none is lost, and no slot either."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest

from shadowllm.models.sparsity import Budget
from shadowllm.runtime import open_session
from shadowllm.runtime.generation.completion import Completion, make_request
from shadowllm.runtime.torch_slots import TorchSlots
from tests.shadowllm.serve.conftest import running

openai = pytest.importorskip("openai", reason="the official client is not installed (pip install openai)")
REQUESTS, CLIENTS = 80, 16


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_mixed_requests_of_many_clients(bundle):
    choose = random.Random(4)
    budgets = [0.1, 0.3, 1.0]
    plans = [
        {
            "prompt": [choose.randrange(3, 90) for _ in range(choose.randrange(1, 40))],
            "max_tokens": choose.randrange(1, 25),
            "temperature": choose.choice([0.0, 1.0]),
            "seed": index,
            "neurons": choose.choice(budgets),
            "cancelled": index % 5 == 0,
        }
        for index in range(REQUESTS)
    ]

    async def one(client, gate, plan):
        options = {name: plan[name] for name in ("prompt", "max_tokens", "temperature", "seed")}
        sparsity = {"sparsity": {"neurons": plan["neurons"], "heads": 0.5}}
        async with gate:
            stream = await client.completions.create(model="tiny", stream=True, extra_body=sparsity, **options)
            text = ""
            async for chunk in stream:
                text += chunk.choices[0].text
                if plan["cancelled"]:
                    await stream.close()
                    return None
            return text

    async def all_of_them(url):
        gate = asyncio.Semaphore(CLIENTS)
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(one(client, gate, plan) for plan in plans))

    with running(bundle(), TorchSlots(bundle(), 4), queue=CLIENTS) as server:
        texts = asyncio.run(all_of_them(server.url))
        assert server.is_idle()
        assert sum(server.engine.counters.outcomes.values()) == REQUESTS
        assert server.engine.counters.outcomes["error"] == 0
        model = server.model
    with open_session(bundle(), "torch") as session:
        for plan, text in zip(plans, texts, strict=True):
            if plan["cancelled"]:
                continue
            sampling = {"temperature": plan["temperature"], "seed": plan["seed"]}
            arguments = (bundle(), model.manifest, lambda: model.tokenizer, [plan["prompt"]], plan["max_tokens"])
            request = replace(make_request(*arguments, **sampling), tokenizer=model.tokenizer)
            session.set_budget(Budget(neurons=plan["neurons"], heads=0.5))
            completion = Completion(request)
            for _ in completion.grow(session):
                pass
            assert completion.texts[0] == text
