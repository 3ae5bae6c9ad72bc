"""Merge a LoRA adapter into the tensors of a checkpoint. The library ``peft`` decides what the adapter means.

Source: LoRA (Hu et al., arXiv 2106.09685), in the file format of ``peft``. A module of the merged model is made when
one of its tensors is read, so memory holds the adapter and one module.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from shadowllm.errors import UserError, foreign_reader
from shadowllm.limits import check_path
from shadowllm.models.activations import override_activation
from shadowllm.models.files.config import read_json_object
from shadowllm.models.files.hashing import hash_files
from shadowllm.models.files.lfs import refuse_pointers
from shadowllm.models.files.weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from shadowllm.models.weights import TensorFile

# Fields of peft's LoraConfig that the merge takes into account, or that only training uses.
MERGED = {
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("bias", "lora_bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    *("lora_dropout", "eva_config", "loftq_config", "inference_mode", "runtime_config"),
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
}
# Initial values that leave the base model as it is. With others, such as PiSSA's, an adapter fits only changed weights.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
MERGE_IT = (
    "merge it with peft (merge_and_unload), save the result with save_pretrained, and export that; if peft refuses "
    "that too, train it without the option that it names"
)


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter on disk.

    Attributes:
        folder: contains its config and its weights.
        config: peft's ``LoraConfig``.
        tensors: its tensors, by stored name.
    """

    folder: Path
    config: Any
    tensors: Mapping[str, Tensor]

    @property
    def base(self) -> str | None:
        """The model that it was trained on, as the adapter names it."""
        return self.config.base_model_name_or_path

    def fingerprint(self) -> str:
        """Return the SHA-256 of its config and weights."""
        return hash_files([self.folder / ADAPTER_CONFIG, self.folder / ADAPTER_WEIGHTS])

    def insert(self, model: nn.Module) -> Any:
        """Insert the adapter into a model whose parameters are on the CPU, and return peft's model around it.

        Raises:
            UserError: the adapter is of another model.
        """
        from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

        remedy = f"it was trained on {self.base}: export that model"
        with foreign_reader(f"the adapter in {self.folder} does not fit the model", remedy), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about training, and about tied tables, which are handled here
            inserted = PeftModel(model, copy.deepcopy(self.config), low_cpu_mem_usage=True)
            needed = get_peft_model_state_dict(inserted, save_embedding_layers=False)
            for name, tensor in needed.items():
                found = tuple(self.tensors[name].shape) if name in self.tensors else "missing"
                if found != tuple(tensor.shape):
                    raise ValueError(f"{name} is {found}, and the model needs {tuple(tensor.shape)}")
            loaded: Any = set_peft_model_state_dict(inserted, dict(self.tensors), low_cpu_mem_usage=True)
            if loaded.unexpected_keys:
                raise ValueError(f"the model has no place for {min(loaded.unexpected_keys)}")
        return inserted


def open_adapter(folder: Path) -> LoraAdapter:
    """Read a LoRA adapter.

    Raises:
        UserError: the folder holds no adapter, its weights are pickled, it is of a kind or has an option that is not
            merged, or the package ``peft`` is not installed.
    """
    folder = check_path("the adapter", folder)
    if not folder.is_dir():
        raise UserError(f"no such adapter: {folder} is no folder", "download the adapter, and give its folder")
    settings = read_json_object(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"the adapter in {folder} is of the kind {settings.get('peft_type')}, not LORA", MERGE_IT)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = weights.with_suffix(".bin")
        if pickled.is_file():
            raise UserError(
                f"the weights in {pickled} are pickled, which is not read because it can run code",
                "load the adapter with peft and call save_pretrained, which writes safetensors",
            )
        raise UserError(f"there is no {ADAPTER_WEIGHTS} in {folder}", "download the adapter again")
    refuse_pointers([weights])
    with foreign_reader(f"{weights} is damaged or truncated", "download the adapter again"):
        tensors = load_file(weights)
    return LoraAdapter(folder, _lora_config(folder, settings), tensors)


def _lora_config(folder: Path, settings: Mapping[str, Any]) -> Any:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise UserError("merging an adapter needs the package peft", "pip install 'shadowllm[peft]'") from error
    defaults = vars(LoraConfig())
    unknown = sorted(name for name, value in settings.items() if value and name not in defaults)
    if unknown:
        raise UserError(
            f"the installed peft does not know the option {unknown[0]} of the adapter in {folder}",
            "pip install --upgrade peft",
        )
    known = {name: value for name, value in settings.items() if name in defaults}
    with foreign_reader(f"peft cannot read {folder / ADAPTER_CONFIG}", "download the adapter again"):
        config = LoraConfig(**known)
    other = sorted(name for name, value in vars(config).items() if name not in MERGED and value != defaults.get(name))
    if config.init_lora_weights in PLAIN_STARTS:
        other = [name for name in other if name != "init_lora_weights"]
    if other:
        raise UserError(f"the adapter in {folder} has the option {other[0]}, which is not merged here", MERGE_IT)
    config.init_lora_weights = False  # no initial values are needed
    return config


class MergedTensors:
    """A checkpoint's tensors with an adapter merged into them. Tensors that the adapter changes are float32.

    If the checkpoint stores one matrix for embeddings and output projection, and the adapter changes one of the two,
    both have a name.

    Args:
        base: the tensors of the model that the adapter was trained on.
        config: the Hugging Face config of that model.
        trust_remote_code: let ``transformers`` run code from the checkpoint.

    Attributes:
        dtypes: as in `TensorFile`.

    Raises:
        UserError: the adapter is of another model; at `read`, if a module cannot be merged.
    """

    def __init__(self, base: TensorFile, adapter: LoraAdapter, config: Any, trust_remote_code: bool = False) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import ModulesToSaveWrapper

        self._base, self._adapter = base, adapter
        model = _empty_model(config, trust_remote_code)
        empty = set(model.parameters())
        names = {module: name.removeprefix("model.") for name, module in model.named_modules()}
        tables = {f"{names[table]}.weight" for table in (model.get_input_embeddings(), model.get_output_embeddings())}
        inserted = adapter.insert(model)
        self._layers: dict[str, Any] = {}  # peft's layers around the modules that the adapter adds to
        self._given: dict[str, Tensor] = {}  # tensors that the adapter stores whole
        for module in inserted.modules():
            if isinstance(module, BaseTunerLayer):
                self._layers[names[module.get_base_layer()]] = module
            elif isinstance(module, ModulesToSaveWrapper):
                saved = module.modules_to_save[inserted.active_adapter]
                self._given |= _prefixed(names[module.original_module], saved.named_parameters())
        for module, name in names.items():
            stored = [(part, value) for part, value in module.named_parameters(recurse=False) if value not in empty]
            self._given |= _prefixed(name, stored)
        changed = self._given.keys() | {
            f"{name}.{part}"
            for name, layer in self._layers.items()
            for part, _ in layer.get_base_layer().named_parameters(recurse=False)
        }
        # The matrix that is stored in place of each table.
        here = tables & base.names()
        self._stored = dict.fromkeys(tables - here, *here) if len(here) == 1 and tables & changed else {}
        self._names = base.names() | self._given.keys() | self._stored.keys()
        self.dtypes = {**base.dtypes, **dict.fromkeys(changed, "F32")}

    def names(self) -> set[str]:
        return set(self._names)

    def fingerprint(self) -> str:
        return hashlib.sha256((self._base.fingerprint() + self._adapter.fingerprint()).encode()).hexdigest()

    def read(self, name: str) -> Tensor:
        module, _, part = name.rpartition(".")
        return self._merge(module)[part] if module in self._layers else self._plain(name)

    def _plain(self, name: str) -> Tensor:
        """Return a tensor before the merge."""
        if name in self._given:
            return self._given[name].detach().float()
        return self._base.read(self._stored.get(name, name))

    @torch.no_grad()
    def _merge(self, name: str) -> dict[str, Tensor]:
        """Return the parameters of a module after the merge, by their names in it."""
        layer = self._layers[name]
        base = layer.get_base_layer()
        empty = dict(base.named_parameters(recurse=False))
        for part in empty:
            if f"{name}.{part}" in self._names:
                # A copy, because peft changes it.
                setattr(base, part, _frozen(self._plain(f"{name}.{part}").to(torch.float32, copy=True)))
        with foreign_reader(f"peft cannot merge the adapter in {self._adapter.folder} into {name}", MERGE_IT):
            layer.merge()
        merged = {part: value.detach() for part, value in base.named_parameters(recurse=False)}
        for part, value in empty.items():
            setattr(base, part, value)
        layer.merged_adapters.clear()
        return merged


def _empty_model(config: Any, trust_remote_code: bool) -> Any:
    """Return the model of a config in ``transformers``. Its parameters have shapes, but take no memory."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.pad_token_id = None  # it may be outside the vocabulary, which PyTorch refuses
    override_activation(config, "relu")  # transformers may not know the model's own, which does not matter here
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", trust_remote_code=trust_remote_code
        )
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, _frozen(torch.zeros(()).expand(parameter.shape)))
    return model


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _prefixed(name: str, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{name}.{part}": value for part, value in parameters}
