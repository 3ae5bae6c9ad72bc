"""Serves a bundle until a signal ends it."""

from __future__ import annotations

import logging
from pathlib import Path

from shadowllm.bundle.manifest import read_manifest
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget
from shadowllm.runtime import open_slots
from shadowllm.runtime.generation.text import load_tokenizer
from shadowllm.runtime.serving.engine import Engine
from shadowllm.serve.app import make_app
from shadowllm.serve.keys import ApiKeys
from shadowllm.serve.model import ServedModel
from shadowllm.serve.transport import listen, make_server
from shadowllm.serve_config import EngineConfig, ServeConfig


def serve(
    bundle: Path,
    backend: str,
    budget: Budget,
    config: ServeConfig,
    engine_config: EngineConfig,
    threads: int | None = None,
) -> None:
    """Serve a bundle. It returns after SIGTERM or Ctrl-C, when running requests have ended.

    Args:
        backend: one of `shadowllm.runtime.SLOT_BACKENDS`.
        budget: of requests that do not give one.

    Raises:
        UserError: the bundle, the budget, the keys or the address cannot be used, or the session failed.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    manifest, keys = read_manifest(bundle), ApiKeys.read(config.api_keys)
    tokenizer = load_tokenizer(bundle, manifest)
    with (
        listen(config) as listener,
        Engine(open_slots(bundle, backend, engine_config.slots, threads), engine_config) as engine,
    ):
        name = config.model_name or manifest.model
        model = ServedModel(name, bundle, manifest, tokenizer, engine, budget, config)
        model.budget_of(None)  # refuses a budget that the bundle cannot have
        server = make_server(make_app(model, keys, engine_config.slots), config, lambda: engine.drain(config.grace))
        host, port = listener.getsockname()[:2]
        print(f"{name}: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server.run(sockets=[listener])
    if engine.failure is not None:
        raise UserError(f"the session failed ({engine.failure})", "see the log above, and start the server again")
