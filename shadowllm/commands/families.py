"""``shadowllm families``"""

from __future__ import annotations

import argparse
import json

EPILOG = """examples:
  shadowllm families
  shadowllm families --json

docs/families.md explains the columns, and how to add a family."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    """Print the table of families, and what all of them support."""
    from rich.console import Console
    from rich.table import Column, Table

    from shadowllm.models.supported import describe, rows

    found = describe()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    names = ("model_type", "models", "beside Llama's layers", "heads", "GGUF", "engines")
    table = Table(*(Column(name, overflow="fold") for name in names), box=None)
    for row in rows():
        heads = "selected" if row.heads else "all active"
        table.add_row(row.family, row.models, row.differences, heads, *(_yes(x) for x in (row.gguf, row.engines)))
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print(f"\nRoPE scalings: {', '.join(found['rope_scalings'])}")
    console.print(f"activations: {', '.join(found['activations'])}")
    for name, reason in found["refused"].items():
        console.print(f"refused: {name}, because {reason}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"
