"""Quantised checkpoints: the right floats, or an error that names the method."""

from __future__ import annotations

import pytest
import torch

from shadowllm.errors import UserError
from shadowllm.models.files.dequantise import unpacked
from shadowllm.models.registry import load_model
from tests.models.checkpoints import copied, edit_json, rewrite

Q = "model.layers.1.self_attn.q_proj"
MATRICES = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "gate_proj.weight", "up_proj.weight",
            "down_proj.weight")  # fmt: skip


@pytest.fixture
def folder(checkpoint, tmp_path):
    return copied(checkpoint("llama-blocks"), tmp_path / "model")


METHODS = {
    "bitsandbytes .LLM.int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "bitsandbytes .4 bit": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "by gptq": {"quant_method": "gptq", "bits": 4},
    "by awq": {"quant_method": "awq", "bits": 4},
    "by torchao": {"quant_method": "torchao"},
    "by hqq": {"quant_method": "hqq"},
    "by mxfp4": {"quant_method": "mxfp4"},
    "by modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "by fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "by an unnamed method": {"bits": 4},
    "as nvfp4-pack-quantized": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    "as marlin-24": {"quant_method": "compressed-tensors", "format": "marlin-24"},
    "as sparse-24-bitmask": {
        "quant_method": "compressed-tensors", "format": "dense", "sparsity_config": {"format": "sparse-24-bitmask"}
    },
    "as numbers of 7 bits": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"a": {"weights": {"num_bits": 7}}},
    },
    "as transforms": {"quant_method": "compressed-tensors", "format": "dense", "transform_config": {"R1": {}}},
    "as mxfp4-pack-quantized": {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision",
        "config_groups": {"a": {"format": "int-quantized"}, "b": {"format": "mxfp4-pack-quantized"}},
    },
}  # fmt: skip


@pytest.mark.parametrize("words", METHODS)
def test_methods_are_refused_by_name(folder, words):
    edit_json(folder / "config.json", quantization_config=METHODS[words])
    with pytest.raises(UserError, match=words):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "method"),
    [("hf_quant_config.json", "modelopt"), ("quantize_config.json", "gptq"), ("quant_config.json", "awq")],
)
def test_settings_in_files_of_their_own(folder, name, method):
    edit_json(folder / name, bits=4)
    with pytest.raises(UserError, match=f"by {method}"):
        load_model(folder)


def test_the_older_name_of_the_settings(folder):
    edit_json(folder / "config.json", compression_config={"quant_method": "compressed-tensors", "format": "marlin-24"})
    with pytest.raises(UserError, match="as marlin-24"):
        load_model(folder)
    edit_json(folder / "config.json", compression_config="marlin")
    load_model(folder)  # transformers ignores it too


def test_mlx(folder):
    edit_json(folder / "config.json", quantization={"group_size": 64, "bits": 4})
    with pytest.raises(UserError, match=r"by mlx.*mlx_lm\.convert --dequantize"):
        load_model(folder)


def test_mlx_writes_an_unnamed_quantization_config_as_well(folder):
    settings = {"group_size": 64, "bits": 4}
    edit_json(folder / "config.json", quantization=settings, quantization_config=settings)
    with pytest.raises(UserError, match="by mlx"):
        load_model(folder)


SIBLINGS = {
    "SCB": "LLM.int8",
    "qweight": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "scales": "MLX",
    "weight.absmax": "bitsandbytes 4 bit",
    "weight.quant_state.bitsandbytes__nf4": "bitsandbytes 4 bit",
    "weight_scale": "FP8",
    "weight_scale_2": "NVFP4",
    "weight._data": "quanto",
    "W_q": "HQQ",
    "mystery": "which is not read",
}


@pytest.mark.parametrize("part", SIBLINGS)
def test_what_lies_beside_a_weight_is_refused_where_no_config_explains_it(folder, part):
    rewrite(folder, lambda tensors: tensors | {f"{Q}.{part}": torch.ones(4)})
    with pytest.raises(UserError, match=SIBLINGS[part]):
        load_model(folder)


def test_a_weight_that_only_exists_packed_is_not_called_missing(folder):
    def change(tensors):
        return {k: v for k, v in tensors.items() if k != f"{Q}.weight"} | {f"{Q}.qweight": torch.ones(4, 4).int()}

    rewrite(folder, change)
    with pytest.raises(UserError, match="GPTQ or AWQ"):
        load_model(folder)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool]
)
@pytest.mark.parametrize("name", [f"{Q}.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_numbers_without_a_meaning_are_refused(folder, name, dtype):
    rewrite(folder, lambda tensors: tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(UserError, match=name.removeprefix("model.")):
        load_model(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_any_width_are_read(folder, dtype):
    rewrite(folder, lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()})
    assert load_model(folder)[1]["layers.1.q_proj.weight"].dtype == dtype


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_named(folder, value):
    rewrite(
        folder,
        lambda tensors: tensors | {f"{Q}.weight": tensors[f"{Q}.weight"].index_fill(0, torch.tensor([5]), value)},
    )
    with pytest.raises(UserError, match=r"tensor layers\.1\.self_attn\.q_proj\.weight holds (NaN|an infinite)"):
        load_model(folder)[1].load()


def stored(weight, strategy, integer):
    """Integers or float8 and their scales, in the layouts of compressed-tensors."""
    rows, width = weight.shape
    grid = {"tensor": (1, 1), "channel": (rows, 1), "group": (rows, width // 16), "block": (rows // 16, width // 32)}[
        strategy
    ]
    blocks = weight.reshape(grid[0], rows // grid[0], grid[1], width // grid[1])
    scale = blocks.abs().amax(dim=(1, 3)) / (127 if integer else 448)
    numbers = blocks / scale[:, None, :, None]
    numbers = numbers.round().to(torch.int8) if integer else numbers.to(torch.float8_e4m3fn)
    exact = (numbers.float() * scale[:, None, :, None]).reshape(rows, width)
    return numbers.reshape(rows, width), scale[0] if strategy == "tensor" else scale, exact


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
@pytest.mark.parametrize(
    ("form", "integer"), [("float-quantized", False), ("int-quantized", True), ("naive-quantized", True)]
)
def test_compressed_tensors_in_whole_bytes(folder, strategy, form, integer):
    exact = {}

    def change(tensors):
        found = {}
        for name, tensor in tensors.items():
            if not name.endswith(MATRICES):
                found[name] = tensor
                continue
            numbers, scale, exact[name] = stored(tensor, strategy, integer)
            found |= {name: numbers, name + "_scale": scale, name.replace("weight", "input_scale"): torch.ones(1)}
        return found

    rewrite(folder, change)
    edit_json(folder / "config.json", quantization_config={"quant_method": "compressed-tensors", "format": form})
    _, weights, checkpoint = load_model(folder)
    assert checkpoint.quantised
    assert len(exact) == 21
    assert torch.equal(weights["layers.2.gate_proj.weight"], exact["model.layers.2.mlp.gate_proj.weight"])
    assert torch.equal(weights["layers.1.down_proj.weight"], exact["model.layers.1.mlp.down_proj.weight"].T)


def test_fp8_with_blocks_that_do_not_divide(folder):
    name = "model.layers.0.mlp.up_proj.weight"  # 96 x 64: blocks of 20 x 40 are five by two
    scale = torch.arange(1.0, 11.0).view(5, 2)
    full = scale.repeat_interleave(20, 0).repeat_interleave(40, 1)[:96, :64]
    small = {}

    def change(tensors):
        small[name] = (tensors[name] / full).to(torch.float8_e4m3fn)
        return tensors | small | {name + "_scale_inv": scale}

    rewrite(folder, change)
    settings = {"quant_method": "fp8", "weight_block_size": [20, 40]}
    edit_json(folder / "config.json", quantization_config=settings)
    assert torch.equal(load_model(folder)[1]["layers.0.up_proj.weight"], small[name].float() * full)
    edit_json(folder / "config.json", quantization_config=settings | {"weight_block_size": None})
    with pytest.raises(UserError, match=r"scales of .* do not fit"):
        load_model(folder)[1].load()


@pytest.mark.parametrize("size", [[20, 40], "20x40"])
def test_compressed_tensors_with_blocks_that_do_not_divide(folder, size):
    name = "model.layers.0.mlp.up_proj.weight"  # 96 x 64: five by two blocks
    scale = torch.arange(1.0, 11.0).view(5, 2)
    small = {name: torch.ones(96, 64).to(torch.float8_e4m3fn), f"{name}_scale": scale}
    rewrite(folder, lambda tensors: tensors | small)
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": size}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    groups = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    edit_json(folder / "config.json", quantization_config=settings | groups)
    full = scale.repeat_interleave(20, 0).repeat_interleave(40, 1)[:96, :64]
    assert torch.equal(load_model(folder)[1]["layers.0.up_proj.weight"], full)
    weights["block_structure"] = "many"
    edit_json(folder / "config.json", quantization_config=settings | groups)
    with pytest.raises(UserError, match=r"blocks of weights have the size 'many'"):
        load_model(folder)


@pytest.mark.parametrize(
    ("said", "scales", "block"),
    [
        ({}, (2, 1), (128, 128)),  # as in FineGrainedFP8Config
        ({}, (1, 1), None),
        ({"weight_block_size": None}, (2, 1), None),
        ({"weight_block_size": [48, 64]}, (2, 1), (48, 64)),
    ],
)
def test_blocks_of_fp8_that_the_config_does_not_mention(folder, said, scales, block):
    name = "model.layers.0.mlp.up_proj.weight"
    small = {name: torch.ones(96, 64).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(scales)}
    # The scale of another weight, which is first by name, says nothing.
    other = {name.replace("up", "down"): torch.ones(64, 96).to(torch.float8_e4m3fn)}
    other |= {name.replace("up", "down") + "_scale_inv": torch.ones(1, 1)}
    rewrite(folder, lambda tensors: tensors | other | small)
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"} | said)
    assert load_model(folder)[2].tensors.block == block


def test_a_float8_weight_without_its_scale_is_refused(folder):
    rewrite(folder, lambda tensors: tensors | {f"{Q}.weight": tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)})
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="F8_E4M3"):
        load_model(folder)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (8, True), (4, False)])
@pytest.mark.parametrize("group", [16, None])
def test_packed_weights_are_those_of_compressed_tensors(folder, bits, symmetric, group):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed: packed weights not compared")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    settings = {
        "num_bits": bits,
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
        "group_size": group,
    }
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    exact = {}

    def change(tensors):
        weight = tensors.pop(f"{Q}.weight")
        parts = weight.unflatten(1, (-1, group or weight.shape[1]))
        low, high = parts.amin(2), parts.amax(2)
        reach = 2 ** (bits - 1)
        scale = (parts.abs().amax(2) / (reach - 1)) if symmetric else (high - low) / (2 * reach - 1)
        zero = torch.zeros_like(scale) if symmetric else (-reach - low / scale).round().clamp(-reach, reach - 1)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero.to(torch.int8)}
        packed = PackedQuantizationCompressor.compress(state, scheme)
        exact["weight"] = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
        return tensors | {f"{Q}.{part}": value.contiguous() for part, value in packed.items()}

    rewrite(folder, change)
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    edit_json(folder / "config.json", quantization_config=config)
    assert torch.equal(load_model(folder)[1]["layers.1.q_proj.weight"], exact["weight"])


def test_only_whole_nibbles_are_unpacked():
    with pytest.raises(UserError, match="neither 4 nor 8 bits"):
        unpacked(torch.zeros(2, 3, dtype=torch.int32), 32, "x")


FP8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
DENSE = {"quant_method": "compressed-tensors", "format": "dense"}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


@pytest.mark.parametrize(
    ("scale", "activation"), [("weight_scale_inv", "activation_scale"), ("weight_scale", "input_scale")]
)
def test_fp8_with_one_scale_for_a_tensor(folder, scale, activation):
    """The names of the scales in transformers and in AutoFP8."""
    small = {}

    def change(tensors):
        small["weight"] = (tensors[f"{Q}.weight"] / 3).to(torch.float8_e4m3fn)
        parts = {scale: torch.tensor(3.0), activation: torch.tensor(1.0)}
        return tensors | {f"{Q}.{part}": value for part, value in (small | parts).items()}

    rewrite(folder, change)
    edit_json(folder / "config.json", quantization_config=FP8)
    assert torch.equal(load_model(folder)[1]["layers.1.q_proj.weight"], small["weight"].float() * 3)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_scales_that_are_powers_of_two(folder, dtype):
    scale = torch.tensor([[0.5, 4.0]]).to(torch.float8_e8m0fnu).view(dtype)
    small = {}

    def change(tensors):
        small["weight"] = tensors[f"{Q}.weight"].to(torch.float8_e4m3fn)
        return tensors | {f"{Q}.weight": small["weight"], f"{Q}.weight_scale_inv": scale}

    rewrite(folder, change)
    edit_json(folder / "config.json", quantization_config=FP8)
    full = torch.tensor([0.5, 4.0]).repeat_interleave(32)
    assert torch.equal(load_model(folder)[1]["layers.1.q_proj.weight"], small["weight"].float() * full)


def test_floats_of_compressed_tensors_are_final(folder):
    plain = load_model(folder)[1]["layers.1.q_proj.weight"]
    rewrite(folder, lambda tensors: tensors | {f"{Q}.weight_scale": torch.full((64, 1), 3.0)})
    edit_json(folder / "config.json", quantization_config=DENSE)
    assert torch.equal(load_model(folder)[1]["layers.1.q_proj.weight"], plain)


def packed_parts(order):
    """Zeros and ones in groups of 16 columns whose scales are 1, 2, 3 and 4; ``order`` says each column's group."""
    words = torch.full((64, 8), 0x09, dtype=torch.int32)  # 4 bits: 1 in the first of eight columns, -8 in the others
    scale = torch.arange(1.0, 5.0).expand(64, 4).contiguous()
    return {
        "weight_packed": words,
        "weight_scale": scale,
        "weight_shape": torch.tensor([64, 64]),
        "weight_g_idx": order.to(torch.int32),
    }


def with_parts(folder, parts):
    def change(tensors):
        kept = {name: tensor for name, tensor in tensors.items() if name != f"{Q}.weight"}
        return kept | {f"{Q}.{part}": value for part, value in parts.items()}

    rewrite(folder, change)
    edit_json(folder / "config.json", quantization_config=PACKED)


@pytest.mark.parametrize("ordered", [True, False])
def test_groups_of_columns_in_an_order_of_their_own(folder, ordered):
    groups = torch.arange(64) % 4
    with_parts(folder, packed_parts(groups if ordered else torch.full((64,), -1)))
    row = load_model(folder)[1]["layers.1.q_proj.weight"][5]
    integers = torch.full((64,), -8.0)
    integers[::8] = 1.0
    assert torch.equal(row, integers * (groups if ordered else torch.arange(64) // 16).add(1))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight_shape": None}, "lacks the tensor .*weight_shape"),
        ({"weight_shape": torch.tensor([64])}, "weight_shape is"),
        ({"weight_packed": None}, r"lacks the tensor .*q_proj\.weight"),
        ({"weight_packed": torch.zeros(64, dtype=torch.int32)}, "not packed in rows of int32"),
        ({"weight_packed": torch.zeros(64, 8)}, "not packed in rows of int32"),
        ({"weight_scale": None}, "no scale beside its weight"),
        ({"weight_scale": torch.zeros(0)}, "do not fit"),
        ({"weight_scale": torch.ones(64, 2, 2)}, "do not fit"),
        ({"weight_scale": torch.ones(64, 4).int()}, "holds integers"),
        ({"weight_scale_inv": torch.ones(64, 4)}, "weight_scale and weight_scale_inv"),
        ({"weight_g_idx": torch.full((64,), 9)}, "do not fit"),
        ({"weight_g_idx": torch.zeros(3)}, "do not fit"),
    ],
)
def test_parts_that_do_not_fit_together_are_named(folder, changed, words):
    parts = packed_parts(torch.arange(64) % 4) | changed
    with_parts(folder, {part: value for part, value in parts.items() if value is not None})
    with pytest.raises(UserError, match=words):
        load_model(folder)[1].load()
