"""A bundle in the layout of the hub's cache, where every file is a link out of its folder, works like any other."""

from __future__ import annotations

import numpy as np
import pytest

from shadowllm.bundle.engine_record import check_sidecar, read_sidecar
from shadowllm.bundle.manifest import DATA_FILE, read_manifest
from shadowllm.cli import main
from shadowllm.config import EngineOptions
from shadowllm.errors import UserError
from shadowllm.pipeline import build_engines
from shadowllm.runtime import generate, open_session
from tests.bundles import as_in_the_hub_cache

PROMPT = [[1, 5, 9, 30]]


def tokens(bundle, backend):
    with open_session(bundle, backend) as session:
        return list(generate(session, PROMPT, 4))


@pytest.mark.parametrize("backend", ["ort", "ort-dense", "torch"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float16"}, {"variant": "llama-blocks", "weight_dtype": "int8"}, {"kind": "quantized-shadow"}],
    ids=str,
)
def test_it_runs(bundle, tmp_path, backend, options):
    plain = bundle(**options)
    linked = as_in_the_hub_cache(plain, tmp_path)
    np.testing.assert_array_equal(tokens(linked, backend), tokens(plain, backend))


def test_it_is_inspected_and_evaluated(bundle, tmp_path, capsys):
    linked = as_in_the_hub_cache(bundle(), tmp_path)
    assert main(["inspect", str(linked)]) == 0
    assert main(["eval", str(linked), "--text", __file__, "--tokens", "32", "--seqlen", "16"]) == 0
    assert "oracle" in capsys.readouterr().out


def test_a_blob_that_was_changed_is_refused(bundle, tmp_path):
    linked = as_in_the_hub_cache(bundle(), tmp_path)
    blob = (linked / DATA_FILE).resolve()
    data = blob.read_bytes()
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match="SHA-256 is not the one"):
        tokens(linked, "ort")


@pytest.mark.slow
def test_its_engines_are_built_and_may_be_links_too(bundle, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    linked = as_in_the_hub_cache(bundle(kind="quantized-shadow"), tmp_path / "first")
    build_engines(linked, EngineOptions("tensorrt_rtx", sms=[89], capacity=32, max_seqlen=8))
    again = as_in_the_hub_cache(linked, tmp_path / "second")
    pieces = read_manifest(again).sparse_pieces
    assert len(pieces) == 2
    for piece in pieces:
        engine = again / "engines" / "tensorrt_rtx" / f"{piece}.engine"
        assert engine.is_symlink()
        check_sidecar(engine, "tensorrt_rtx", read_sidecar(engine).version, files=read_manifest(again).files)
    assert main(["inspect", str(again)]) == 0
