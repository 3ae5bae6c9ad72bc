"""The server as a Ray Serve application: replicas on one or several machines, with the same routes.

    serve run shadowllm.serve.ray:app bundle=/models/out replicas=2

Each replica is a process with a session of its own. Ray sends each request to one of them, starts a replica again if
it dies, and changes their number with the load if ``most_replicas`` is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from shadowllm.errors import UserError
from shadowllm.limits import check_whole
from shadowllm.runtime import SLOT_BACKENDS
from shadowllm.serve.app import make_app
from shadowllm.serve.keys import ApiKeys
from shadowllm.serve.server import Deployment, log_requests, open_model
from shadowllm.serve_config import EngineConfig, ServeConfig


class Arguments(BaseModel):
    """What ``serve run`` and a Serve config file give; the names are those of ``shadowllm serve``.

    Attributes:
        bundle, api_keys: paths that are valid on every machine.
        replicas: how many there are, at least 1; with ``most_replicas``, the smallest number, which may be 0.
        most_replicas: the largest number. Ray adds replicas while they have more requests than slots.
        autoscaling: other fields of Ray's ``AutoscalingConfig``, for example ``upscale_delay_s`` and
            ``downscale_delay_s``.
    """

    model_config = ConfigDict(extra="forbid")

    bundle: Path
    replicas: int = 1
    most_replicas: int | None = None
    autoscaling: dict[str, Any] = {}
    backend: str = SLOT_BACKENDS[0]
    model_name: str | None = None
    api_keys: Path | None = None
    slots: int = EngineConfig.slots
    queue: int = EngineConfig.queue
    threads: int | None = None
    prepack: bool = False


@serve.ingress()
class Replica:
    """One replica.

    Args:
        plan: its host and port are not used, because Ray listens for requests.

    Raises:
        UserError: as `open_model`, or the keys cannot be read.
    """

    def __init__(self, plan: Deployment) -> None:
        log_requests()
        self._plan, self._keys, self._open = plan, ApiKeys.read(plan.server.api_keys), ExitStack()
        self._model = self._open.enter_context(open_model(plan))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._model, self._keys, self._plan.engine.slots)

    def check_health(self) -> None:
        """Raise the error of a failed session; Ray then starts the replica again."""
        if self._model.engine.failure is not None:
            raise self._model.engine.failure

    def __del__(self) -> None:
        self._open.close()


def application(
    plan: Deployment,
    replicas: int = 1,
    most_replicas: int | None = None,
    autoscaling: Mapping[str, Any] | None = None,
) -> Application:
    """Return the application for ``ray.serve.run``.

    Args:
        replicas, most_replicas, autoscaling: see `Arguments`.

    Raises:
        UserError: Ray cannot scale so, or a number is outside its limits.
    """
    check_whole("replicas", replicas, 1 if most_replicas is None else 0)
    if plan.threads is not None:
        check_whole("threads", plan.threads)
    deployment = serve.deployment(Replica, name="shadowllm").options(
        **_scaling(plan.engine.slots, replicas, most_replicas, autoscaling or {}),
        # The engine itself refuses what does not fit into its queue.
        max_ongoing_requests=2 * (plan.engine.slots + plan.engine.queue),
        ray_actor_options={"num_cpus": plan.threads or 1},
        graceful_shutdown_timeout_s=plan.server.grace,
    )
    bound: Application = deployment.bind(plan)
    return bound


def _scaling(slots: int, replicas: int, most_replicas: int | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a deployment that set its number of replicas."""
    if most_replicas is None:
        if given:
            raise UserError("autoscaling is given without most_replicas", "give most_replicas too")
        return {"num_replicas": replicas}
    if unknown := sorted(given.keys() - AutoscalingConfig.model_fields):  # Ray ignores them
        raise UserError(f"autoscaling has no {unknown[0]!r:.80}", "give fields of Ray's AutoscalingConfig")
    fields = {"min_replicas": replicas, "max_replicas": most_replicas, "target_ongoing_requests": slots, **given}
    try:
        return {"autoscaling_config": AutoscalingConfig(**fields)}
    except ValidationError as error:
        first = error.errors()[0]
        problem = " ".join(("autoscaling:", *map(str, first["loc"]), first["msg"]))
        raise UserError(problem, "correct replicas, most_replicas or autoscaling") from error


def app(args: Arguments) -> Application:
    """Return the application for ``serve run`` and Serve config files."""
    # Ray starts a replica in another working directory.
    keys = None if args.api_keys is None else args.api_keys.resolve()
    plan = Deployment(
        args.bundle.resolve(),
        args.backend,
        server=ServeConfig(model_name=args.model_name, api_keys=keys),
        engine=EngineConfig(args.slots, args.queue),
        threads=args.threads,
        prepack=args.prepack,
    )
    return application(plan, args.replicas, args.most_replicas, args.autoscaling)
