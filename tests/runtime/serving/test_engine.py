"""The engine on real slots of tiny models: texts equal those of `generate` alone, and no slot is lost."""

from __future__ import annotations

import queue
import time
from dataclasses import replace

import numpy as np
import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget
from shadowllm.runtime import open_session, open_slots
from shadowllm.runtime.generation.completion import Completion, make_request
from shadowllm.runtime.generation.text import load_tokenizer
from shadowllm.runtime.serving.engine import Engine
from shadowllm.runtime.serving.job import (
    DeadlineError,
    EngineClosedError,
    EngineFailedError,
    Failed,
    Finished,
    Job,
    QueueFullError,
    Token,
)
from shadowllm.runtime.torch_slots import TorchSlots
from shadowllm.serve_config import EngineConfig
from tests.runtime.serving.paused_slots import PausedSlots

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT = [5, 17, 42, 8, 61]
SMALL = Budget(heads=0.5, neurons=0.25)


class Client:
    """Makes jobs for a bundle, and collects their events."""

    def __init__(self, folder):
        self.folder, self.manifest = folder, read_manifest(folder)
        self.tokenizer = load_tokenizer(folder, self.manifest)
        self.session = open_session(folder, "torch")

    def request(self, prompt, n=6, **options):
        found = make_request(self.folder, self.manifest, lambda: self.tokenizer, [prompt], n, **options)
        return replace(found, tokenizer=self.tokenizer)

    def job(self, prompt=PROMPT, n=6, budget=None, send=None, logprobs=None, selection=False, deadline=None, **options):
        events = queue.SimpleQueue()
        job = Job(self.request(prompt, n, **options), send or events.put, budget, logprobs, selection, deadline)
        job.events = events
        return job

    def alone(self, job):
        """Text and tokens of the job's request in a session of its own."""
        self.session.set_budget(job.budget or self.manifest.budget)
        completion = Completion(job.request)
        for _ in completion.grow(self.session):
            pass
        return completion.texts[0], completion.tokens[0]


def collect(job, timeout=60):
    """The text and tokens of a job, and its last event."""
    text, tokens = "", []
    while True:
        event = job.events.get(timeout=timeout)
        if not isinstance(event, Token):
            return text + getattr(event, "text", ""), tokens, event
        text, tokens = text + event.text, [*tokens, event.token]


def first_token(job):
    event = job.events.get(timeout=60)
    assert isinstance(event, Token), event


def no_slot_is_taken(engine, session):
    """Whether every slot and every place in the queue is free."""
    deadline = time.monotonic() + 10
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.01)
    return not session._lengths and not engine.running and not engine.waiting


@pytest.fixture(scope="module")
def client(bundle):
    return Client(bundle())


@pytest.fixture
def session(client):
    return open_slots(client.folder, "torch", 3, None)


@pytest.fixture
def engine(session):
    with Engine(session, EngineConfig(slots=3, queue=8, prefill_chunk=4)) as engine:
        yield engine


def test_texts_equal_those_alone(client, engine, session):
    """More jobs than slots, of mixed lengths, budgets and options; prompts longer than a chunk."""
    long = [int(token) for token in np.random.default_rng(1).integers(3, 90, 30)]
    jobs = [
        client.job(),
        client.job(long, 12, SMALL),
        client.job(long[:9], 20, Budget(), temperature=0.9, seed=4),
        client.job([9], 15, SMALL, temperature=1.5, top_p=0.9, seed=7),
        client.job([9], 15, SMALL, temperature=1.5, top_p=0.9, seed=8),
        client.job(long[:4], 1),
        client.job(long, 100, SMALL, repetition_penalty=1.3),  # to the last position of the model
        client.job("Hello", 9, SMALL, temperature=1.0, no_repeat_ngram_size=2),
    ]
    for job in jobs:
        engine.submit(job)
    begun = 0
    for job in jobs:
        text, tokens, last = collect(job)
        begun += bool(tokens)
        assert (text, tokens) == client.alone(job)
        assert isinstance(last, Finished)
        assert last.reason in ("stop", "length")
    assert len(tokens) <= 9
    assert no_slot_is_taken(engine, session)
    counters = engine.counters
    assert counters.prompt_tokens == sum(len(job.request.prompts[0]) for job in jobs)
    assert sum(counters.first_token.counts) == begun >= 7  # a text may be empty
    assert counters.outcomes["stop"] + counters.outcomes["length"] == len(jobs)
    assert 0 < counters.share_sums["neurons"] < counters.share_steps


def test_lossless_texts_beside_others_equal_those_alone(client, engine, session):
    """Greedy ones are those of the dense model. Sampled ones draw the same random numbers as alone."""
    jobs = [
        client.job(PROMPT, 12, SMALL, lossless=True),
        client.job(PROMPT, 100, SMALL, lossless=True, draft_length=3),  # to the last position of the model
        client.job([9], 20, SMALL, temperature=1.5, seed=7),
        client.job([9], 20, SMALL, lossless=True, draft_length=4, temperature=1.5, seed=7),
        client.job([44, 4], 20, SMALL, lossless=True, draft_length=0, temperature=1.5, seed=8),
        client.job([44, 4], 20, SMALL, lossless=True, draft_length=2, repetition_penalty=1.3),
        client.job([44, 4], 1, SMALL, lossless=True, draft_length=2),
    ]
    for job in jobs:
        engine.submit(job)
    for job in jobs:
        text, tokens, last = collect(job)
        assert (text, tokens) == client.alone(job)
        assert isinstance(last, Finished)
    dense = client.job(PROMPT, 12, Budget())
    engine.submit(dense)
    assert collect(dense)[:2] == client.alone(jobs[0])
    assert engine.counters.drafted > engine.counters.accepted > 0
    assert no_slot_is_taken(engine, session)


def test_stop_strings_end_a_text_as_alone(client, engine):
    whole, tokens, last = collect_of(engine, client.job(n=12))
    assert last.reason == "length"
    stop = whole[4:6]
    job = client.job(n=12, stop=stop)
    text, tokens, last = collect_of(engine, job)
    assert (text, tokens) == client.alone(job)
    assert text == whole[: whole.index(stop)]
    assert (last.reason, len(tokens) < 12) == ("stop", True)


def collect_of(engine, job):
    engine.submit(job)
    return collect(job)


def test_log_probabilities_are_those_of_the_logits(client, engine):
    job = client.job(n=1, logprobs=3)
    engine.submit(job)
    event = job.events.get(timeout=60)
    client.session.reset()
    logits = client.session.prefill([PROMPT])[0].astype(np.float64)
    right = logits - np.log(np.exp(logits).sum())
    assert [token for token, _ in event.top] == np.argsort(-right)[:3].tolist()
    np.testing.assert_allclose([value for _, value in event.top], np.sort(right)[::-1][:3], rtol=1e-5)
    assert event.logprob == pytest.approx(right[event.token])


def test_selections_are_counted_layer_by_layer(client, engine):
    job = client.job(n=3, budget=SMALL, selection=True)
    engine.submit(job)
    tokens = [job.events.get(timeout=60) for _ in range(3)]
    assert tokens[0].selection is None  # it comes from the prompt, which is dense
    for event in tokens[1:]:
        assert event.selection.neurons == [22, 22]  # a quarter of 88
        assert [layer.count("1") for layer in event.selection.heads] == [2, 2]
        assert all(len(layer) == 64 for layer in event.selection.bins)
        # A group has one or two neurons, so a digit is 0, 8 (one of two) or f.
        assert all(set(layer) <= set("08f") for layer in event.selection.bins)


def test_a_job_can_be_cancelled_at_any_time(client, engine, session):
    running = [client.job(n=50) for _ in range(3)]
    waiting = client.job(n=50)
    for job in (*running, waiting):
        engine.submit(job)
    first_token(running[0])
    engine.cancel(waiting)
    engine.cancel(running[0])
    prefilling = client.job([7] * 60, n=2)
    engine.submit(prefilling)
    engine.cancel(prefilling)
    for job in (waiting, running[0], prefilling):
        assert collect(job)[2] == Finished("cancelled")
    engine.cancel(running[0])  # again, which does nothing
    for job in running[1:]:
        assert collect(job)[:2] == client.alone(job)
    assert no_slot_is_taken(engine, session)


def test_a_job_ends_at_its_deadline(client, engine, session):
    late = client.job(n=50, deadline=time.monotonic() - 1)
    other = client.job(n=4)
    engine.submit(late)
    engine.submit(other)
    _, tokens, last = collect(late)
    assert isinstance(last.error, DeadlineError)
    assert tokens == []
    assert collect(other)[:2] == client.alone(other)
    assert no_slot_is_taken(engine, session)
    assert engine.counters.outcomes["timeout"] == 1


def test_a_full_queue_refuses_at_once_and_recovers(client):
    session = PausedSlots(client.folder, 1)
    with Engine(session, EngineConfig(slots=1, queue=2)) as engine:
        jobs = [client.job(n=3) for _ in range(3)]
        for job in jobs:
            engine.submit(job)
        with pytest.raises(QueueFullError, match="the queue is full"):
            engine.submit(client.job())
        session.go.set()
        for job in jobs:
            assert collect(job)[:2] == client.alone(job)
        last = client.job(n=3)
        engine.submit(last)
        assert collect(last)[:2] == client.alone(last)
        assert no_slot_is_taken(engine, session)


def test_jobs_wait_until_their_positions_are_free(client):
    session = TorchSlots(client.folder, 3)
    with Engine(session, EngineConfig(slots=3, cache_positions=20)) as engine:
        with pytest.raises(UserError, match="need 25 positions, the server has 20"):
            engine.submit(client.job(n=21))
        jobs = [client.job(n=10) for _ in range(4)]  # 14 positions each, so one at a time
        for job in jobs:
            engine.submit(job)
        for job in jobs:
            assert collect(job)[:2] == client.alone(job)
        assert engine.counters.steps == sum(len(client.alone(job)[1]) - 1 for job in jobs)


class NoisySlots(TorchSlots):
    """Slots that compute NaN for sequences with a token of value 13 in the step."""

    def step(self, tokens):
        found = {slot: logits.copy() for slot, logits in super().step(tokens).items()}
        for slot, length in self._lengths.items():
            if length == 13:
                found[slot][:] = np.nan
        return found


def test_a_fault_of_one_job_does_not_touch_the_others(client):
    session = NoisySlots(client.folder, 4)

    def broken(event):
        raise RuntimeError("nobody listens")

    with Engine(session) as engine:
        good = [client.job(n=8), client.job([3, 4], n=9, budget=SMALL)]
        nan = client.job([7] * 10, n=9)
        layers = client.job(budget=Budget(neurons=(0.1, 0.2, 0.3)))
        gone = client.job(send=broken)
        for job in (good[0], nan, layers, gone, good[1]):
            engine.submit(job)
        for job, words in ((nan, "NaN or infinite logits"), (layers, "the budget has 3 fractions")):
            last = collect(job)[2]
            assert isinstance(last, Failed)
            assert words in str(last.error)
        for job in good:
            assert collect(job)[:2] == client.alone(job)
        assert no_slot_is_taken(engine, session)
        assert engine.counters.outcomes == {
            "stop": 0,
            "length": 2,
            "cancelled": 1,
            "timeout": 0,
            "shutdown": 0,
            "error": 2,
        }


def test_memory_for_the_whole_text_is_reserved_when_it_gets_a_slot(client, monkeypatch, session):
    lengths, join = [], session.join
    monkeypatch.setattr(session, "join", lambda budget, length: [lengths.append(length), join(budget)][1])
    with Engine(session) as engine:
        for job in (client.job(n=8), client.job([7] * 30, n=1000)):
            collect_of(engine, job)
    assert lengths == [len(PROMPT) + 7, 64]  # the last token takes no position; the model has 64


@pytest.mark.parametrize("call", ["join", "extend", "verify"])
def test_a_call_of_the_session_that_fails_for_one_job_does_not_touch_the_others(client, monkeypatch, call):
    session = TorchSlots(client.folder, 4)
    works = getattr(session, call)
    bad = client.job([7] * 10, n=30, budget=Budget(neurons=0.7), lossless=True, draft_length=2)

    def fails_for_one(which, *arguments):
        if which == (bad.budget if call == "join" else engine._running[bad].slot if bad in engine._running else None):
            raise OSError("no memory")
        return works(which, *arguments)

    monkeypatch.setattr(session, call, fails_for_one)
    with Engine(session) as engine:
        good = [client.job(n=8, lossless=True), client.job([3, 4], n=9, budget=SMALL)]
        for job in (good[0], bad, good[1]):
            engine.submit(job)
        assert str(collect(bad)[2].error) == "no memory"
        for job in good:
            assert collect(job)[:2] == client.alone(job)
        assert engine.accepts
        assert no_slot_is_taken(engine, session)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": [5] * 65}, "the text has 65 tokens"),
        ({"prompt": [97]}, "token 97 is outside"),
        ({"prompt": []}, "the prompt is empty"),
    ],
)
def test_jobs_that_cannot_be_computed_are_refused(client, engine, options, words):
    with pytest.raises(UserError, match=words):
        engine.submit(client.job(**options))
    assert engine._places._value == 3 + 8


class BrokenSlots(TorchSlots):
    """Slots whose third step fails."""

    steps = 0

    def step(self, tokens):
        self.steps += 1
        if self.steps == 3:
            raise OSError("the device is lost")
        return super().step(tokens)


def test_a_fault_of_the_session_ends_all_jobs(client):
    with Engine(BrokenSlots(client.folder, 2), EngineConfig(slots=2, queue=4)) as engine:
        jobs = [client.job(n=30) for _ in range(4)]
        for job in jobs:
            engine.submit(job)
        for job in jobs:
            assert isinstance(collect(job)[2].error, EngineFailedError)
        assert not engine.accepts
        assert str(engine.failure) == "the device is lost"
        with pytest.raises(EngineFailedError):
            engine.submit(client.job())
        engine.cancel(jobs[0])
        assert engine._inbox.empty()  # nothing would take it out


class UnopenedSlots(TorchSlots):
    def __enter__(self):
        raise UserError("no memory", "give some")


def test_a_session_that_does_not_open_is_an_error_at_once(client):
    with pytest.raises(UserError, match="no memory"), Engine(UnopenedSlots(client.folder, 1)):
        pass


def test_draining_finishes_running_jobs_and_refuses_new_ones(client):
    session = PausedSlots(client.folder, 1)
    with Engine(session) as engine:
        running, waiting = client.job(n=4), client.job(n=4)
        engine.submit(running)
        engine.submit(waiting)
        first_token(running)
        engine.drain(60)
        with pytest.raises(EngineClosedError):
            engine.submit(client.job())
        session.go.set()
        assert collect(running)[2] == Finished("length", "")
        assert collect(waiting)[:2] == client.alone(waiting)


def test_leaving_ends_what_still_runs(client):
    session = PausedSlots(client.folder, 1)
    with Engine(session) as engine:
        jobs = [client.job(n=40), client.job(n=40)]
        for job in jobs:
            engine.submit(job)
        first_token(jobs[0])
        engine.drain(0)
        session.go.set()
    for job in jobs:
        assert isinstance(collect(job)[2].error, EngineClosedError)
    assert engine.counters.outcomes["shutdown"] == 2
