"""Writes a Llama model as a float32 GGUF file, so that llama.cpp can run and quantise it.

    python -m shadowllm.benchmarks.gguf_model out/noisy "$(python benchmarks/model_path.py)" out/noisy.gguf

The metadata (sizes and tokenizer) are those of another GGUF file of the same architecture, for example of the model
before noise was added.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from shadowllm.benchmarks.script_parser import script, script_parser
from shadowllm.errors import UserError
from shadowllm.models.registry import load_model

# Fields that the writer sets itself, or that describe the tensors of the other file.
OWN_FIELDS = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version", "split.")


def write_gguf(model: str, described: Path, out: Path) -> None:
    """Write the tensors of a model with the metadata of a GGUF file.

    Args:
        model: folder or file of the model.
        described: GGUF file with the metadata.
        out: file to write.

    Raises:
        UserError: there is no such model, or it has other tensors than the GGUF file.
    """
    checkpoint, reader = load_model(model)[2], gguf.GGUFReader(described)
    heads = {"q_proj": checkpoint.config.num_attention_heads, "k_proj": checkpoint.config.num_key_value_heads}
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, checkpoint.config.num_hidden_layers)
    names = {known.get_name(name, (".weight", ".bias")): name for name in sorted(checkpoint.tensors.names())}
    stored = {tensor.name: tuple(tensor.shape[::-1].tolist()) for tensor in reader.tensors}
    if names.keys() != stored.keys():
        other = sorted(map(str, names.keys() ^ stored.keys()))
        raise UserError(f"{model} and {described} have other tensors, such as {other[0]}", "give files of one model")
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith(OWN_FIELDS):
            _copy_field(writer, field)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, shape in stored.items():
        array = checkpoint.tensors.read(names[name]).float().numpy()
        if array.shape != shape:
            raise UserError(
                f"{name} has shape {array.shape} in {model}, {shape} in {described}", "give files of one model"
            )
        module = names[name].split(".")[-2]
        writer.add_tensor(name, _permute(array, heads[module]) if module in heads else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _copy_field(writer: gguf.GGUFWriter, field: Any) -> None:
    part = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
    writer.add_key_value(field.name, field.contents(), field.types[0], part)


def _permute(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Interleave the two halves of each rotated head, as llama.cpp stores the rows of q and k."""
    halves = array.reshape(n_heads, 2, array.shape[0] // n_heads // 2, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))


@script
def main() -> None:
    """Command line."""
    parser = script_parser("gguf_model", __doc__)
    parser.add_argument("model", help="folder with safetensors")
    parser.add_argument("described", type=Path, help="GGUF file with the metadata")
    parser.add_argument("out", type=Path, help="file to write")
    args = parser.parse_args()
    write_gguf(args.model, args.described, args.out)


if __name__ == "__main__":
    sys.exit(main())
