"""What of a checkpoint would make its bundle useless: refused before an export does any work."""

from __future__ import annotations

from pathlib import Path

from shadowllm.errors import UserError
from shadowllm.models.files.checkpoint import Checkpoint
from shadowllm.models.files.config import CONFIG, GENERATION_CONFIG, read_json_object
from shadowllm.models.spec import ModelSpec
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
