"""Shared code of the benchmark scripts: their argument parser, and the exit after a user error."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from shadowllm.commands.options import output_file
from shadowllm.errors import UserError

P = ParamSpec("P")


def script_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring, for ``python -m shadowllm.benchmarks.NAME``."""
    return argparse.ArgumentParser(
        prog=f"python -m shadowllm.benchmarks.{name}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_json(
    parser: argparse.ArgumentParser, purpose: str = "also write the results to this file", required: bool = False
) -> None:
    """Add the option ``--json``. A file that cannot be written is refused before anything is measured."""
    parser.add_argument("--json", type=output_file, required=required, metavar="FILE", help=purpose)


def script(main: Callable[P, None]) -> Callable[P, int]:
    """Make a function a program: it returns 0, or for a `UserError` prints one line to stderr and returns 1."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    return run
