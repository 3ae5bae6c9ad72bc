"""Serves a bundle until a signal ends it."""

from __future__ import annotations

import faulthandler
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from shadowllm.bundle.manifest import read_manifest
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget
from shadowllm.runtime import SLOT_BACKENDS, open_slots
from shadowllm.runtime.serving.engine import Engine
from shadowllm.serve.app import make_app
from shadowllm.serve.keys import ApiKeys
from shadowllm.serve.log import logger
from shadowllm.serve.model import ServedModel
from shadowllm.serve.transport import accepted_hosts, listen, make_server
from shadowllm.serve_config import EngineConfig, ServeConfig


@dataclass(frozen=True)
class Deployment:
    """A bundle, and how it is served.

    Attributes:
        backend: one of `shadowllm.runtime.SLOT_BACKENDS`.
        budget: of requests that do not give one; None is the bundle's own.
        threads, prepack: see `open_slots`.
    """

    bundle: Path
    backend: str = SLOT_BACKENDS[0]
    budget: Budget | None = None
    server: ServeConfig = field(default_factory=ServeConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    threads: int | None = None
    prepack: bool = False


@contextmanager
def open_model(plan: Deployment) -> Iterator[ServedModel]:
    """Load a bundle and start its engine; leaving ends the engine.

    Raises:
        UserError: the bundle or the budget cannot be used.
    """
    manifest = read_manifest(plan.bundle)
    with Engine(
        open_slots(plan.bundle, plan.backend, plan.engine.slots, plan.threads, plan.prepack), plan.engine
    ) as engine:
        yield ServedModel.of(plan.bundle, plan.backend, manifest, engine, plan.server, plan.budget)


def log_requests() -> None:
    """Write the log of requests to standard error, and the stack of each thread if the process crashes."""
    if not faulthandler.is_enabled():
        faulthandler.enable(2)  # the descriptor of standard error, as `sys.stderr` may be replaced
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)


def serve(plan: Deployment) -> None:
    """Serve a bundle. It returns after SIGTERM, SIGHUP or Ctrl-C, when running requests have ended.

    Raises:
        UserError: as `open_model`, the keys or the address cannot be used, or the session failed.
    """
    log_requests()
    config, keys = plan.server, ApiKeys.read(plan.server.api_keys)
    with listen(config) as listener, open_model(plan) as model:
        engine = model.engine
        host, port = listener.getsockname()[:2]
        app = make_app(model, keys, plan.engine.slots, accepted_hosts(config, host))
        server = make_server(app, config, lambda: engine.drain(config.grace))
        engine.on_failure = server.stop  # so that a supervisor starts it again
        print(f"{model.name}: http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        server.run(sockets=[listener])
    if engine.failure is not None:
        raise UserError(f"the session failed ({engine.failure})", "see the log above, and start the server again")
