"""The benchmark of ``shadowllm bench``: speed and quality of a bundle's sparse path and of dense backends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shadowllm.bundle.manifest import Manifest, read_manifest
from shadowllm.draft_config import Drafting
from shadowllm.errors import UserError
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.speed.bandwidth import read_bandwidth
from shadowllm.evaluation.speed.environment import environment
from shadowllm.evaluation.speed.harness import Contender, Generation, Worker, race, speedup, summarise
from shadowllm.evaluation.speed.report import Report, Result
from shadowllm.evaluation.speed.traffic import CPU_BACKENDS, traffic_of
from shadowllm.evaluation.speed.worker_command import drafting_options, session_command
from shadowllm.models.sparsity import Budget
from shadowllm.progress import progress
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
from shadowllm.runtime.recomputed_rows import RecomputedRows
from shadowllm.runtime.session import Prefill

QUALITY_TOKENS = 128
SPARSE, LOSSLESS = "sparse", "lossless"  # names of the bundle's own contender


def bench(
    bundle: Path,
    against: Sequence[str] = ("ort-dense",),
    *,
    backend: str = "ort",
    budget: Budget | None = None,
    prompt_len: int = 128,
    new_tokens: int = 128,
    runs: int = 5,
    warmup: int = 1,
    quality_tokens: int | None = None,
    threads: int | None = None,
    percentiles: Sequence[float] = (),
    prefill: Prefill = "dense",
    drafting: Drafting | None = None,
    prepack: bool = False,
) -> Report:
    """Time a bundle's sparse path and other backends, each in its own process, with interleaved runs.

    Lossless decoding is timed as a whole loop, and so are the backends beside it. Its tokens come several at once, so
    speeds are compared by the mean latency. Instead of quality, the report tells whether the tokens are the baseline's.

    Args:
        bundle: folder written by ``shadowllm export``.
        against: backends to compare with; the first is the baseline of the quality figures.
        backend: the backend that runs the sparse path.
        budget: fractions to keep; the bundle's default if None (of drafts, if decoding is lossless).
        prompt_len: tokens of the prompt, which is documentation text.
        new_tokens: tokens of each generation; the first is the result of the prefill.
        runs: number of counted generations.
        warmup: number of generations before them, which are not counted.
        quality_tokens: length of each of the two texts for quality: the continuation of the documentation,
            and the text that the baseline generated. 0 omits quality. None is 128, or 0 if decoding is lossless.
        threads: threads of each session; the session's default if None.
        percentiles: of the inter-token latency, in addition to 50, 90 and 99.
        prefill: which graphs of the sparse path prefill, see `open_session`.
        drafting: whether the bundle decodes losslessly, and how it drafts.
        prepack: as for `open_session`, for the sparse path.

    Raises:
        UserError: no bundle, an argument out of range, too little text, or a worker failed.
    """
    manifest = read_manifest(bundle)
    drafting = drafting or Drafting()
    budget = budget or (manifest.draft_budget if drafting.lossless else manifest.budget)
    if drafting.lossless and quality_tokens:
        raise UserError(
            "the quality of lossless text is that of dense text, and not measured", "leave out quality tokens"
        )
    if quality_tokens is None:
        quality_tokens = 0 if drafting.lossless else QUALITY_TOKENS
    _check(manifest, against, prompt_len, new_tokens, runs, warmup, quality_tokens)
    text = passage(plain_encoder(load_tokenizer(bundle, manifest), manifest), prompt_len + quality_tokens)
    own = LOSSLESS if drafting.lossless else SPARSE
    backends = {own: backend} | {name: name for name in against}
    options = ["--prefill", prefill, *drafting_options(drafting, manifest), *(["--prepack"] if prepack else [])]
    loop = ["--loop"] if drafting.lossless else []
    contenders = [
        Contender(name, session_command(bundle, chosen, budget, threads, options if name == own else loop))
        for name, chosen in backends.items()
    ]
    texts = Texts(text[:prompt_len], text[prompt_len:], baseline=against[0])
    with progress("Benchmark", len(contenders) * (warmup + runs + 2 * bool(quality_tokens))) as advance:
        taken, scores = race(
            contenders,
            {"prompt": texts.prompt, "new_tokens": new_tokens},
            runs=runs,
            warmup=warmup,
            tick=lambda _: advance(1),
            after=(lambda workers, taken: texts.score(workers, taken, advance)) if quality_tokens else None,
        )
    bandwidth = read_bandwidth(threads) if backend.startswith(CPU_BACKENDS) else None
    results = []
    for name, generations in taken.items():
        result = _result(name, generations, manifest, backends[name], budget, prompt_len, new_tokens, percentiles)
        same = generations[0].tokens == taken[against[0]][0].tokens if drafting.lossless else None
        results.append(replace(result, quality=(scores or {}).get(name, {}), same_tokens=same))
    settings = _settings(manifest, budget, drafting)
    settings |= {"prompt_len": prompt_len, "new_tokens": new_tokens, "runs": runs, "warmup": warmup}
    settings |= {"quality_tokens": quality_tokens, "backend": backend, "prefill": prefill, "prepack": prepack}
    average = np.mean if drafting.lossless else np.median
    pairs = [{"name": own, "baseline": name, "speedup": speedup(taken[name], taken[own], average)} for name in against]
    return Report(environment(threads), settings, results, pairs, bandwidth, _predictor_cost(results[0]))


def _result(
    name: str,
    generations: Sequence[Generation],
    manifest: Manifest,
    backend: str,
    budget: Budget,
    prompt_len: int,
    new_tokens: int,
    percentiles: Sequence[float],
) -> Result:
    """Return what the generations of a contender show, without its quality."""
    summary = summarise(generations, sorted({50, 90, 99, *percentiles}))
    recomputed = _recomputed(generations, budget)
    traffic = None
    if name != LOSSLESS:
        read = replace(budget, shortlist=round(recomputed["mean"])) if recomputed else budget
        traffic = traffic_of(manifest, backend, read, prompt_len, new_tokens, summary.fired)
    lossless = [generation.lossless for generation in generations if generation.lossless]
    return Result(name, summary, traffic, recomputed_rows=recomputed, lossless=lossless)


def _settings(manifest: Manifest, budget: Budget, drafting: Drafting) -> dict[str, Any]:
    """The part of the report's settings that the bundle and the request decide."""
    return {
        "lossless": drafting.lossless,
        "draft_length": drafting.draft_length,
        "model": manifest.model,
        "dtype": manifest.dtype,
        "weight_dtype": manifest.weight_dtype or manifest.dtype,
        "neuron_budget": budget.neurons,
        "head_budget": budget.heads,
        "shortlist": budget.shortlist,
        "certify": budget.certify,
        "rest": budget.rest_with(manifest.rest == "shadow"),
        "predictor": manifest.predictor.get("kind"),
    }


def _recomputed(generations: Sequence[Generation], budget: Budget) -> dict[str, float]:
    rows = RecomputedRows(budget)
    for generation in generations:
        if generation.recomputed:
            rows.add(np.array(generation.recomputed))
    return rows.summary()


class Texts:
    """The prompt and the two texts on which quality is measured."""

    def __init__(self, prompt: list[int], documentation: list[int], baseline: str) -> None:
        self.prompt = prompt
        self._documentation = documentation
        self._baseline = baseline

    def score(
        self, workers: Mapping[str, Worker], taken: Mapping[str, Sequence[Generation]], advance: Any
    ) -> dict[str, dict[str, float]]:
        """Measure the quality of each contender, teacher-forced after the prompt.

        Perplexity is measured on the documentation. Agreement is the share of positions in both texts with the
        same most probable next token as the baseline.
        """
        generated = taken[self._baseline][0].tokens[: len(self._documentation)]
        answers: dict[str, list[dict[str, Any]]] = {}
        for name, worker in workers.items():
            answers[name] = []
            for continuation in (self._documentation, generated):
                answers[name].append(worker.ask("score", context=self.prompt, continuation=continuation))
                advance(1)
        return {name: _quality(given, answers[self._baseline]) for name, given in answers.items()}


def _quality(given: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    own, other = (np.concatenate([answer["predicted"] for answer in answers]) for answers in (given, baseline))
    return {
        "next_token_agreement": float(np.mean(own == other)),
        "perplexity": float(np.exp(np.mean(given[0]["nll"]))),
        "tokens": len(own),
    }


def _check(
    manifest: Manifest,
    against: Sequence[str],
    prompt_len: int,
    new_tokens: int,
    runs: int,
    warmup: int,
    quality_tokens: int,
) -> None:
    if not against or len(set(against)) < len(against) or {SPARSE, LOSSLESS} & set(against):
        raise UserError(
            f"cannot compare with {', '.join(against) or 'nothing'}",
            "give each backend once, for example --against ort-dense",
        )
    for name, value, least in (
        ("prompt length", prompt_len, 1),
        ("number of new tokens", new_tokens, 2),
        ("number of runs", runs, 1),
        ("number of warm-up runs", warmup, 0),
        ("number of quality tokens", quality_tokens, 0),
    ):
        if value < least:
            raise UserError(f"the {name} is {value}", f"give at least {least}")
    for name, value in (("new tokens", new_tokens), ("quality tokens", quality_tokens)):
        if prompt_len + value > manifest.spec.max_seqlen:
            raise UserError(
                f"a prompt of {prompt_len} and {value} {name} exceed the model's {manifest.spec.max_seqlen} positions",
                f"ask for fewer {name}, or a shorter prompt",
            )


def _predictor_cost(result: Result) -> dict[str, float]:
    parts = result.summary.parts_ms
    if "predictor" not in parts or not result.traffic:
        return {}
    return {
        "ms_per_token": parts["predictor"],
        "share_of_step": parts["predictor"] / sum(parts.values()),
        "bytes_per_token": result.traffic.parts["predictor"],
    }
