"""Which files of a folder are the weights, and errors for folders that are no model."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shadowllm.errors import UserError
from shadowllm.models.files.safetensors_file import foreign_prefix
from shadowllm.models.files.weight_files import gguf_models, gguf_parts
from shadowllm.models.registry import load_model
from tests.models.checkpoints import copied, edit_json, rewrite, same_as_transformers


@pytest.fixture
def folder(checkpoint, tmp_path):
    return copied(checkpoint("llama-gqa"), tmp_path / "model")


def shards(checkpoint, folder):
    """Write a checkpoint with other weights, in shards."""
    AutoModelForCausalLM.from_pretrained(checkpoint("llama-mha")).save_pretrained(folder, max_shard_size="40KB")


def test_the_single_file_goes_before_an_index(checkpoint, folder, tmp_path):
    shards(checkpoint, tmp_path / "old")
    for path in (tmp_path / "old").glob("model*"):
        shutil.copy(path, folder)
    same_as_transformers(folder)


def test_an_index_whose_shards_are_gone_does_not_matter_beside_the_single_file(checkpoint, folder, tmp_path):
    shards(checkpoint, tmp_path / "old")
    shutil.copy(tmp_path / "old" / "model.safetensors.index.json", folder)
    same_as_transformers(folder)


@pytest.mark.parametrize("name", ["ema.safetensors", "predictor.safetensors", "consolidated.safetensors"])
def test_other_files_are_not_weights(folder, name):
    tensors = {k: torch.randn(v.shape) for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / name)
    same_as_transformers(folder)


def test_shards_that_the_index_does_not_name_are_not_weights(checkpoint, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "model-00009-of-00009.safetensors")
    model.save_pretrained(tmp_path / "new", max_shard_size="40KB")
    for path in (tmp_path / "new").glob("model*"):
        shutil.copy(path, folder)
    rewritten = folder / "model-00009-of-00009.safetensors"
    save_file({k: v + 1 for k, v in load_file(rewritten).items()}, rewritten)
    same_as_transformers(folder)


def test_the_file_that_the_config_names(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    edit_json(folder / "config.json", transformers_weights="weights.safetensors")
    same_as_transformers(folder)
    edit_json(folder / "config.json", transformers_weights="../weights.safetensors")
    with pytest.raises(UserError, match="no file of"):
        load_model(folder)


def test_an_adapter_beside_the_weights_is_refused(folder):
    adapter = folder / "adapter_model.safetensors"
    save_file({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 48)}, adapter)
    edit_json(folder / "adapter_config.json", peft_type="LORA")
    with pytest.raises(UserError, match=r"holds an adapter beside .* --adapter .*, or move adapter_config.json away"):
        load_model(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "model.", "llm."])
@pytest.mark.parametrize("variant", ["llama-gqa", "llama-mqa-tied", "opt", "opt-untied-no-bias"])
def test_a_prefix_before_every_name_is_taken_off(checkpoint, tmp_path, variant, prefix):
    folder = copied(checkpoint(variant), tmp_path / "model")
    plain = load_model(folder)[1].load()
    rewrite(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    with pytest.warns(UserWarning, match=f"begins with '{prefix}'"):
        found = load_model(folder)[1].load()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("variant", ["llama-gqa", "llama-mqa-tied", "opt", "opt-untied-no-bias"])
def test_hugging_faces_own_names_have_no_prefix(checkpoint, variant):
    assert foreign_prefix(load_file(checkpoint(variant) / "model.safetensors").keys()) == ""


def test_names_of_the_base_class(checkpoint, tmp_path):
    folder = copied(checkpoint("llama-mqa-tied"), tmp_path / "model")
    rewrite(
        folder, lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items() if "lm_head" not in name}
    )
    same_as_transformers(folder)


@pytest.mark.parametrize("name", ["base_model.model.{}", "{}.lora_A.weight", "{}.base_layer.weight"])
def test_what_peft_saved_unmerged_is_refused(folder, name):
    def change(tensors):
        if name.startswith("base_model"):
            return {name.format(key): tensor for key, tensor in tensors.items()}
        return tensors | {name.format("model.layers.0.self_attn.q_proj"): torch.ones(4, 4)}

    rewrite(folder, change)
    with pytest.raises(UserError, match="merge_and_unload"):
        load_model(folder)


def test_folders_that_are_no_model(checkpoint, bundle, tmp_path):
    with pytest.raises(UserError, match="is a bundle already"):
        load_model(bundle())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="meta-llama/Llama-2-7b-hf")
    with pytest.raises(UserError, match=r"an adapter .* of meta-llama/Llama-2-7b-hf.*; export that model with"):
        load_model(adapter)
    for name, words in (("pytorch_model.bin", "pickled"), ("ema.safetensors", r"neither .* but ema\.safetensors")):
        other = copied(checkpoint("llama-gqa"), tmp_path / name)
        (other / "model.safetensors").rename(other / name)
        with pytest.raises(UserError, match=words):
            load_model(other)
    with pytest.raises(UserError, match="is one file"):
        load_model(checkpoint("llama-gqa") / "model.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}'])
def test_a_damaged_index(folder, text):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json"):
        load_model(folder)


def test_an_index_cannot_leave_the_folder(folder):
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the folder"):
        load_model(folder)


def test_tensors_of_another_family_are_named(folder):
    rewrite(folder, lambda tensors: {"transformer.h.0.attn.c_attn.weight": torch.ones(3, 3), "wte": torch.ones(1)})
    with pytest.raises(UserError, match=r"none of the tensors .* such as transformer\.h"):
        load_model(folder)
    rewrite(folder, lambda tensors: {})
    with pytest.raises(UserError, match="holds no tensors"):
        load_model(folder)


def test_tensors_that_are_left_out_are_named(folder):
    rewrite(folder, lambda tensors: tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(12)})
    with pytest.warns(UserWarning, match=r"left out: layers\.0\.self_attn\.q_norm\.weight"):
        load_model(folder)


def test_parts_of_a_gguf_model(tmp_path):
    names = [f"a-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert gguf_models([*names, "b.gguf"]) == [names[0], "b.gguf"]
    for name in names[:2]:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"a-00003-of-00003\.gguf is missing"):
        gguf_parts(tmp_path / names[1])
    (tmp_path / names[2]).touch()
    assert [path.name for path in gguf_parts(tmp_path / names[1])] == names


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_fsdp_wrapped_module._checkpoint_wrapped_module."])
def test_wrappers_inside_the_model_are_taken_out(checkpoint, folder, wrapper):
    plain = load_model(folder)[1].load()
    rewrite(
        folder, lambda tensors: {name.replace("self_attn.", f"self_attn.{wrapper}"): tensors[name] for name in tensors}
    )
    with pytest.warns(UserWarning, match="come from a wrapper"):
        found = load_model(folder)[1].load()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_one_tensor_under_two_names_is_refused(folder):
    rewrite(folder, lambda tensors: tensors | {"norm.weight": torch.zeros(48)})
    with pytest.raises(UserError, match=r"both .*norm\.weight and .*norm\.weight"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("model-00001-of-00002.safetensors", "index of the shards is missing"),
        ("adapter_model.safetensors", "--adapter"),
        ("consolidated.safetensors", "the format of Hugging Face"),
        ("consolidated.00.pth", "the format of Hugging Face"),
        ("pytorch_model.bin", "save_pretrained"),
        ("model.fp16.safetensors", "rename them"),
    ],
)
def test_weights_under_another_name_are_told_what_to_do(folder, name, remedy):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(UserError, match=remedy):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model.gguf", "model.safetensors.index.json"])
def test_a_pointer_of_git_lfs_is_named(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(UserError, match="git lfs pull"):
        load_model(folder)


def test_a_link_to_nothing_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(UserError, match="a link to"):
        load_model(folder)


def test_a_model_without_its_output_projection_is_called_so(folder):
    rewrite(
        folder,
        lambda tensors: (
            {n: t for n, t in tensors.items() if n != "lm_head.weight"} | {"score.weight": torch.ones(2, 48)}
        ),
    )
    with pytest.raises(UserError, match="a base model or a classifier"):
        load_model(folder)


def test_tensors_that_lie_there_instead_are_named(folder):
    rewrite(folder, lambda tensors: {name.replace("mlp.up_proj", "mlp.w3"): tensors[name] for name in tensors})
    with pytest.raises(UserError, match=r"lacks .*up_proj\.weight .*but holds others, such as layers\.0\.mlp\.w3"):
        load_model(folder)


def test_a_matrix_of_three_dimensions_is_named(folder):
    name = "model.layers.0.self_attn.o_proj.weight"
    rewrite(folder, lambda tensors: tensors | {name: tensors[name][None]})
    with pytest.raises(UserError, match=r"o_proj\.weight has shape \(1, 48, 48\)"):
        load_model(folder)[1].load()
