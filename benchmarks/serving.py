"""Checks a server under load: many clients send mixed requests, and some go away before their text is complete.

    python -m shadowllm.benchmarks.serving out/frontier/float32 --json serving.json

Lengths, budgets and temperatures are drawn from a fixed seed. Afterwards each text is compared with the one that the
same request gives alone (a cancelled one with its beginning), the slots are counted, and the memory of the server's
process is shown over the requests. The exit status is 1 if a text differs, a request is lost, or a slot is not free.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

import shadowllm
from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.bundle.manifest import read_manifest
from shadowllm.child import module_command
from shadowllm.errors import UserError
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.speed.environment import environment
from shadowllm.models.sparsity import Budget
from shadowllm.progress import progress

BUDGETS: tuple[dict[str, float] | str, ...] = ({}, {"neurons": 0.1}, {"neurons": 0.3, "heads": 0.5}, "exact")
# With a given length, the random numbers of a text do not depend on times.
LOSSLESS = {"lossless": True, "draft_length": 3}
TEXT_BYTES = 8192  # of the text that prompts are taken from
PARTS = 20  # the memory is read this many times
IDLE_SECONDS = 30.0  # in which all slots must be free after the last request


@dataclass(frozen=True)
class Planned:
    """A request; its client goes away after ``pieces`` parts of the answer, unless that is None."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int
    sparsity: dict[str, float] | str
    drafting: dict[str, Any]
    pieces: int | None


@dataclass(frozen=True)
class Answer:
    """What a client got; seconds until the first part of the text, and until the last one."""

    text: str
    first_seconds: float
    seconds: float


def plan_requests(count: int, words: int, most_tokens: int) -> list[Planned]:
    """Return requests with prompts of 1 to ``words`` words; one in five is cancelled, and one in five lossless."""
    choose = random.Random(0)
    text = bytes(passage(str.encode, TEXT_BYTES)).decode(errors="ignore").split()

    def one(index: int) -> Planned:
        length = choose.randint(1, words)
        start = choose.randrange(len(text) - length)
        cancelled = choose.random() < 0.2
        return Planned(
            " ".join(text[start : start + length]),
            choose.randint(1, most_tokens),
            choose.choice((0.0, 0.8)),
            index,
            choose.choice(BUDGETS),
            LOSSLESS if choose.random() < 0.2 else {},
            choose.randint(1, max(1, most_tokens // 2)) if cancelled else None,
        )

    return [one(index) for index in range(count)]


@contextmanager
def serving(bundle: Path, slots: int, options: Sequence[str] = ()) -> Iterator[tuple[str, psutil.Process]]:
    """Run ``shadowllm serve``; yields its address and process.

    Raises:
        UserError: it does not start.
    """
    command = module_command("shadowllm.cli", "serve", str(bundle), "--port", "0", "--slots", str(slots), *options)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip().rpartition(": ")[2]
            if not address:
                raise UserError("the server did not start", f"run: {' '.join(command)}")
            yield address, psutil.Process(process.pid)
        finally:
            process.terminate()


class Clients:
    """Clients that send planned requests at the same time, each one after the other.

    Attributes:
        answers: by the request's place in the plan.
        rss: bytes of the server's memory, as often as `PARTS`, with the number of requests before it.
    """

    def __init__(self, url: str, server: psutil.Process, plans: Sequence[Planned]) -> None:
        self._url, self._server, self._plans = url, server, plans
        self.answers: dict[int, Answer] = {}
        self.rss: list[tuple[int, int]] = []

    def run(self, clients: int) -> float:
        """Send all requests; return the seconds that it took."""
        start = time.perf_counter()
        asyncio.run(self._all(clients))
        return time.perf_counter() - start

    async def _all(self, clients: int) -> None:
        left = iter(enumerate(self._plans))
        async with AsyncOpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=600) as client:
            model = (await client.models.list()).data[0].id
            await asyncio.gather(*(self._one_client(client, model, left) for _ in range(clients)))

    async def _one_client(self, client: AsyncOpenAI, model: str, left: Iterator[tuple[int, Planned]]) -> None:
        for index, planned in left:
            self.answers[index] = await _ask(client, model, planned)
            if len(self.answers) % max(1, len(self._plans) // PARTS) == 0:
                self.rss.append((len(self.answers), self._server.memory_info().rss))


async def _ask(client: AsyncOpenAI, model: str, planned: Planned) -> Answer:
    start, pieces, first = time.perf_counter(), [], None
    stream = await client.completions.create(
        model=model,
        prompt=planned.prompt,
        max_tokens=planned.max_tokens,
        temperature=planned.temperature,
        seed=planned.seed,
        stream=True,
        extra_body={"sparsity": planned.sparsity, **planned.drafting},
    )
    async for chunk in stream:
        first = first or time.perf_counter() - start
        pieces.append(chunk.choices[0].text)
        if len(pieces) == planned.pieces:
            await stream.close()
            break
    return Answer("".join(pieces), first or 0.0, time.perf_counter() - start)


def wait_until_idle(url: str) -> dict[str, Any]:
    """Return what ``/health`` says when no text runs or waits, or after `IDLE_SECONDS`."""
    end = time.monotonic() + IDLE_SECONDS
    while True:
        with urllib.request.urlopen(f"{url}/health", timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
        if not found["running"] + found["waiting"] or time.monotonic() > end:
            return found
        time.sleep(0.05)


def read_metrics(url: str) -> dict[str, Any]:
    """Return the numbers of tokens and steps, and of texts by outcome."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    samples = [sample for family in families for sample in family.samples]
    names = ("prompt_tokens", "new_tokens", "decode_steps")
    counts = {name: int(one.value) for name in names for one in samples if one.name == f"shadowllm_{name}_total"}
    outcomes = {one.labels["outcome"]: int(one.value) for one in samples if one.name == "shadowllm_texts_total"}
    return counts | {"outcomes": outcomes}


def compare(
    bundle: Path, plans: Sequence[Planned], answers: Mapping[int, Answer], threads: int, prepack: bool
) -> list[int]:
    """Return the places of requests whose text is not the one, or the beginning of the one, that they give alone."""
    wrong = []
    with (
        shadowllm.load(bundle, threads=threads, prepack=prepack) as model,
        progress("Comparing texts", len(answers)) as advance,
    ):
        manifest = read_manifest(bundle)
        for index, answer in answers.items():
            planned = plans[index]
            given, default = planned.sparsity, manifest.draft_budget if planned.drafting else manifest.budget
            model.set_budget(Budget(**{**vars(default), **given}) if isinstance(given, dict) else Budget())
            sampling: dict[str, Any] = {"temperature": planned.temperature, "seed": planned.seed}
            alone = shadowllm.generate(model, planned.prompt, planned.max_tokens, **sampling, **planned.drafting)
            same = alone == answer.text if planned.pieces is None else alone.startswith(answer.text)
            if not same:
                wrong.append(index)
            advance(1)
    return sorted(wrong)


def check(
    bundle: Path,
    requests: int = 500,
    clients: int = 32,
    slots: int = 8,
    words: int = 32,
    most_tokens: int = 32,
    threads: int = 2,
    prepack: bool = False,
) -> dict[str, Any]:
    """Serve the requests, compare the texts, and return what was found."""
    plans = plan_requests(requests, words, most_tokens)
    options = ["--threads", str(threads), *["--prepack"] * prepack]
    with serving(bundle, slots, options) as (url, process):
        started = process.memory_info().rss
        sent = Clients(url, process, plans)
        seconds = sent.run(clients)
        health, metrics = wait_until_idle(url), read_metrics(url)
    whole = [sent.answers[index] for index, planned in enumerate(plans) if planned.pieces is None]
    return {
        "requests": requests,
        "clients": clients,
        "slots": slots,
        "prepack": prepack,
        "cancelled_by_clients": requests - len(whole),
        "lost": requests - sum(metrics["outcomes"].values()),
        "slots_taken_afterwards": health["running"] + health["waiting"],
        "wrong": [vars(plans[index]) for index in compare(bundle, plans, sent.answers, threads, prepack)],
        **metrics,
        "seconds": seconds,
        "tokens_per_second": metrics["new_tokens"] / seconds,
        "median_seconds_to_first_text": statistics.median(answer.first_seconds for answer in whole),
        "median_seconds": statistics.median(answer.seconds for answer in whole),
        "rss_mb_at_start": started / 1e6,
        "rss_mb": {str(count): rss / 1e6 for count, rss in sent.rss},
    }


def print_result(found: Mapping[str, Any]) -> None:
    """Print what was found."""
    outcomes = ", ".join(f"{count} {name}" for name, count in found["outcomes"].items() if count)
    print(f"{found['requests']} requests of {found['clients']} clients over {found['slots']} slots: {outcomes}")
    print(f"lost {found['lost']}, wrong {len(found['wrong'])}, slots taken {found['slots_taken_afterwards']}")
    for kind, count in Counter(f"{one['sparsity']} {one['drafting']}" for one in found["wrong"]).items():
        print(f"wrong with {kind}: {count}")
    print(f"{found['new_tokens']} new tokens in {found['seconds']:.1f} s: {found['tokens_per_second']:.1f} per second")
    print(f"first text after {found['median_seconds_to_first_text']:.2f} s, last after {found['median_seconds']:.2f} s")
    memory = " ".join(f"{rss:.0f}" for rss in found["rss_mb"].values())
    print(f"RSS in MB: {found['rss_mb_at_start']:.0f} at the start, then {memory}")


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("serving", __doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--words", type=int, default=32, help="most words of a prompt (default: 32)")
    parser.add_argument("--most-tokens", type=int, default=32, help="most new tokens of a text (default: 32)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prepack", action="store_true", help="as in `shadowllm serve`; also for the texts alone")
    add_json(parser)
    args = vars(parser.parse_args(arguments))
    file = args.pop("json")
    found = check(**args)
    print_result(found)
    if file:
        record = {"environment": environment(args["threads"]), "model": read_manifest(args["bundle"]).model, **found}
        file.write_text(json.dumps(record, indent=2) + "\n")
    if found["wrong"] or found["lost"] or found["slots_taken_afterwards"]:
        raise UserError("the server failed the check", "report this with the JSON of --json")


if __name__ == "__main__":
    sys.exit(main())
