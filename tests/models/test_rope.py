"""Compares every RoPE scaling with transformers, in both spellings, at positions far beyond the trained length."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowllm.errors import UserError
from shadowllm.models.decoder import Decoder
from shadowllm.models.registry import load_model
from shadowllm.models.rope import RopeSpec, rotated_first
from tests.models.checkpoints import copied, edit_json

FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.4, 2.0, 3.0], "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
TRAINED = {"original_max_position_embeddings": 4096}
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | TRAINED,
    "yarn": {"factor": 16.0} | TRAINED,
    "yarn-mscale": {"factor": 16.0, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16} | TRAINED,
    "yarn-attention": {"factor": 16.0, "attention_factor": 1.4, "truncate": False} | TRAINED,
    "longrope": FACTORS | {"original_max_position_embeddings": 49152},
}


def written(checkpoint, target, name, spelling):
    """A tiny Llama with this scaling and room for 65536 positions."""
    folder = copied(checkpoint("llama-mha"), target / "model", max_position_embeddings=65536)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters")
    scaling = {"rope_type" if spelling == "new" else "type": name.partition("-")[0]} | SCALINGS[name]
    if spelling == "new":
        config["rope_parameters"] = {"rope_theta": 500.0} | scaling
    else:
        config |= {"rope_scaling": scaling, "rope_theta": 500.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.filterwarnings("ignore:texts are limited")
@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("name", SCALINGS)
def test_long_positions_match_transformers(checkpoint, tmp_path, name, spelling):
    folder = written(checkpoint, tmp_path, name, spelling)
    spec, weights, _ = load_model(folder)
    ours, theirs = Decoder(spec, weights.load()), AutoModelForCausalLM.from_pretrained(folder)
    input_ids = torch.randint(0, spec.vocab_size, (1, 24), generator=torch.Generator().manual_seed(1))
    for first in (0, 8192, 40960):
        # Half of the tokens are far from the others, so that distances are long too.
        positions = torch.cat((torch.arange(12), torch.arange(first, first + 12) + 12))[None]
        with torch.no_grad():
            found, expected = (
                ours(input_ids, positions),
                theirs(input_ids, position_ids=positions, attention_mask=torch.ones(1, 1, 24, 24).tril().bool()).logits,
            )
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_the_scalings_differ(checkpoint, tmp_path):
    """Otherwise the test above would show nothing."""
    ropes = {
        load_model(written(checkpoint, tmp_path / name, name, "new"))[0].rope
        for name in ("default", "linear", "llama3", "yarn", "yarn-mscale", "yarn-attention")
    }
    assert len(ropes) == 6


@pytest.mark.parametrize(("name", "limit"), [("longrope", 49152), ("dynamic", 65536), ("yarn", 65536)])
def test_texts_end_where_the_frequencies_would_change(checkpoint, tmp_path, name, limit, recwarn):
    assert load_model(written(checkpoint, tmp_path, name, "new"))[0].max_seqlen == limit
    said = [str(w.message) for w in recwarn if "texts are limited" in str(w.message)]
    assert [f"limited to {limit} tokens" in text for text in said] == ([] if name == "yarn" else [True])


@pytest.mark.parametrize(("name", "longest"), [("yarn", 65536), ("linear", 4096), ("llama3", 4096)])
def test_yarn_may_be_added_without_a_new_length(checkpoint, tmp_path, name, longest):
    folder = written(checkpoint, tmp_path, name, "new")
    edit_json(folder / "config.json", max_position_embeddings=4096)
    assert load_model(folder)[0].max_seqlen == longest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": [1.0]} | TRAINED, "attention_factor must be"),
        ({"rope_type": "proportional"}, "'proportional' is not supported"),
        ({"rope_type": "linear"}, "'linear'.*factor"),
        ({"rope_type": "yarn", "factor": -1.0}, "factor must be a positive number, got -1"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": float("nan")}, "attention_factor must be"),
        ({"rope_type": "longrope", "short_factor": [1.0]} | TRAINED, "'longrope'.*long_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [0.0]} | TRAINED, "long_factor must be"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 5, "long_factor": [1.0]} | TRAINED, "cannot compute"),
        ({"partial_rotary_factor": 0.5}, "partial rotary embeddings are not supported in llama"),
    ],
)
def test_what_is_not_usable_is_refused_by_name(checkpoint, tmp_path, changes, words):
    folder = copied(checkpoint("llama-mha"), tmp_path / "model", rope_parameters={"rope_theta": 500.0} | changes)
    with pytest.raises(UserError, match=words):
        load_model(folder)


def test_a_part_of_a_head_is_rotated_as_in_transformers():
    """The reordered head, rotated by our rule, equals the stored head, rotated by Hugging Face's and then reordered."""
    from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

    rope, order = RopeSpec((1.0, 0.3), amplitude=1.2), rotated_first(10, 4)
    stored = torch.randn(7, 10, generator=torch.Generator().manual_seed(1))
    cos, sin = (torch.from_numpy(table) for table in rope.tables(10, 7))
    whole = (table[None, :, :2].repeat(1, 1, 2) for table in (cos, sin))
    expected = apply_rotary_pos_emb(stored[None, None], stored[None, None], *whole)[0][0, 0][:, order]
    first, second = stored[:, order].chunk(2, dim=-1)
    found = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    torch.testing.assert_close(found, expected)
    assert np.array_equal(rope.amplitudes(10), np.float32([1.2, 1.2, 1, 1, 1]))
