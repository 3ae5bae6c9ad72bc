"""The table of families: in the documentation, on the command line, and in agreement with the specs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from shadowllm.cli import main
from shadowllm.errors import UserError
from shadowllm.models.registry import FAMILIES, REFUSED, load_model
from shadowllm.models.supported import markdown
from tests import conftest
from tests.models.checkpoints import copied

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text()


def test_the_page_has_the_table_of_the_code():
    assert markdown() in PAGE


def test_the_command_prints_every_family(capsys):
    assert main(["families"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in [*FAMILIES, *REFUSED])
    assert main(["families", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["family"] for row in found["families"]] == sorted(FAMILIES)
    assert {"yarn", "longrope"} < set(found["rope_scalings"])
    assert {"relu", "silu"} < set(found["activations"])


def test_every_family_has_a_tiny_model_or_a_relative():
    tested = {family for family, _ in (conftest.VARIANTS | conftest.FAMILIES).values()}
    assert FAMILIES.keys() - tested == {"bamboo", "minicpm", "sparsellama"}  # in test_published_configs.py


@pytest.mark.parametrize("variant", conftest.FAMILIES)
def test_the_table_says_whether_heads_are_selected(checkpoint, variant):
    spec = load_model(checkpoint(variant))[0]
    assert FAMILIES[spec.family].heads == spec.selects_heads


@pytest.mark.parametrize("family", REFUSED)
def test_known_families_are_refused_with_the_reason(checkpoint, tmp_path, family):
    folder = copied(checkpoint("llama-gqa"), tmp_path / "model", model_type=family)
    with pytest.raises(UserError, match=re.escape(REFUSED[family])):
        load_model(folder)
