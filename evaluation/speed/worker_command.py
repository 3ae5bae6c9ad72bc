"""The command line of a worker process that serves a session; see `evaluation.speed.worker`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shadowllm.bundle.manifest import Manifest
from shadowllm.child import module_command
from shadowllm.draft_config import Drafting
from shadowllm.models.sparsity import Budget, format_fractions


def drafting_options(drafting: Drafting, manifest: Manifest) -> list[str]:
    """Return the options of a worker that decodes losslessly; none if it does not."""
    if not drafting.lossless:
        return []
    given = [] if drafting.draft_length is None else ["--draft-length", str(drafting.draft_length)]
    tuned = ["--tuned", json.dumps(asdict(manifest.tuned_drafts))] if manifest.tuned_drafts else []
    return ["--lossless", *tuned, *given]


def session_command(
    bundle: Path, backend: str, budget: Budget, threads: int | None, more: Sequence[str] = ()
) -> tuple[str, ...]:
    """Return the command line of a worker process that serves a session; ``more`` are further options of it."""
    options = {"--threads": threads, "--shortlist": budget.shortlist, "--rest": budget.rest}
    certify = ("--certify",) if budget.certify else ()
    given = [text for name, value in options.items() if value for text in (name, str(value))]
    return module_command(
        "shadowllm.evaluation.speed.worker",
        str(bundle),
        backend,
        "--neuron-budget",
        format_fractions(budget.neurons),
        "--head-budget",
        format_fractions(budget.heads),
        *given,
        *certify,
        *more,
    )
