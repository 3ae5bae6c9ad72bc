"""What `shadowllm inspect` finds in a bundle, and how it shows it."""

from __future__ import annotations

import shutil

import pytest

from shadowllm.commands import describe, inspect


@pytest.mark.parametrize(
    ("plugins", "shown"),
    [
        ({}, "none"),
        ({"layer 1": ["A"], "layer 2": ["A"], "layer 3": ["A"]}, "layers 1-3: A"),
        ({"layer 1": ["A"], "layer 3": ["A"]}, "layer 1: A; layer 3: A"),
        ({"layer 9": ["A"], "layer 10": ["A"], "logits": ["A"]}, "layers 9-10: A; logits: A"),
        ({"layer 1": ["A"], "layer 2": ["A", "B"]}, "layer 1: A; layer 2: A, B"),
    ],
)
def test_only_neighbours_are_one_range(plugins, shown):
    assert inspect._layers(plugins) == shown


def test_engines_of_a_build_that_has_not_ended_are_left_out(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(), folder)
    unfinished = folder / "engines" / ".tensorrt_rtx.partial-1"
    unfinished.mkdir(parents=True)
    (unfinished / "body.engine").write_bytes(b"a part")
    assert describe.bundle(folder)["engines"] == {}
