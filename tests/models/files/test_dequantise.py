"""Quantised weights as floats: what the config of compressed-tensors says about them counts."""

from __future__ import annotations

import pytest
import torch

from shadowllm.errors import UserError
from shadowllm.models.files.dequantise import unpacked
from shadowllm.models.registry import load_model
from tests.models.checkpoints import copied, edit_json, rewrite

Q = "model.layers.1.self_attn.q_proj"
GROUPS = torch.arange(64) // 16
INTEGERS = torch.full((64,), -8.0).index_fill(0, torch.arange(0, 64, 8), 1.0)  # a row of the packed weight


@pytest.fixture
def folder(checkpoint, tmp_path):
    """Packed integers of 4 bits in groups of 16 columns, whose scales are 1, 2, 3 and 4."""
    folder = copied(checkpoint("llama-blocks"), tmp_path / "model")
    parts = {
        "weight_packed": torch.full((64, 8), 0x09, dtype=torch.int32),
        "weight_scale": torch.arange(1.0, 5.0).expand(64, 4).contiguous(),
        "weight_shape": torch.tensor([64, 64]),
    }
    add_parts(folder, parts, without="weight")
    return folder


def add_parts(folder, parts, without=""):
    def change(tensors):
        kept = {name: tensor for name, tensor in tensors.items() if name != f"{Q}.{without}"}
        return kept | {f"{Q}.{part}": value for part, value in parts.items()}

    rewrite(folder, change)


def describe(folder, *groups, form="pack-quantized", **settings):
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
    described = {str(i): {"targets": ["Linear"], "weights": weights | group} for i, group in enumerate(groups or [{}])}
    method = {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed"}
    edit_json(folder / "config.json", quantization_config=method | {"config_groups": described} | settings)


def row(folder):
    return load_model(folder)[1]["layers.1.q_proj.weight"][5]


def test_groups_of_the_size_that_the_config_gives(folder):
    describe(folder)
    assert torch.equal(row(folder), INTEGERS * (GROUPS + 1))
    describe(folder, {"group_size": 128}, {})  # of several sizes, one must fit
    assert torch.equal(row(folder), INTEGERS * (GROUPS + 1))


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"group_size": 24}, "4 scales for 64 columns.* 24 share one"),
        ({"group_size": 32}, " 32 share one"),
        ({"group_size": None, "strategy": "channel"}, " all share one"),
        ({"group_size": [16]}, r"group_size is \[16\]"),
        ({"num_bits": 8}, "not 8 bits"),
        ({"num_bits": [4]}, r"numbers of \[4\] bits"),
    ],
)
def test_parts_that_the_config_contradicts(folder, group, words):
    describe(folder, group)
    with pytest.raises(UserError, match=words):
        row(folder)


def test_a_short_row_has_the_bits_that_the_config_gives():
    """One word holds four numbers of 8 bits, or up to eight of 4 bits."""
    words = torch.tensor([[0x78563412]], dtype=torch.int32)
    assert unpacked(words, 4, "x", frozenset([4])).tolist() == [[2 - 8, 1 - 8, 4 - 8, 3 - 8]]
    assert unpacked(words, 4, "x", frozenset([8])).tolist() == [[0x12 - 128, 0x34 - 128, 0x56 - 128, 0x78 - 128]]


@pytest.mark.parametrize("symmetric", [True, None, False])
def test_zero_points_of_symmetric_weights_are_ignored(folder, symmetric):
    """As in transformers; a weight is symmetric if the config does not say."""
    add_parts(folder, {"weight_zero_point": torch.full((8, 4), 0x99999999 - (1 << 32), dtype=torch.int32)})
    describe(folder, {"symmetric": False} if symmetric is False else {})
    if symmetric is None:
        describe(folder, config_groups={"a": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 16}}})
    assert torch.equal(row(folder), (INTEGERS - (1 if symmetric is False else 0)) * (GROUPS + 1))


@pytest.mark.parametrize("order", [None, "weight", "group"])
def test_an_order_of_columns_that_the_config_does_not_give_is_ignored(folder, order):
    stored = torch.arange(64) % 4
    add_parts(folder, {"weight_g_idx": stored.to(torch.int32)})
    describe(folder, {"actorder": order})
    assert torch.equal(row(folder), INTEGERS * ((stored if order == "group" else GROUPS) + 1))


@pytest.mark.parametrize("status", ["frozen", "initialized", "calibration", None])
@pytest.mark.parametrize("form", ["dense", "pack-quantized"])
def test_floats_that_are_rounded_in_each_forward_pass(checkpoint, tmp_path, status, form):
    folder = copied(checkpoint("llama-blocks"), tmp_path / "floats")
    plain = row(folder)
    describe(folder, form=form, quantization_status=status)
    assert torch.equal(row(folder), plain)  # nothing says where their grid would be
    add_parts(folder, {"weight_scale": torch.full((64, 4), 3.0)})
    with pytest.raises(UserError, match=rf"q_proj\.weight is stored as floats .*{status}.*save it compressed"):
        load_model(folder)
    describe(folder, form=form, quantization_status="compressed")
    assert torch.equal(row(folder), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_16_bits_are_multiplied_in_float32(folder, dtype):
    add_parts(folder, {"weight_packed": torch.full((64, 8), 0x0F, dtype=torch.int32)})  # 7 and -8
    scale = (torch.arange(1.0, 5.0) / 7).to(dtype)
    add_parts(folder, {"weight_scale": scale.expand(64, 4).contiguous()})
    describe(folder)
    integers = torch.where(INTEGERS == 1, 7.0, INTEGERS)
    assert torch.equal(row(folder), integers * scale.float()[GROUPS])
