"""Options that have no effect: of networks, if none are trained, and of the calibration, if a predictor is given."""

from __future__ import annotations

from shadowllm.config import Calibration, TrainConfig
from shadowllm.errors import UserError

NETWORKS = ("shadow", "layerwise")  # selectors whose networks are trained


def check_network_options(config: TrainConfig | None, selector: str, trains: bool = True) -> None:
    """Refuse options of networks if none are trained.

    Args:
        config: None has no options.
        selector: of the predictor.
        trains: whether a predictor is trained at all.

    Raises:
        UserError: such an option is given.
    """
    given = config.network_options if config else ""
    if given and not trains:
        raise UserError(f"a predictor is given, so {given} cannot be used", f"leave out {given}")
    if given and selector not in NETWORKS:
        raise UserError(
            f"the selector {selector} trains no networks, so {given} cannot be used",
            f"leave out {given}, or use the selector {' or '.join(NETWORKS)}",
        )


def check_given(kind: str, selector: str | None) -> None:
    """Refuse a selector that the given predictor is not.

    Args:
        kind: of the given predictor.
        selector: that was asked for, if any.

    Raises:
        UserError: another kind was asked for.
    """
    if selector not in (None, kind):
        raise UserError(f"the given predictor is of the kind {kind}, not {selector}", "leave out the selector")


def check_calibration(calibration: Calibration | None, selector: str, made: bool) -> None:
    """Refuse options of the calibration if nothing is traced.

    Args:
        calibration: None has no options.
        selector: of the predictor.
        made: whether the predictor is made, and not given.

    Raises:
        UserError: such an option is given.
    """
    if made and selector != "random":
        return
    used, default = ("dense_layers", "seed") if made else (), Calibration()
    changed = [name for name, value in vars(calibration or default).items() if value != getattr(default, name)]
    if given := " and ".join(name for name in changed if name not in used):
        why = "a random selector is made" if made else "a predictor is given"
        raise UserError(f"{why}, so nothing is traced, and {given} cannot be used", f"leave out {given}")
