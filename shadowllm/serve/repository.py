"""Writes a model repository for Triton Inference Server."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from shadowllm.bundle.manifest import read_manifest, verify_files
from shadowllm.errors import UserError
from shadowllm.exporter.staging import staged
from shadowllm.runtime import check_slots
from shadowllm.serve_config import EngineConfig

# The inputs and outputs have the names of Triton's vLLM backend. Decoupled: a request may have several responses.
CONFIG = """name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
instance_group [ {{ kind: KIND_CPU, count: 1 }} ]
input [
  {{ name: "text_input", data_type: TYPE_STRING, dims: [ 1 ] }},
  {{ name: "sampling_parameters", data_type: TYPE_STRING, dims: [ 1 ], optional: true }}
]
output [
  {{ name: "text_output", data_type: TYPE_STRING, dims: [ 1 ] }},
  {{ name: "finish_reason", data_type: TYPE_STRING, dims: [ 1 ] }}
]
parameters [ {{ key: "shadowllm", value: {{ string_value: {options} }} }} ]
"""
MODEL = '''"""The model as Triton Inference Server's Python backend loads it."""

from shadowllm.serve.repository_model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    bundle: Path,
    out: Path,
    backend: str,
    engine: EngineConfig,
    name: str | None = None,
    threads: int | None = None,
    prepack: bool = False,
) -> str:
    """Write a repository with one model, and return the model's name.

    The repository has a copy of the bundle, without TensorRT engines, so it can be moved to another machine. It appears
    when it is complete. See https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_repository.md.

    Args:
        backend: one of `shadowllm.runtime.SLOT_BACKENDS`.
        name: of the model; None is the last part of the name in the bundle.
        threads, prepack: see `open_slots`.

    Raises:
        UserError: there is no bundle, it has no tokenizer, a file of it is missing or damaged, a name that a folder or
            Triton cannot have, ``out`` exists or lies in the bundle, or as `check_slots`.
    """
    check_slots(backend, prepack)
    manifest = read_manifest(bundle)
    if "tokenizer.json" not in manifest.files:
        raise UserError(f"{bundle} has no tokenizer", "export from a checkpoint that has tokenizer.json")
    name = Path(manifest.model).name if name is None else name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(
            f"{name!r:.80} cannot be the name of a model in a repository",
            "give --model-name with letters, digits, dots, hyphens and underscores",
        )
    if out.resolve().is_relative_to(bundle.resolve()):
        raise UserError(f"{out} lies inside the bundle", "name a folder beside it")
    if out.exists():
        raise UserError(f"{out} exists already", "name another folder, or remove it first")
    options = vars(engine) | {"backend": backend, "threads": threads, "prepack": prepack}
    verify_files(bundle, manifest.files)
    with staged(out) as folder:
        version = folder / name / "1"
        version.mkdir(parents=True)
        quoted = json.dumps(json.dumps(options))
        (folder / name / "config.pbtxt").write_text(CONFIG.format(name=name, options=quoted), encoding="utf-8")
        (version / "model.py").write_text(MODEL, encoding="utf-8")
        for file in ("manifest.json", *manifest.files):
            target = version / "bundle" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle / file, target)
    return name
