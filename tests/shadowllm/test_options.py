"""Options that several commands share."""

from __future__ import annotations

import argparse

import pytest

from shadowllm.commands import options
from shadowllm.models.sparsity import Budget


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        ([], None),
        (["--rest", "shadow"], None),
        (["--exact"], Budget()),
        (["--neuron-budget", "0.1"], Budget(neurons=0.1)),
        (["--shortlist", "64", "--rest", "shadow"], Budget(shortlist=64, rest="shadow")),
        (["--neuron-budget", "0.5", "--head-budget", "0.75"], Budget(neurons=0.5, heads=0.75)),
    ],
    ids=str,
)
def test_parts_of_an_exported_budget_that_are_not_given_are_everything(given, budget):
    parser = argparse.ArgumentParser()
    options.add_budget(parser, requested=False)
    assert options.export_budget(parser.parse_args(given)) == budget
