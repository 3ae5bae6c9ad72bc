"""Options that several commands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest

from shadowllm.commands import options
from shadowllm.errors import UserError
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


@pytest.mark.parametrize("exists", [True, False])
def test_a_file_that_may_not_be_written_is_refused_at_once(tmp_path, monkeypatch, exists):
    path = tmp_path / "results.json"
    if exists:
        path.touch()
    assert options.output_file(str(path)) == path
    locked = path if exists else tmp_path
    monkeypatch.setattr(os, "access", lambda place, mode: (place, mode) != (locked, os.W_OK))
    with pytest.raises(UserError, match=r"cannot write .*results.json: no permission"):
        options.output_file(str(path))


def test_a_file_in_a_folder_that_may_not_be_changed_is_refused_at_once(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.touch()
    monkeypatch.setattr(os, "access", lambda place, mode: (place, mode) != (tmp_path, os.W_OK))
    with pytest.raises(UserError, match="no permission in its folder"):
        options.output_file(str(path))
    assert options.output_file("/dev/null") == Path("/dev/null")


def test_a_file_that_is_replaced_is_a_regular_one(tmp_path, monkeypatch):
    target, link = tmp_path / "predictor", tmp_path / "link"
    target.touch()
    link.symlink_to(target)
    assert options.replaced_file(str(link)) == target
    with pytest.raises(UserError, match="/dev/null is no regular file"):
        options.replaced_file("/dev/null")
    monkeypatch.setattr(os, "access", lambda place, mode: place != tmp_path)
    with pytest.raises(UserError, match="no permission in its folder"):
        options.replaced_file(str(target))


def test_a_figure_without_matplotlib_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs matplotlib"):
        options.figure_file(str(tmp_path / "figure.png"))


def test_compute_capabilities_with_and_without_a_point():
    parser = argparse.ArgumentParser()
    options.add_engines(parser)
    assert parser.parse_args(["--sm", "8.9", "89", "12.0", "7.5"]).sm == [89, 89, 120, 75]
    for text in ("8.91", "8.", "eight"):
        with pytest.raises(UserError, match="give a whole number"):
            parser.parse_args(["--sm", text])
