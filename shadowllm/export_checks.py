"""What would make an export fail, or its bundle useless: refused before any work is done."""

from __future__ import annotations

from pathlib import Path

from shadowllm.config import Selector, TrainConfig
from shadowllm.errors import UserError
from shadowllm.models.files.checkpoint import Checkpoint
from shadowllm.models.files.config import CONFIG, GENERATION_CONFIG, read_json_object
from shadowllm.models.sparsity import Budget, SparseLayers
from shadowllm.models.spec import ModelSpec
from shadowllm.predictor.network_options import NETWORKS
from shadowllm.predictor.networks import default_rank
from shadowllm.runtime.generation.sampling import check_generation_config


def check_checkpoint(spec: ModelSpec, checkpoint: Checkpoint, out: Path) -> None:
    """Check the files of a checkpoint that the bundle in ``out`` takes over as they are.

    Raises:
        UserError: the bundle would replace the checkpoint, or no text could be generated with its generation config.
    """
    if out.is_dir() and checkpoint.folder.resolve().is_relative_to(out.resolve()):
        raise UserError(f"the model lies in {out}, which the bundle is to replace", "name another folder")
    own = checkpoint.folder / GENERATION_CONFIG
    if checkpoint.gguf is None and own.is_file():
        check_generation_config(own, read_json_object(own), spec.vocab_size)
    else:
        derived = checkpoint.generation_config.to_dict()
        check_generation_config(checkpoint.folder / (checkpoint.gguf or CONFIG), derived, spec.vocab_size)


def check_dense_layers(spec: ModelSpec, dense_layers: int) -> None:
    """Refuse a number of dense layers that leaves no sparse one.

    Raises:
        UserError: it is too large, or the model has one layer.
    """
    if spec.n_layers < 2:
        raise UserError("the model has one layer, and the first layer is always dense", "use a model with more layers")
    if dense_layers >= spec.n_layers:
        raise UserError(f"{dense_layers} dense layers of {spec.n_layers}", f"give 1 to {spec.n_layers - 1}")


def check_budget_layers(spec: ModelSpec, budget: Budget | None, dense_layers: int) -> None:
    """Refuse a budget with fractions for another number of layers.

    Raises:
        UserError: it is such a budget.
    """
    if budget is not None:
        budget.counts(SparseLayers(spec, dense_layers))


def check_training(spec: ModelSpec, kind: Selector, dense_layers: int, config: TrainConfig) -> None:
    """Refuse sizes with which no predictor of this kind can be made.

    Raises:
        UserError: as the other checks, or the networks need a rank and none is given.
    """
    check_dense_layers(spec, dense_layers)
    check_budget_layers(spec, config.budget, dense_layers)
    if kind in NETWORKS and config.powerinfer is None and config.rank is None:
        default_rank(SparseLayers(spec, dense_layers), kind)
