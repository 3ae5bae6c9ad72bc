"""Refuses outputs that would replace what a command reads."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from shadowllm.errors import UserError

OUTPUTS = ("output", "json", "plot")


def check_outputs(args: argparse.Namespace) -> None:
    """Check the files that a command will write, before any work is done.

    Reports and figures may be replaced, also in a folder that the command reads.

    Raises:
        UserError: an output is a file that the command reads, another file of a folder that it reads, or given twice.
    """
    outputs = [value for name in OUTPUTS if isinstance(value := getattr(args, name, None), Path)]
    if len({output.resolve() for output in outputs}) < len(outputs):
        raise UserError(f"{outputs[0]} is named for two outputs", "give each a file of its own")
    for output in filter(Path.is_file, outputs):
        for path in _read(args):
            if path.is_file() and path.samefile(output):
                raise UserError(f"{output} is read by this command", "name another file to write")
            if path.is_dir() and output.resolve().is_relative_to(path.resolve()) and not _is_ours(output):
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


def _is_ours(path: Path) -> bool:
    """Whether a file is a figure, or a report as `--json` writes it."""
    if path.suffix == ".png":
        return True
    try:
        report = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else None
    except ValueError:
        return False
    return isinstance(report, dict) and "environment" in report
