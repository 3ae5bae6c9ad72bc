"""The worker's protocol, with a real (tiny) model in a real child process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shadowllm.errors import UserError
from shadowllm.evaluation.speed.harness import Contender, Worker, race
from shadowllm.evaluation.speed.worker import LoopTimer, peak_rss_mb
from tests.evaluation.speed.tiny_worker import tiny_decoder

SCRIPT = str(Path(__file__).with_name("tiny_worker.py"))
PROMPT = [3, 1, 4, 1, 5]


def tiny(mode: str, *log: Path) -> Contender:
    return Contender(mode, (sys.executable, SCRIPT, mode, *map(str, log)))


@pytest.fixture(scope="module")
def worker():
    with Worker(tiny("good")) as running:
        yield running


def greedy(n: int) -> list[int]:
    """The reference: no cache, the whole sequence every time."""
    ids = list(PROMPT)
    for _ in range(n):
        ids.append(int(tiny_decoder()(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


def test_load_report(worker):
    assert worker.load_report["load_seconds"] > 0
    assert worker.load_report["peak_rss_mb"] > 10


def test_greedy_generation(worker):
    generation = worker.generate(prompt=PROMPT, new_tokens=8)
    assert generation.tokens == greedy(8)
    assert len(generation.itl_ms) == 7
    assert generation.ttft_ms > 0
    assert min(generation.itl_ms) > 0
    assert generation.parts_ms == pytest.approx({"stem": 1.0, "predictor": 2.0, "body": 3.0})


def test_forced_tokens_replace_the_chosen_ones(worker):
    forced = [9, 8, 7]
    generation = worker.generate(prompt=PROMPT, new_tokens=4, forced=forced)
    expected = [int(tiny_decoder()(torch.tensor([PROMPT + forced[:i]]))[0, -1].argmax()) for i in range(4)]
    assert generation.tokens == expected
    assert generation.tokens != greedy(4)


def test_score_is_the_log_likelihood(worker):
    continuation = [2, 30, 11, 11]
    answer = worker.ask("score", context=PROMPT, continuation=continuation)
    logits = tiny_decoder()(torch.tensor([PROMPT + continuation]))[0, len(PROMPT) - 1 : -1].double()
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(continuation), reduction="none")
    # Logits of size about 30, whose float32 spacing is 2e-6, out of two layers with different summation orders.
    np.testing.assert_allclose(answer["nll"], expected.numpy(), rtol=0, atol=5e-5)
    assert answer["predicted"] == logits.argmax(-1).tolist()


def test_runs_do_not_see_each_other(worker):
    first = worker.generate(prompt=PROMPT, new_tokens=5)
    worker.generate(prompt=[7, 7], new_tokens=3)
    assert worker.generate(prompt=PROMPT, new_tokens=5).tokens == first.tokens


def test_loop_timer_counts_every_token():
    answer = LoopTimer(lambda prompt, n: iter(range(len(prompt), len(prompt) + n))).generate([0, 0], 4)
    assert answer["tokens"] == [2, 3, 4, 5]
    assert len(answer["itl_ms"]) == 3


def test_peak_rss_never_falls():
    before = peak_rss_mb()
    ballast = np.ones(20_000_000, dtype=np.float64)
    assert peak_rss_mb() >= before
    assert peak_rss_mb() >= ballast.nbytes / 1e6


class TestFailures:
    def test_killed_worker(self):
        with pytest.raises(UserError, match=r"worker of dies died \(killed by signal 9\): the last words; .*memory"):
            race([tiny("good"), tiny("dies")], {"prompt": PROMPT, "new_tokens": 3}, runs=1, warmup=0, settle=0)

    def test_bug_in_the_worker_quotes_its_last_line(self):
        with Worker(tiny("bug")) as worker, pytest.raises(UserError, match=r"exit status 1\): IndexError: index 7"):
            worker.generate(prompt=PROMPT, new_tokens=3)

    def test_dead_worker_stays_dead(self):
        with Worker(tiny("bug")) as worker:
            for _ in range(2):
                with pytest.raises(UserError, match="worker of bug died"):
                    worker.generate(prompt=PROMPT, new_tokens=3)

    def test_user_error_keeps_its_words(self):
        with pytest.raises(UserError) as caught, Worker(tiny("refuses")):
            pass
        assert (caught.value.problem, caught.value.remedy) == ("refuses: no such bundle", "make one")

    def test_command_that_does_not_exist(self):
        with pytest.raises(UserError, match="cannot start"), Worker(Contender("nobody", ("/nowhere/python",))):
            pass

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_children_end_with_the_parents_exception(self, error):
        processes = []

        def interrupt(workers, _taken):
            processes.extend(worker._child.process for worker in workers.values())
            raise error

        with pytest.raises(error):
            race([tiny("good")], {"prompt": PROMPT, "new_tokens": 2}, runs=1, warmup=0, settle=0, after=interrupt)
        assert [process.poll() for process in processes] == [-9]


def test_runs_are_interleaved_and_warm_up_is_left_out(tmp_path):
    log, ticks = tmp_path / "log", []
    taken, last = race(
        [tiny("good", log), tiny("other", log)],
        {"prompt": PROMPT, "new_tokens": 2},
        runs=3,
        warmup=1,
        settle=0,
        tick=ticks.append,
        after=lambda workers, taken: (list(workers), len(taken["other"])),
    )
    assert log.read_text().split() == ["good", "other", "other", "good"] * 2
    assert ticks == log.read_text().split()
    assert {name: len(generations) for name, generations in taken.items()} == {"good": 3, "other": 3}
    assert last == (["good", "other"], 3)
