"""Refuses outputs that would replace what a command reads."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from shadowllm.errors import UserError


def _is_made_by_us(path: Path) -> bool:
    """Whether a file has traces or a predictor."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            return "shadowllm" in (file.metadata() or {})
    except (OSError, SafetensorError):
        return False


def _is_report(path: Path) -> bool:
    """Whether a file is a report as ``--json`` writes it."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(report, dict) and "environment" in report


def _is_figure(path: Path) -> bool:
    return path.suffix.lower() == ".png"


# Options that name a file to write, and whether a file that exists is of the same kind.
OUTPUTS = {"output": _is_made_by_us, "json": _is_report, "plot": _is_figure}


def check_outputs(args: argparse.Namespace) -> None:
    """Check the files that a command will write, before any work is done.

    A file of the same kind may be replaced, also in a folder that the command reads.

    Raises:
        UserError: an output is a file that the command reads, another file of a folder that it reads, or given twice.
    """
    outputs = {name: value for name in OUTPUTS if isinstance(value := getattr(args, name, None), Path)}
    if len({output.resolve() for output in outputs.values()}) < len(outputs):
        raise UserError(f"{next(iter(outputs.values()))} is named for two outputs", "give each a file of its own")
    for name, output in outputs.items():
        for path in _read(args) if output.is_file() else ():
            if path.is_file() and path.samefile(output):
                raise UserError(f"{output} is read by this command", "name another file to write")
            if path.is_dir() and output.resolve().is_relative_to(path.resolve()) and not OUTPUTS[name](output):
                raise UserError(f"{output} is a file of {path}, which this command reads", "name another file to write")


def _read(args: argparse.Namespace) -> Iterator[Path]:
    """Files and folders that are named by the arguments which are no outputs."""
    for name, value in vars(args).items():
        for one in value if isinstance(value, list | tuple) else [value]:
            if name in OUTPUTS or not isinstance(one, str | Path):
                continue
            try:
                exists = Path(one).exists()
            except (OSError, ValueError):  # a text that cannot be a name
                continue
            if exists:
                yield Path(one)
