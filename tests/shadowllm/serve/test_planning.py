"""Planning of requests: bounded, in turn, within the deadline, and not for clients that are gone. No place is lost."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from shadowllm.serve.model import ServedModel
from tests.shadowllm.serve.conftest import running, wait_for
from tests.shadowllm.serve.test_hostile import answer, completion, connect

pytest.importorskip("fastapi", reason="the server needs packages (pip install '.[serve]')")
pytestmark = pytest.mark.usefixtures("one_thread")
SLOW = "slow"


class Plans:
    """Planning that notes the prompts, and waits with the prompt `SLOW` until it may go on."""

    def __init__(self, plan):
        self._plan, self.go, self.prompts = plan, threading.Event(), []

    def __call__(self, model, body):
        self.prompts.append(body.prompt)
        assert body.prompt != SLOW or self.go.wait(60)
        return self._plan(model, body)


@pytest.fixture
def plans(monkeypatch):
    found = Plans(ServedModel.plan)
    monkeypatch.setattr(ServedModel, "plan", lambda model, body: found(model, body))
    yield found
    found.go.set()


@pytest.fixture
def small(bundle, plans):
    """A function that makes a server with three slots and a queue of one text."""
    return partial(running, bundle(), queue=1)


def is_free(server):
    """Whether all places of planning and of the engine become free, and a request is answered."""
    wait_for(lambda: server.planner.held == 0)
    with connect(server) as good:
        good.sendall(completion())
        assert answer(good)[0] == 200
    return server.planner.held == 0 and server.is_idle()


def test_too_many_are_refused_at_once(small, plans):
    with small() as server:
        clients = [connect(server) for _ in range(4)]
        for client in clients:
            client.sendall(completion(prompt=SLOW, max_tokens=1))
        wait_for(lambda: server.planner.held == 4)
        with connect(server) as one_more:
            one_more.sendall(completion())
            status, content = answer(one_more)
        assert (status, content["error"]["code"]) == (429, "queue_full")
        plans.go.set()
        assert [answer(client)[0] for client in clients] == [200] * 4
        for client in clients:
            client.close()
        assert is_free(server)


def test_what_nobody_waits_for_is_not_planned(small, plans):
    with small() as server:
        with connect(server) as first:
            first.sendall(completion(prompt=SLOW, max_tokens=1))
            wait_for(lambda: SLOW in plans.prompts)
            gone = [connect(server) for _ in range(3)]
            for client in gone:
                client.sendall(completion(prompt="left"))
            wait_for(lambda: server.planner.held == 4)
            for client in gone:
                client.close()
            wait_for(lambda: server.planner.held == 1)
            # The first one leaves while it is planned. Its place is taken until the plan is there.
            first.close()
            wait_for(lambda: sum("closed_by_client" in line for line in server.lines) == 4)
            assert server.planner.held == 1
            plans.go.set()
        assert is_free(server)
        assert "left" not in plans.prompts
        assert not server.engine.counters.outcomes["cancelled"]


def test_the_deadline_covers_planning(small, plans):
    with small(request_timeout=0.3) as server:
        with connect(server) as running_one, connect(server) as waiting:
            for client, prompt in ((running_one, SLOW), (waiting, "late")):
                client.sendall(completion(prompt=prompt))
                status, content = answer(client)
                assert (status, content["error"]["code"]) == (504, "deadline_exceeded")
        assert server.planner.held == 1
        plans.go.set()
        assert is_free(server)
        assert "late" not in plans.prompts


def test_a_mistake_gives_its_place_back(small):
    with small() as server:
        for _ in range(6):  # more than there are places
            with connect(server) as client:
                client.sendall(completion(temperature=-1))
                assert answer(client)[0] == 400
        assert is_free(server)
