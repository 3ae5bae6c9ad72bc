"""The commands and Python examples of the README and docs/api.md run unchanged on a small model, with less text."""

from __future__ import annotations

import re
import shlex
from functools import partial
from pathlib import Path

import pytest

from shadowllm import pipeline
from shadowllm.cli import main
from shadowllm.evaluation import tuning
from shadowllm.exporter.engines.build import build_engine
from tests.conftest import build_tokenizer, build_transformers_model

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Large enough for a default shadow, 256 tokens and the token ids of the example.
SMALL = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 8192,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    build_transformers_model("llama", SMALL).save_pretrained(folder / "MODEL")
    build_tokenizer().save_pretrained(folder / "MODEL")
    return folder


@pytest.mark.slow
def test_the_readme_works(folder, monkeypatch, capfd):
    pytest.importorskip("tensorrt_rtx", reason="the README builds engines (pip install '.[tensorrt-rtx]')")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tuning, "tune", partial(tuning.tune, tokens=256))
    # Kernels for all GPUs would take a minute.
    monkeypatch.setattr(
        pipeline, "build_engine", lambda *files, **options: build_engine(*files, **options | {"sms": (89,)})
    )
    # `serve` does not end by itself; its own tests start it.
    commands = re.findall(r"^ {4}shadowllm (?!serve)(.*)$", README, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["export", "run", "bench", "build"]
    for command in commands:
        assert main(shlex.split(command)) == 0, capfd.readouterr().err
    engines = Path("my-bundle/engines/tensorrt_rtx").glob("*.engine")
    assert {path.name for path in engines} == {
        "stem.engine",
        "body.engine",
    }
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    capfd.readouterr()
    exec(compile(example, "README.md", "exec"), {})
    assert 1 <= len(capfd.readouterr().out.split()) <= 32
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    exec(compile("".join(snippets), "docs/api.md", "exec"), {})
