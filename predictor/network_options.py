"""Options that have no effect: of networks, if none are trained, and of the calibration, if a predictor is given."""

from __future__ import annotations

from shadowllm.config import Calibration, TrainConfig
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


def check_given(kind: str, selector: str | None, calibration: Calibration | None) -> None:
    """Refuse options that have no effect if a predictor is given.

    Args:
        kind: of the given predictor.
        selector: that was asked for, if any.

    Raises:
        UserError: another kind was asked for, or the model would be traced in another way than by default.
    """
    if selector not in (None, kind):
        raise UserError(f"the given predictor is of the kind {kind}, not {selector}", "leave out the selector")
    default = Calibration()
    given = [name for name, value in vars(calibration or default).items() if value != getattr(default, name)]
    if given:
        raise UserError(
            f"a predictor is given, so nothing is traced, and {' and '.join(given)} cannot be used",
            f"leave out {' and '.join(given)}",
        )
