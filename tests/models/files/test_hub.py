"""Downloads from a local fake hub: only the files of one model are requested."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from shadowllm.errors import UserError
from shadowllm.models.files.hub import download
from shadowllm.models.registry import load_model
from tests.conftest import build_transformers_model
from tests.models.checkpoints import write_gguf

COMMIT = "c" * 40
REPO = "someone/a-model"


class Hub(ThreadingHTTPServer):
    """Serves the files of one repository like the hub; ``asked`` lists the downloaded files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked, self.gated = folder, [], False


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if self.server.gated:
            self.refuse(403, "GatedRepo")
            return
        resolve = f"/{REPO}/resolve/{COMMIT}/"
        if path.startswith(f"/api/models/{REPO}"):
            names = sorted(str(p.relative_to(self.server.folder)) for p in self.server.folder.rglob("*") if p.is_file())
            if "/tree/" in path:
                sizes = {name: (self.server.folder / name).stat().st_size for name in names}
                body = [{"type": "file", "path": n, "size": size, "oid": n} for n, size in sizes.items()]
            else:
                body = {"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self.answer(json.dumps(body).encode(), {"Content-Type": "application/json"})
        elif path.startswith(resolve) and (self.server.folder / path.removeprefix(resolve)).is_file():
            data = (self.server.folder / path.removeprefix(resolve)).read_bytes()
            if self.command == "GET":
                self.server.asked.append(path.removeprefix(resolve))
            self.answer(data, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
        else:
            self.refuse(404, "RepoNotFound")

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def answer(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "repository").mkdir()
    server = Hub(tmp_path / "repository")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield server
    server.shutdown()
    server.server_close()


def publish(hub, *names: str) -> None:
    for name in names:
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_text(name)


def test_a_safetensors_model_without_what_lies_beside_it(hub, checkpoint, tmp_path):
    for path in checkpoint("llama-gqa").iterdir():
        (hub.folder / path.name).write_bytes(path.read_bytes())
    publish(
        hub, "pytorch_model.bin", "ema.safetensors", "onnx/model.onnx", "model-00001-of-00002.safetensors", "x.gguf"
    )
    spec, weights, _ = load_model(REPO, cache_dir=tmp_path / "cache")
    assert spec.n_layers == 3
    assert weights["lm_head.weight"].shape == (97, 48)
    assert {name for name in hub.asked if not name.endswith(".json")} == {"model.safetensors"}


def test_an_adapter_beside_the_model_is_fetched_so_that_it_can_be_merged(hub, checkpoint, tmp_path):
    for path in checkpoint("llama-gqa").iterdir():
        (hub.folder / path.name).write_bytes(path.read_bytes())
    publish(hub, "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
    with pytest.raises(UserError, match="holds an adapter beside the model's weights"):
        load_model(REPO, cache_dir=tmp_path / "cache")
    fetched = {name for name in hub.asked if not name.endswith(".json")}
    assert fetched == {"model.safetensors", "adapter_model.safetensors"}


@pytest.mark.parametrize("name", [f"{REPO}/tiny.Q4_K_M.gguf", f"{REPO}:Q4_K_M", f"{REPO}:q4_k_m"])
def test_one_gguf_file_of_several(hub, tmp_path, name):
    publish(hub, "tiny.Q4_K_S.gguf", "tiny.Q8_0.gguf", "README.md", "config.json")
    write_gguf(hub.folder / "tiny.Q4_K_M.gguf", build_transformers_model("llama", {}))
    assert load_model(name, cache_dir=tmp_path / "cache")[0].n_layers == 3
    assert hub.asked == ["tiny.Q4_K_M.gguf"]


def test_all_parts_of_a_split_model(hub, tmp_path):
    (hub.folder / "Q8_0").mkdir()
    write_gguf(hub.folder / "Q8_0" / "tiny-Q8_0.gguf", build_transformers_model("llama", {}), split=12)
    publish(hub, "tiny.Q4_0.gguf")
    assert load_model(f"{REPO}:Q8_0", cache_dir=tmp_path / "cache")[0].n_layers == 3
    assert sorted(hub.asked) == [f"Q8_0/tiny-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (REPO, r"2 GGUF models \(a\.Q4_0\.gguf, a\.Q8_0\.gguf\); name one, as someone/a-model/a\.Q4_0\.gguf"),
        (f"{REPO}:Q5_K", "0 of them Q5_K"),
        (f"{REPO}:Q", "0 of them Q;"),
        (f"{REPO}/b.gguf", r"0 of them b\.gguf"),
        ("someone/else", "no such model: someone/else"),
    ],
)
def test_nothing_is_fetched_before_one_is_named(hub, tmp_path, name, words):
    publish(hub, "a.Q4_0.gguf", "a.Q8_0.gguf", "config.json")
    with pytest.raises(UserError, match=words):
        download(name, tmp_path / "cache")
    assert hub.asked == []


def test_the_shards_that_the_index_names_whatever_they_are_called(hub, checkpoint, tmp_path):
    for path in checkpoint("llama-gqa").iterdir():
        (hub.folder / path.name).write_bytes(path.read_bytes())
    (hub.folder / "parts").mkdir()
    (hub.folder / "model.safetensors").rename(hub.folder / "parts/pytorch_model-00001-of-00001.safetensors")
    index = {"weight_map": {"lm_head.weight": "parts/pytorch_model-00001-of-00001.safetensors"}}
    (hub.folder / "model.safetensors.index.json").write_text(json.dumps(index))
    publish(hub, "model-00001-of-00002.safetensors")
    assert load_model(REPO, cache_dir=tmp_path / "cache")[0].n_layers == 3
    assert "model-00001-of-00002.safetensors" not in hub.asked


@pytest.mark.parametrize("name", ["./nothing", "/nowhere/at/all", "a/b/c", "~/model", "model.gguf", "a b/c"])
def test_what_is_no_name(name, tmp_path):
    with pytest.raises(UserError, match="no such model"):
        download(name, tmp_path)


def test_a_hub_that_cannot_be_reached(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=f"{REPO} is no local folder, and cannot be had from the hub, http://127.0.0.1:9 "
    ):
        download(REPO, tmp_path / "cache")


def test_a_repository_without_weights_is_called_so(hub, tmp_path):
    publish(hub, "pytorch_model.bin")
    (hub.folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="no model weights"):
        load_model(REPO, cache_dir=tmp_path / "cache")


def test_without_the_hub_the_cache_serves(hub, checkpoint, tmp_path, monkeypatch):
    for path in checkpoint("llama-gqa").iterdir():
        (hub.folder / path.name).write_bytes(path.read_bytes())
    download(REPO, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_model(REPO, cache_dir=tmp_path / "cache")[0].n_layers == 3
    with pytest.raises(UserError, match="cannot be had from the hub"):
        download("someone/else", tmp_path / "cache")


def test_a_repository_with_a_gate_says_how_to_enter(hub, tmp_path):
    hub.gated = True
    with pytest.raises(UserError, match=rf"ask for access on https://huggingface.co/{REPO}, then log in"):
        download(REPO, tmp_path / "cache")
