"""Values of a bundle's low-bit copy: computed when they are read, so that they are not all in memory."""

from __future__ import annotations

import pytest
import torch

from shadowllm.bundle import quantisation
from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.quantisation import LOW_BIT_COPY, dequantise, quantise
from shadowllm.bundle.quantised_tensors import dequantised_copy
from shadowllm.bundle.weight_names import copied_names
from shadowllm.bundle.weights import read_weights
from shadowllm.models import sparse_decoder
from shadowllm.models.sparse_decoder import CopyDecoder, SparseDecoder
from shadowllm.predictor.low_bit_copy import low_bit_copies


@pytest.mark.parametrize(("rows", "width"), [(1, 64), (7, 48), (5, 200)])
def test_values_are_those_of_numpy(rows, width):
    matrix = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)).numpy()
    data, scales = quantise(matrix, LOW_BIT_COPY)
    expected = torch.from_numpy(dequantise(data, scales, width, LOW_BIT_COPY).copy())
    assert torch.equal(dequantised_copy(torch.from_numpy(data), torch.from_numpy(scales), width), expected)


@pytest.mark.parametrize("variant", ["llama-gqa", "opt"])
def test_a_bundle_has_the_copy_of_its_weights(bundle, variant):
    folder = bundle(variant, kind="quantized-shadow", rest="shadow")
    manifest = read_manifest(folder)
    read = read_weights(folder, manifest)
    expected = low_bit_copies(manifest.sparse_layers, read.sparse, rest=True)
    assert read.copies.keys() == expected.keys() == set(copied_names(manifest.sparse_layers, rest=True))
    assert all(torch.equal(read.copies[name], value) for name, value in expected.items())
    assert "final_norm.weight" not in read.copies


def test_values_are_not_kept(bundle):
    folder = bundle(kind="quantized-shadow", rest="shadow")
    copies = read_weights(folder, read_manifest(folder)).copies
    name = "layers.1.up_proj.weight"
    assert copies[name] is not copies[name]


@pytest.mark.parametrize("variant", ["llama-gqa", "opt"])
@pytest.mark.parametrize("certify", [False, True])
def test_logits_do_not_depend_on_parts(monkeypatch, bundle, variant, certify):
    folder = bundle(variant, kind="quantized-shadow", rest="shadow")
    read, spec = read_weights(folder, read_manifest(folder)), read_manifest(folder).spec
    x = torch.randn(2, 9, spec.hidden_size, generator=torch.Generator().manual_seed(1))

    def logits(copies):
        copy, certificate = CopyDecoder(spec, read.sparse, copies), read.certificate if certify else None
        decoder = SparseDecoder(
            spec, read.sparse, lambda *_: None, copy=copy, rest="shadow", shortlist=7, certificate=certificate
        )
        return decoder.logits(x), decoder.recomputed

    expected, rows = logits(dict(read.copies))
    assert rows.shape == (2, 9)
    assert (rows.max() > 7) == certify
    monkeypatch.setattr(quantisation, "CHUNK", 10 * spec.hidden_size)
    monkeypatch.setattr(sparse_decoder, "TOKENS_AT_ONCE", 4)
    assert len(list(read.copies.parts(spec.output_table))) > 2
    found, found_rows = logits(read.copies)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found_rows, rows)
