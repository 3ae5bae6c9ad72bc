"""Evaluate a bundle over selectors and budgets: on text, or on tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shadowllm.bundle.manifest import Manifest, read_manifest
from shadowllm.bundle.weights import read_weights
from shadowllm.errors import UserError
from shadowllm.eval_config import Evaluation
from shadowllm.evaluation import quality_report
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.quality import Result, combinations, evaluate
from shadowllm.evaluation.speed.environment import environment
from shadowllm.evaluation.uniform_quantisation import evaluate_uniform
from shadowllm.malloc import keep_freed_memory
from shadowllm.models.sparsity import Budget, Fractions, Rest
from shadowllm.predictor.calibration import token_windows
from shadowllm.progress import progress
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation on text.

    Attributes:
        manifest: the bundle's manifest, with the head unit that was evaluated.
        tokens: number of evaluated tokens.
        seqlen: tokens of a window.
        results: the dense model first, then each selector at each budget.
        uniform: the dense model at equal bytes: at the numbers of bits that read as many bytes per token.
    """

    manifest: Manifest
    options: Evaluation
    tokens: int
    seqlen: int
    results: Sequence[Result]
    uniform: Mapping[int, Result]

    def to_dict(self, layers: bool = False) -> dict[str, Any]:
        """Return the JSON that ``shadowllm eval --json`` writes; see `quality_report.rows`."""
        settings = {
            "model": self.manifest.model,
            "text": list(self.options.texts) or "Python module documentation",
            "tokens": self.tokens,
            "seqlen": self.seqlen,
            "head_unit": self.manifest.spec.head_unit,
            "aggregate": self.options.aggregate,
            "predictor": self.manifest.predictor,
        }
        found = {"settings": settings, "environment": environment(torch.get_num_threads())}
        return quality_report.rows(self.results, self.manifest, layers, self.uniform) | found


def evaluate_text(bundle: Path, options: Evaluation) -> Evaluated:
    """Measure the teacher-forced quality of each selector at each budget.

    Raises:
        UserError: no bundle, a damaged file in it, or a text, selector or budget that cannot be used.
    """
    keep_freed_memory()
    manifest = read_manifest(bundle)
    manifest = replace(manifest, spec=replace(manifest.spec, head_unit=options.head_unit or manifest.spec.head_unit))
    windows = _windows(bundle, manifest, options)
    read = read_weights(bundle, manifest)
    own = manifest.predictor["kind"]
    selectors = options.selectors or list(dict.fromkeys(("static", own, "oracle")))
    swept = settings(manifest, options)
    passes = len(windows) * (1 + len(selectors) * len(swept.budgets()))
    with progress("Evaluating", passes) as advance:
        results = evaluate(
            manifest.spec,
            read.sparse,
            read.predictor,
            selectors,
            windows,
            head_budgets=swept.heads,
            neuron_budgets=swept.neurons,
            shortlists=swept.shortlists,
            rests=swept.rests,
            copies=read.copies,
            certificate=read.certificate if swept.certify else None,
            aggregate=options.aggregate,
            advance=advance,
        )
    rivals = sorted({bits for result in results[1:] if (bits := quality_report.rival_bits(result, manifest))})
    with progress("Evaluating uniform quantisation", len(windows) * len(rivals)) as advance:
        uniform = evaluate_uniform(manifest.spec, read.sparse, rivals, windows, advance)
    return Evaluated(manifest, options, windows.numel(), windows.shape[1], results, uniform)


def evaluate_tasks(
    bundle: Path, tasks: Sequence[str], options: Evaluation, limit: int | None = None
) -> list[dict[str, Any]]:
    """Run tasks of lm-evaluation-harness, dense and with each selector at each budget; see `lm_tasks.run_tasks`.

    Args:
        options: selectors and budgets; options of the text are not used. The default selector is the bundle's.

    Raises:
        UserError: the harness is not installed, or cannot run a task.
    """
    try:
        from shadowllm.evaluation.lm_tasks import run_tasks
    except ImportError as error:
        raise UserError(f"--tasks needs lm-evaluation-harness ({error})", "pip install 'shadowllm[lm-eval]'") from error
    manifest = read_manifest(bundle)
    selectors = options.selectors or [manifest.predictor["kind"]]
    selections = [(name, budget) for name in selectors for budget in settings(manifest, options).budgets()]
    return list(run_tasks(bundle, tasks, selections, limit))


@dataclass(frozen=True)
class Settings:
    """The values of each field of a budget that are evaluated, in all combinations, and whether all are certified."""

    heads: Sequence[Fractions]
    neurons: Sequence[Fractions]
    shortlists: Sequence[int | None]
    rests: Sequence[Rest | None]
    certify: bool

    def budgets(self) -> list[Budget]:
        """Return all combinations."""
        return combinations(self.heads, self.neurons, self.shortlists, self.rests, self.certify)


def settings(manifest: Manifest, options: Evaluation) -> Settings:
    """Return the values to evaluate. The bundle's own are the default."""
    own = manifest.budget
    return Settings(
        options.heads or [own.heads],
        options.neurons or [own.neurons],
        [rows if rows < manifest.spec.vocab_size else None for rows in options.shortlist] or [own.shortlist],
        options.rest or [own.rest],
        options.certify or own.certify,
    )


def _windows(bundle: Path, manifest: Manifest, options: Evaluation) -> Tensor:
    """Return the tokens to evaluate, int64 ``(windows, seqlen)``."""
    encode = plain_encoder(load_tokenizer(bundle, manifest), manifest)
    seqlen = min(options.seqlen, manifest.spec.max_seqlen)
    limit = options.tokens // seqlen
    if options.texts:
        return token_windows(options.texts, encode, seqlen, limit)
    return torch.tensor(passage(encode, limit * seqlen)).view(limit, seqlen)
