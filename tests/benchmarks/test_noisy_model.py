"""A noisy copy of a model: its weights are on no quantisation grid, it is close to the model, and it loads."""

from __future__ import annotations

import torch

from shadowllm.benchmarks.noisy_model import with_noise, write_noisy_model
from shadowllm.models.registry import load_model


def test_noise_stays_within_half_a_step_of_8_bits():
    matrix = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))  # the last block of a row is short
    moved = with_noise(matrix, torch.Generator().manual_seed(1)) - matrix
    for start in (0, 32, 64):
        block = slice(start, start + 32)
        half_step = matrix[:, block].abs().amax(dim=1, keepdim=True) / 127 / 2
        assert bool((moved[:, block].abs() <= half_step * 1.0001).all())
        assert bool((moved[:, block].abs().amax(dim=1, keepdim=True) > half_step / 2).all())


def test_a_noisy_model_loads_with_matrices_moved_and_all_else_the_same(checkpoint, tmp_path):
    write_noisy_model(str(checkpoint("llama-biases")), tmp_path)
    before, after = (load_model(path)[1].load() for path in (checkpoint("llama-biases"), tmp_path))
    for name, tensor in before.items():
        if tensor.ndim == 2:
            assert 0 < (after[name] - tensor).norm() < 0.01 * tensor.norm()
        else:
            assert torch.equal(after[name], tensor)
