"""Flags have the names, limits, defaults and help of the configurations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Literal

import pytest

from shadowllm import config, draft_config, eval_config
from shadowllm.commands.flags import add_flags, attributes, build, values
from shadowllm.config_fields import KEY, check_values, option
from shadowllm.errors import UserError
from shadowllm.predictor.criteria import CRITERIA
from shadowllm.predictor.losses import LOSSES

CONFIGS = [
    found
    for module in (config, draft_config, eval_config)
    for found in vars(module).values()
    if isinstance(found, type) and is_dataclass(found) and found.__module__ == module.__name__
]


@dataclass(frozen=True)
class Sample:
    """Not of the command line.

    Attributes:
        count: how many
            of 100% of them.
        sizes: what sizes.
        way, other: how.

    Raises:
        UserError: never.
    """

    required: str
    count: int = option(3, least=2, most=9)
    sizes: Sequence[int] = option((), flag="--size", least=1, otherwise="all")
    way: Literal["up", "down"] = option("up", metavar="WAY")
    place: Path | None = option(None)
    share: float = option(0.5)
    quiet: bool = option(False)
    check: bool = option(True, flag="--skip-check", help="do not check")
    kind: str = option("float32", values={"fp32": "float32", "fp16": "float16"})
    other: int = 7


def parsed(*arguments: str, **keywords) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser, Sample, **keywords)
    return parser.parse_args(arguments)


def test_nothing_given_is_the_defaults():
    assert build(parsed(), Sample, required="x") == Sample("x")
    assert build(parsed(unset=True), Sample, required="x") == Sample("x")
    assert values(parsed(unset=True), Sample) == {}


def test_everything_given():
    flags = ["--count", "4", "--size", "1", "2", "--way", "down", "--place", "p"]
    flags += ["--share", "0.25", "--quiet", "--skip-check", "--kind", "fp16"]
    right = Sample("x", 4, [1, 2], "down", Path("p"), 0.25, True, False, "float16")
    assert build(parsed(*flags), Sample, required="x") == right


def test_help():
    parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=200))
    add_flags(parser, Sample)
    told = " ".join(parser.format_help().split())
    for words in (
        "--count COUNT how many of 100% of them (default: 3)",
        "what sizes (default: all)",
        "--way WAY how (default: up)",
        "(default: 0.5)",
        "do not check --",
        "{fp32,fp16}",
    ):
        assert words in told


@pytest.mark.parametrize("given", [["--count", "1"], ["--count", "x"], ["--size", "1", "0"], ["--share", "half"]])
def test_limits(given):
    with pytest.raises(UserError, match=f"{given[0]} is "):
        parsed(*given)
    with pytest.raises(UserError, match="count is 10"):
        check_values(Sample("x", count=10))
    with pytest.raises(UserError, match="sizes is 0"):
        check_values(Sample("x", sizes=(3, 0)))
    for value in ("12", 12):  # a text has letters, which are no list of values
        with pytest.raises(UserError, match=r"sizes is '?12'?; give a list"):
            check_values(Sample("x", sizes=value))


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_every_field_is_documented(kind):
    assert set(attributes(kind)) == {one.name for one in fields(kind)}


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_a_flag_has_help(kind):
    parser = argparse.ArgumentParser()
    add_flags(parser, kind)
    made = [action for action in parser._actions if action.dest != "help"]
    assert len(made) == sum(KEY in one.metadata for one in fields(kind))
    assert all(action.help for action in made)


def test_the_losses_and_criteria_are_those_there_are():
    assert set(config.LOSSES) == set(LOSSES)
    assert set(config.CRITERIA) == set(CRITERIA)
