"""Choice of the budget and the length of drafts with which lossless decoding is fastest on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TypedDict, Unpack

from shadowllm.bundle.manifest import Manifest, read_manifest
from shadowllm.bundle.weights import read_weights
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget, describe_fractions
from shadowllm.predictor.calibration import measuring_windows
from shadowllm.progress import progress
from shadowllm.runtime.generation.draft_length import MOST, DraftLength, Round, expected_tokens
from shadowllm.runtime.generation.generate import generate
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
from shadowllm.runtime.ort.session import OrtSession

# Budgets to try beside the bundle's own: neurons, heads, shortlist.
MIXED = ((0.3, 1.0, 4096), (0.1, 1.0, 2048), (0.05, 1.0, 1024))
DROPPED = ((0.5, 1.0, None), (0.3, 1.0, None))


class Options(TypedDict, total=False):
    """Options of `measure_drafts`."""

    texts: Sequence[str]
    tokens: int
    seqlen: int
    prompts: Sequence[Sequence[int]]
    threads: int | None
    prepack: bool


@dataclass(frozen=True)
class Measured:
    """What drafts of a budget give.

    Attributes:
        acceptance: probability that a drafted token is accepted, if those before it are.
        draft_seconds: of one draft step.
        verify_seconds: of a dense step, by its number of positions; 1 is plain dense decoding.
    """

    budget: Budget
    acceptance: float
    draft_seconds: float
    verify_seconds: dict[int, float]

    def speedup(self, length: int) -> float:
        """Return how many times faster than dense decoding drafts of a length are."""
        seconds = length * self.draft_seconds + self.verify_seconds[length + 1]
        return expected_tokens(self.acceptance, length) * self.verify_seconds[1] / seconds

    @property
    def best_length(self) -> int:
        """The fastest length of those that were measured; 0 if no draft pays."""
        return max((size - 1 for size in self.verify_seconds), key=self.speedup)

    def __str__(self) -> str:
        budget, length = self.budget, self.best_length
        rows = f", {budget.shortlist} rows of the output table" if budget.shortlist else ""
        return (
            f"{describe_fractions(budget.neurons)} of neurons, {describe_fractions(budget.heads)} of heads{rows}: "
            f"acceptance {self.acceptance:.0%}, {1e3 * self.draft_seconds:.2f} ms per drafted token, "
            f"{1e3 * self.verify_seconds[1]:.2f} ms per dense step; best with {length} tokens: "
            f"{self.speedup(length):.2f} times as fast as dense"
        )


class _EachLength(DraftLength):
    """Drafts of 0 to `MOST` tokens in turn, and a record of all rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[Round] = []
        self._lengths = cycle(range(MOST + 1))

    def choose(self) -> int:
        return next(self._lengths)

    def observe(self, done: Round) -> None:
        super().observe(done)
        self.rounds.append(done)


def tune_drafts(bundle: Path, **options: Unpack[Options]) -> tuple[Manifest, list[Measured]]:
    """Measure drafts of several budgets with `measure_drafts`, and record the fastest in the manifest.

    Returns:
        The new manifest, and what was measured of each budget.

    Raises:
        UserError: as `measure_drafts`.
    """
    found = measure_drafts(bundle, **options)
    tuned = with_fastest(read_manifest(bundle), found)
    tuned.write(bundle)
    return tuned, found


def with_fastest(manifest: Manifest, found: Sequence[Measured]) -> Manifest:
    """Return a manifest that drafts with the fastest of the measured budgets, at its best length."""
    best = max(found, key=lambda measured: measured.speedup(measured.best_length))
    length = best.best_length
    measured = {
        "acceptance": best.acceptance,
        "speedup": best.speedup(length),
        "draft_ms": 1e3 * best.draft_seconds,
        "verify_ms": 1e3 * best.verify_seconds[length + 1],
        "dense_ms": 1e3 * best.verify_seconds[1],
    }
    return replace(manifest, drafting={"budget": asdict(best.budget), "draft_length": length, "measured": measured})


def measure_drafts(
    bundle: Path,
    *,
    texts: Sequence[str] = (),
    tokens: int = 2048,
    seqlen: int = 128,
    prompts: Sequence[Sequence[int]] = (),
    threads: int | None = None,
    prepack: bool = False,
) -> list[Measured]:
    """Measure drafts of the bundle's budget and of others on ONNX Runtime.

    The first half of each window of text is a prompt, which is continued greedily by as many tokens. Acceptance and
    times are those of the continuations.

    Args:
        texts: files or dataset ids; empty for the built-in text.
        tokens: number of tokens of the text.
        seqlen: tokens of a window.
        prompts: token ids, used instead of a text. A bundle without a tokenizer needs them.
        threads, prepack: as for `open_session`.

    Raises:
        UserError: no bundle, a text that cannot be used, or too little of it.
    """
    manifest = read_manifest(bundle)
    prompts, budgets = prompts or _prompts(bundle, manifest, texts, tokens, seqlen), _candidates(manifest)
    found = []
    with (
        OrtSession(bundle, "sparse", threads=threads, prepack=prepack) as session,
        progress("Measuring drafts", len(budgets) * len(prompts)) as advance,
    ):
        for budget in budgets:
            session.set_budget(budget)
            lengths = _EachLength()
            for prompt in prompts:
                new_tokens = min(len(prompt), manifest.spec.max_seqlen - len(prompt))
                for _ in generate(session, [prompt], new_tokens, draft_length=lengths):
                    pass
                advance(1)
            found.append(_summary(budget, lengths.rounds))
    return found


def _prompts(bundle: Path, manifest: Manifest, texts: Sequence[str], tokens: int, seqlen: int) -> list[list[int]]:
    encode = plain_encoder(load_tokenizer(bundle, manifest), manifest)
    length = min(seqlen, manifest.spec.max_seqlen)
    weights = dict(read_weights(bundle, manifest).sparse)
    found = measuring_windows(
        manifest.spec, weights, encode, manifest.predictor, texts=texts, tokens=tokens, seqlen=length
    )
    return [list(map(int, row)) for row in found[:, : length // 2]]


def _candidates(manifest: Manifest) -> list[Budget]:
    """The bundle's own budget and those to try beside it, each once."""
    dial = MIXED if manifest.rest == "shadow" else DROPPED
    vocab_size = manifest.spec.vocab_size
    found = [
        Budget(neurons=neurons, heads=heads, shortlist=min(rows, vocab_size) if rows else None)
        for neurons, heads, rows in dial
    ]
    return list(dict.fromkeys([manifest.budget, *found]))


def _summary(budget: Budget, rounds: Sequence[Round]) -> Measured:
    """Summarise rounds. The first of each length is slower, so times of verification leave it out.

    Raises:
        UserError: too few rounds.
    """
    by_length: dict[int, list[Round]] = {}
    for done in rounds:
        by_length.setdefault(done.length, []).append(done)
    times = {length + 1: found[1:] for length, found in by_length.items() if len(found) > 1}
    drafts = [done for done in rounds if done.length]
    if 1 not in times or len(times) < 2:
        raise UserError("the text is too short to measure drafts on it", "raise --tokens, or give more --text")
    tested = sum(min(n + 1, done.length) for done in drafts for n in done.accepted)
    return Measured(
        budget,
        sum(n for done in drafts for n in done.accepted) / tested,
        median(done.draft_seconds / done.length for done in drafts),
        {size: median(done.verify_seconds for done in found) for size, found in sorted(times.items())},
    )
