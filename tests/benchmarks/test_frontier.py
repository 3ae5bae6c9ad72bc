"""The contenders of the frontier and its report; the measurement itself is that of `bench`."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import pytest
import torch

from shadowllm.benchmarks.frontier import DIAL, SHORT_DIAL, contenders_of, main, measure, plot, print_rows
from shadowllm.benchmarks.gguf_model import write_gguf
from shadowllm.benchmarks.llama_cpp_rivals import llama_cpp_rivals
from shadowllm.benchmarks.noisy_model import write_noisy_model
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
