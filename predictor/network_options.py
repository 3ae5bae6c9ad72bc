"""Options of `TrainConfig` that only selectors with networks use."""

from __future__ import annotations

from shadowllm.config import TrainConfig
from shadowllm.errors import UserError

NETWORKS = ("shadow", "layerwise")  # selectors whose networks are trained
OPTIONS = ("loss", "epochs", "learning_rate", "weight_decay", "batch_tokens", "rank")


def check_network_options(config: TrainConfig | None, selector: str, trains: bool = True) -> None:
    """Refuse options of networks if none are trained.

    Args:
        config: None has no options.
        selector: of the predictor.
        trains: whether a predictor is trained at all.

    Raises:
        UserError: such an option is given.
    """
    given = " and ".join(name for name in OPTIONS if config and getattr(config, name) != getattr(TrainConfig, name))
    if given and not trains:
        raise UserError(f"a predictor is given, so {given} cannot be used", f"leave out {given}")
    if given and selector not in NETWORKS:
        raise UserError(
            f"the selector {selector} trains no networks, so {given} cannot be used",
            f"leave out {given}, or use the selector {' or '.join(NETWORKS)}",
        )
