"""Writes a copy of a model with noise on its weights, for a fair test of selectors that use a low-bit copy.

    python -m shadowllm.benchmarks.noisy_model "$(python benchmarks/model_path.py)" out/noisy

A low-bit copy of the weights is exact if the checkpoint itself was quantised to as few bits. So every
matrix gets uniform noise as wide as one step of 8 bits, with one scale per 32 elements of a row. This is too
little to change the model, but moves its weights off the grid of any copy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from shadowllm.benchmarks.script_parser import script, script_parser
from shadowllm.exporter.staging import check_output, staged
from shadowllm.models.registry import load_model

BLOCK, STEPS = 32, 127  # 8-bit steps from zero to the largest element of a block


def with_noise(matrix: Tensor, generator: torch.Generator) -> Tensor:
    """``matrix (rows, width)`` plus noise, uniform within half a step on either side."""
    width = matrix.shape[1]
    padded = torch.nn.functional.pad(matrix, (0, -width % BLOCK)).unflatten(1, (-1, BLOCK))
    step = padded.abs().amax(dim=-1, keepdim=True) / STEPS
    noise = (torch.rand(padded.shape, generator=generator) - 0.5) * step
    return matrix + noise.flatten(1)[:, :width]


def write_noisy_model(model: str, folder: Path, seed: int = 0) -> None:
    """Write a Hugging Face folder with the noisy weights in float32, and the tokenizer.

    Raises:
        UserError: there is no such model.
    """
    from safetensors.torch import save_file

    checkpoint = load_model(model)[2]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in sorted(checkpoint.tensors.names()):
        tensor = checkpoint.tensors.read(name).float().contiguous()
        tensors[name] = with_noise(tensor, generator) if tensor.ndim == 2 else tensor
    save_file(tensors, folder / "model.safetensors")
    checkpoint.config.save_pretrained(folder)
    checkpoint.tokenizer().save_pretrained(folder)


@script
def main() -> None:
    """Command line."""
    parser = script_parser("noisy_model", __doc__)
    parser.add_argument("model", help="folder with safetensors, or .gguf file")
    parser.add_argument("out", type=Path, help="folder to make")
    args = parser.parse_args()
    check_output(args.out, overwrite=False)
    with staged(args.out, overwrite=False) as folder:
        write_noisy_model(args.model, folder)


if __name__ == "__main__":
    sys.exit(main())
