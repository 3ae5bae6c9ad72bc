"""What the server reads of a bundle, and what a request means for its model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from shadowllm.errors import UserError
from shadowllm.runtime import open_slots
from tests.shadowllm.serve.conftest import running

openai = pytest.importorskip("openai", reason="the official client is not installed (pip install openai)")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc: not Linux")
@pytest.mark.parametrize("backend", ["torch", "ort"])
def test_a_bundle_that_is_served_may_be_renamed(bundle, tmp_path, backend):
    """Also if another one takes its name, and whatever budget is asked for later."""
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(kind="quantized-shadow", rest="shadow"), folder)
    asked = [{"sparsity": "exact"}, {"lossless": True}, {"sparsity": {"neurons": 0.2}}, {"sparsity": {"shortlist": 9}}]
    with running(folder, open_slots(folder, backend, 2), backend=backend) as server:
        folder.rename(tmp_path / "old")
        shutil.copytree(bundle("opt"), folder)
        client = server.client()
        for options in ({}, {"temperature": 1.0, "seed": 1}, {"stop": "x"}, *({"extra_body": each} for each in asked)):
            assert client.completions.create(model="tiny", prompt="Hello", max_tokens=3, **options).usage
        messages = [{"role": "user", "content": "Hi"}]
        assert client.chat.completions.create(model="tiny", messages=messages, max_tokens=3).usage


def test_a_bundle_that_was_removed_is_no_mistake_of_the_client(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(kind="quantized-shadow", rest="shadow"), folder)
    with running(folder, open_slots(folder, "ort", 2), backend="ort") as server:
        shutil.rmtree(folder)
        options = {"model": "tiny", "prompt": "Hello", "max_tokens": 3}
        with pytest.raises(openai.InternalServerError, match="the bundle was removed") as error:
            server.client().completions.create(**options, extra_body={"sparsity": "exact"})
        assert (error.value.status_code, error.value.code) == (503, "bundle_gone")
        assert server.client().completions.create(**options).usage


@pytest.mark.parametrize("config", [{"repetition_penalty": -1.0}, {"top_p": 7.0}])
def test_a_generation_config_that_cannot_be_used_is_refused_at_the_start(bundle, tmp_path, config):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle(), folder)
    content = json.dumps(config).encode()
    (folder / "generation_config.json").write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["generation_config.json"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"generation_config\.json has a value"), running(folder):
        pass


def test_without_a_number_of_tokens_a_text_has_as_many_as_there_is_room_for(long_texts):
    with running(long_texts, positions=20, max_tokens=12) as server:
        client = server.client()
        messages = [{"role": "user", "content": "Hi"}]  # 8 tokens with the template
        for options, expected in (({}, 12), ({"max_tokens": 3}, 3)):
            usage = client.chat.completions.create(model="tiny", messages=messages, **options).usage
            assert usage.completion_tokens == expected
        for prompt, expected in (("Hello", 12), ("x" * 15, 6), ("x" * 20, 1)):  # the last token takes no position
            usage = client.completions.create(model="tiny", prompt=prompt).usage
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), expected)
        for options, words in (({"prompt": "x" * 21}, "need 21 positions"), ({"max_tokens": 12}, "need 26 positions")):
            with pytest.raises(openai.BadRequestError, match=words):
                client.completions.create(**({"model": "tiny", "prompt": "x" * 15} | options))
        assert server.is_idle()
