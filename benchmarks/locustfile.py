"""A load for `shadowllm serve`, by the load tool Locust: streamed chats, completions, and clients that go away.

pip install locust
locust --locustfile benchmarks/locustfile.py --host http://127.0.0.1:8000 --headless --users 16 --run-time 60s
"""

from __future__ import annotations

import random

from locust import HttpUser, between, task

BUDGETS: tuple[dict[str, float] | str, ...] = ({}, {"neurons": 0.1}, "exact")


class Reader(HttpUser):
    """Sends requests of different kinds, one after the other. Times of streams are those of the first bytes."""

    wait_time = between(0.1, 0.5)

    @task(3)
    def completion(self) -> None:
        """A whole text."""
        body = {"prompt": "The sea", "max_tokens": random.randint(1, 24), "sparsity": random.choice(BUDGETS)}
        self.client.post("/v1/completions", json=body)

    @task(3)
    def stream(self) -> None:
        """A stream that is read to its end."""
        body = {"prompt": "The shadow of", "max_tokens": 24, "stream": True, "temperature": 0.8}
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True) as answer:
            text = answer.text
            if not text.endswith("data: [DONE]\n\n"):
                answer.failure(f"the stream ended with {text[-80:]!r}")

    @task
    def leave(self) -> None:
        """A stream whose client goes away after the first bytes."""
        body = {"prompt": "The shadow of", "max_tokens": 64, "stream": True}
        name = "/v1/completions (left)"
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True, name=name) as answer:
            next(answer.iter_content(64))

    @task
    def mistake(self) -> None:
        """A request that is refused."""
        with self.client.post("/v1/completions", data="{", catch_response=True, name="(malformed)") as answer:
            if answer.status_code == 415:
                answer.success()
