"""The contenders of the frontier and its report; the measurement itself is that of `bench`."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch

from shadowllm.benchmarks import frontier
from shadowllm.benchmarks.frontier import (
    DIAL,
    SHORT_DIAL,
    contenders_of,
    export_all,
    main,
    measure,
    plot,
    print_rows,
)
from shadowllm.benchmarks.gguf_model import write_gguf
from shadowllm.benchmarks.llama_cpp_rivals import llama_cpp_rivals
from shadowllm.benchmarks.noisy_model import write_noisy_model
from shadowllm.bundle.manifest import read_manifest
from shadowllm.errors import UserError
from shadowllm.models.registry import load_model
from tests.conftest import VARIANTS, build_transformers_model
from tests.models import checkpoints


@pytest.fixture
def bundles(bundle):
    mixed = {"kind": "quantized-shadow", "rest": "shadow"}
    return {
        "float32": bundle("llama-blocks", **mixed),
        "int8": bundle("llama-blocks", weight_dtype="int8", **mixed),
        "int6": bundle("llama-blocks", weight_dtype="int6", **mixed),
        "int4": bundle("llama-blocks", weight_dtype="int4"),
    }


def test_contenders(bundles):
    found = contenders_of(bundles)
    dense = [name for name, (_, backend, _) in found.items() if backend == "ort-dense"]
    assert dense == ["float32 dense", "int8 dense", "int4 dense"]
    assert len(found) == len(dense) + 3 * (len(DIAL) + 1) + 2  # int8 and int6 with everything active
    fewer = contenders_of(bundles, short=True)
    assert [name for name in fewer if not name.startswith("float32")] == ["int8 dense", "int4 dense"]
    assert len(fewer) == len(dense) + len(SHORT_DIAL) + 1


@pytest.mark.slow
def test_rows_and_figure(bundles, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text"
    text.write_text("the sea and the shadow of a model " * 20)
    sizes = {"prompt_len": 4, "new_tokens": 4, "runs": 1, "windows": 1, "seqlen": 16}
    rows = measure({name: bundles[name] for name in ("float32", "int8", "int4")}, [text], **sizes)
    assert all(row["perplexity"] > 1 and row["itl_ms"] > 0 for row in rows)
    assert rows[0]["speedup"]["median"] == 1
    print_rows(rows)
    assert "int8 10%/100%/2048" in capsys.readouterr().out
    plot(rows, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_bundles_of_another_model_or_version_are_not_measured(bundles, checkpoint, tmp_path):
    model, made = str(checkpoint("llama-blocks")), {"integers": (), "bundle": bundles["float32"]}
    assert export_all(model, tmp_path, "float32", **made) == {"float32": bundles["float32"]}
    with pytest.raises(UserError, match="is of another model, or another version wrote it; remove it"):
        export_all(str(checkpoint("llama-gqa")), tmp_path, "float32", **made)
    older = shutil.copytree(bundles["float32"], tmp_path / "older")
    replace(read_manifest(older), tools={"shadowllm": "0.1"}).write(older)
    with pytest.raises(UserError, match="another version"):
        export_all(model, tmp_path, "float32", integers=(), bundle=older)


def test_too_little_text(bundles, tmp_path):
    (tmp_path / "text").write_text("the sea")
    sizes = {"prompt_len": 4, "new_tokens": 4, "seqlen": 16}
    with pytest.raises(UserError, match="52 are needed; give more text or fewer windows"):
        measure({"float32": bundles["float32"]}, [tmp_path / "text"], **sizes)


def test_the_report_tells_the_text_and_the_sizes(bundles, monkeypatch, tmp_path):
    gain = {"median": 1.0, "min": 1.0, "max": 1.0}
    row = {"name": "float32 dense", "budget": None, "itl_ms": 1.0, "speedup": gain, "bytes_per_token": 1}
    row |= {"perplexity": 2.0, "peak_rss_mb": 1.0}
    monkeypatch.setattr(frontier, "export_all", lambda *_: bundles)
    monkeypatch.setattr(frontier, "measure", lambda *_, **__: [row])
    text, report = tmp_path / "text", tmp_path / "frontier.json"
    text.write_text("the sea")
    assert main(["model", str(tmp_path), "--text", str(text), "--windows", "2", "--json", str(report)]) == 0
    settings = json.loads(report.read_text())["settings"]
    assert settings.pop("text") == {"text": hashlib.sha256(b"the sea").hexdigest()}
    sizes = {"prompt_len": 128, "new_tokens": 128, "seqlen": 512, "runs": 5, "windows": 2, "threads": 2}
    assert settings == sizes


def test_llama_cpp_needs_its_file_and_its_interpreter(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        llama_cpp_rivals(Path("python"), tmp_path / "model.gguf", tmp_path, 1)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(UserError, match="cannot run"):
        llama_cpp_rivals(tmp_path / "python", tmp_path / "model.gguf", tmp_path, 1)
    with pytest.raises(UserError, match=r"cannot make Q8_0 .*llama_cpp"):
        llama_cpp_rivals(Path(sys.executable), tmp_path / "model.gguf", tmp_path, 1)
    assert main(["model", str(tmp_path), "--gguf", "model.gguf"]) == 1


def test_a_gguf_file_holds_the_model(checkpoint, tmp_path):
    described = build_transformers_model(*VARIANTS["llama-gqa"])
    checkpoints.write_gguf(tmp_path / "described.gguf", described, keys={".general.name": "tiny"})
    noisy, out = tmp_path / "noisy", tmp_path / "noisy.gguf"
    noisy.mkdir()
    write_noisy_model(str(checkpoint("llama-gqa")), noisy)
    write_gguf(str(noisy), tmp_path / "described.gguf", out)
    expected, found = (load_model(path)[1].load() for path in (noisy, out))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert gguf.GGUFReader(out).fields["general.name"].contents() == "tiny"
    with pytest.raises(UserError, match="have other tensors"):
        write_gguf(str(checkpoint("llama-mqa-tied")), tmp_path / "described.gguf", out)
