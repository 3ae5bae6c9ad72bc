"""Sources of canonical tensors, and the memory that they need."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowllm.models import weights as weights_module
from shadowllm.models.decoder import Decoder
from shadowllm.models.registry import load_model
from shadowllm.models.weights import Source
from tests.allocations import Allocations


def test_a_scaled_tensor_is_one_copy_of_the_stored_one():
    stored = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    before = stored.clone()
    with Allocations() as made:
        found = Source("table", scale=0.3, shift=1.0).convert(stored)
    assert made.sizes == [(stored.numel(), torch.float32)]
    assert torch.equal(found, 0.3 * (before.float() + 1.0))
    assert torch.equal(stored, before)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["llama-gqa", "opt"])
def test_weights_of_16_bits_are_kept_so_and_converted_in_parts(checkpoint, tmp_path, variant, monkeypatch):
    monkeypatch.setattr(weights_module, "CONVERTED_AT_ONCE", 512)
    AutoModelForCausalLM.from_pretrained(checkpoint(variant)).bfloat16().save_pretrained(tmp_path)
    spec, weights, _ = load_model(tmp_path)
    loaded, ids = weights.load(), torch.tensor([[3, 7, 3]])
    assert {tensor.dtype for tensor in loaded.stored.values()} == {torch.bfloat16}
    with Allocations() as made:
        found = Decoder(spec, loaded)(ids)
    assert max(size for size, _ in made.sizes) < spec.vocab_size * spec.hidden_size
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, Decoder(spec, dict(loaded))(ids), atol=1e-6, rtol=0)
