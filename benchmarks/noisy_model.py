"""A copy of a model whose weights lie on no grid: what a quantised checkpoint would flatter shows on it.

    python -m shadowllm.benchmarks.noisy_model "$(python benchmarks/model_path.py)" out/noisy

A selector that is a low-bit copy of the weights is exact on weights that were of so few bits
themselves. Every matrix gets uniform noise as wide as one step of 8 bits, with a scale for 32
elements of a row: too little to change the model, and off the grid of any copy.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from shadowllm.benchmarks.script import script, script_parser
from shadowllm.exporter.staging import check_output, staged
from shadowllm.models.registry import load_model

BLOCK, STEPS = 32, 127  # of 8 bits: from zero to the largest element of a block


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
        UserError: no such model.
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
