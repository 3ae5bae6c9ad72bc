"""Options that several commands share, and their conversion to configurations."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from shadowllm.commands.flags import Group, add_flags, build, values, whole
from shadowllm.config import (
    DEFAULT_BUDGET,
    Calibration,
    EngineOptions,
    Export,
    Flavour,
    Source,
    Target,
    TrainConfig,
)
from shadowllm.draft_config import Drafting
from shadowllm.errors import UserError
from shadowllm.limits import LARGEST, check_threads
from shadowllm.models.sparsity import Budget, Rest, parse_fractions
from shadowllm.runtime.session import Prefill

FLAVOURS = get_args(Flavour)
SIZES = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_whole(group: Group, option: str, *, least: int = 1, most: int = LARGEST, **keywords: Any) -> None:
    """Add an option for a whole number from ``least`` to ``most``; ``keywords`` are those of ``add_argument``."""
    group.add_argument(option, type=whole(option, least, most), **keywords)


def add_threads(group: Group, help: str) -> None:
    """Add ``--threads``, which is None unless given."""
    parse = whole("--threads", 1, LARGEST)
    group.add_argument("--threads", type=lambda text: check_threads(parse(text), "--threads"), help=help)


def add_slot_backend(parser: argparse.ArgumentParser, backends: Sequence[str]) -> None:
    """Add ``--backend``, ``--threads`` and ``--prepack`` of a session with slots; the first backend is the default."""
    parser.add_argument("--backend", choices=backends, default=backends[0], help=f"backend (default: {backends[0]})")
    add_threads(parser, help="threads of each operator on the CPU (default: the backend's own)")
    add_prepack(parser)


def add_prefill(parser: argparse.ArgumentParser) -> None:
    """Add ``--prefill``."""
    parser.add_argument(
        "--prefill",
        choices=get_args(Prefill),
        default="dense",
        help="graphs that prefill with the backend ort; sparse needs less memory for integer weights, "
        "whose prompts then take longer (default: dense)",
    )


def output_file(text: str) -> Path:
    """The argparse type of a file to write.

    Raises:
        UserError: it cannot be written. This is told before the work that it is for.
    """
    path = Path(text)
    if path.is_dir():
        raise UserError(f"{path} is a folder", "name a file")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}", "name a file in a folder that exists")
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"cannot write {path}: no permission", "change its permissions, or name another place")
    # A regular file is written under another name first.
    if (path.is_file() or not path.exists()) and not os.access(path.resolve().parent, os.W_OK):
        raise UserError(f"cannot write {path}: no permission in its folder", "change it, or name another place")
    return path


def replaced_file(text: str) -> Path:
    """The argparse type of a regular file to write.

    Raises:
        UserError: it cannot be written, or is no regular file.
    """
    path = output_file(text).resolve()
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file", "name a file")
    return path


def figure_file(text: str) -> Path:
    """The argparse type of a PNG file to write."""
    path = output_file(text)
    if path.suffix.lower() != ".png":
        raise UserError(f"the figure {path} would be a PNG file", "give it a name that ends with .png")
    if find_spec("matplotlib") is None:
        raise UserError("drawing the figure needs matplotlib", "pip install 'shadowllm[bench]'")
    return path


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL and the options of its download."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder with safetensors, .gguf file, or name on the hub: owner/name, owner/name:Q4_K_M",
    )
    add_flags(parser.add_argument_group("model"), Source)


def source(args: argparse.Namespace) -> Source:
    """Return the model from the options of `add_model`."""
    return build(args, Source, model=args.model)


def add_fractions(parser: argparse.ArgumentParser, default: Budget | None, otherwise: str = "") -> Group:
    """Add the fractions of a budget. Without a default they are None unless given.

    Args:
        otherwise: the default in words, for the help.

    Returns:
        The group of the options, for more of them.
    """
    group = parser.add_argument_group("budget")
    for unit, text in (
        ("neuron", "MLP neurons at full precision, in (0, 1], or one per sparse layer, separated by commas"),
        ("head", "attention heads at full precision, in (0, 1], or as above"),
    ):
        value = getattr(default, f"{unit}s", None)
        group.add_argument(
            f"--{unit}-budget",
            type=parse_fractions,
            default=value,
            metavar="FRACTION",
            help=f"{text} (default: {otherwise or value})",
        )
    return group


def add_budget(parser: argparse.ArgumentParser, otherwise: str = "the bundle's own", requested: bool = True) -> None:
    """Add all options of a budget. They are None unless given.

    Args:
        requested: whether the budget is for a request, and not the default of a bundle. Then it may ask for a proof.
    """
    group = add_fractions(parser, None, otherwise)
    rows = whole("--shortlist", 1, LARGEST)
    group.add_argument(
        "--shortlist",
        type=lambda text: "all" if text == "all" else rows(text),
        metavar="ROWS",
        help=f"rows of the output table at full precision, or all (default: {otherwise})",
    )
    group.add_argument(
        "--rest",
        choices=get_args(Rest),
        help="other neurons and heads: from a low-bit copy of the weights (shadow), or left out (drop)",
    )
    if requested:
        group.add_argument(
            "--certify",
            action="store_true",
            help="with a shortlist: prove that the largest logit is that of the whole table, by computing more rows at "
            "full precision where needed",
        )
    group.add_argument("--exact", action="store_true", help="everything at full precision: the dense model")


def budget(args: argparse.Namespace, default: Budget, ignored: Collection[str] = ()) -> Budget:
    """Return the budget from the options of `add_budget`; those not given come from ``default``.

    Args:
        ignored: fields that may be given beside --exact.

    Raises:
        UserError: --exact with another option of the budget.
    """
    given = _given(args)
    if args.exact and given.keys() - ignored:
        raise UserError("--exact stands with another option of the budget", "leave out one of them")
    return Budget() if args.exact else replace(default, **given)


def export_budget(args: argparse.Namespace) -> Budget | None:
    """Return the budget from the options of `add_budget`, or None if it is to be chosen for a target.

    Parts that are not given are everything. ``--rest`` alone is no budget: it decides whether the bundle has a low-bit
    copy.
    """
    return budget(args, Budget(), {"rest"}) if args.exact or _given(args).keys() - {"rest"} else None


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_budget` that were given, by the fields of `Budget`."""
    rows = {} if args.shortlist is None else {"shortlist": None if args.shortlist == "all" else args.shortlist}
    others = {"heads": args.head_budget, "neurons": args.neuron_budget, "rest": args.rest}
    others |= {"certify": True} if vars(args).get("certify") else {}
    return rows | {name: value for name, value in others.items() if value is not None}


def add_drafting(parser: argparse.ArgumentParser) -> None:
    """Add the options of lossless decoding."""
    group = parser.add_argument_group("lossless decoding")
    add_flags(group, Drafting)
    add_prepack(group)


def add_prepack(group: Group) -> None:
    """Add ``--prepack``."""
    group.add_argument(
        "--prepack",
        action="store_true",
        help="keep a packed copy of float weights for ONNX Runtime's dense steps: faster, and more memory",
    )


def add_target(parser: argparse.ArgumentParser) -> Group:
    """Add the options of the target for which budgets are chosen, and return their group, of which one may be given."""
    group = parser.add_argument_group("target").add_mutually_exclusive_group()
    add_flags(group, Target, parse={"ppl_increase": _share})
    return group


def refuse_unused(args: argparse.Namespace, unused: Mapping[str, object], when: str) -> None:
    """Refuse options that have no effect, given with their defaults.

    Raises:
        UserError: one has another value.
    """
    for option, default in unused.items():
        if getattr(args, option) != default:
            raise UserError(f"--{option.replace('_', '-')} does nothing {when}", "leave it out")


def target(args: argparse.Namespace) -> Target | None:
    """Return the target from the options of `add_target`, if any."""
    found = values(args, Target)
    return Target(**found) if found else None


def _share(text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise UserError(f"{text!r} is not a share", "write it as 2% or 0.02") from None


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the options of `Calibration`."""
    add_flags(parser.add_argument_group("calibration"), Calibration)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Add the options of training."""
    group = parser.add_argument_group("training")
    add_flags(group, Export, "selector")
    add_flags(group, TrainConfig, "rank", "epochs", "loss", "powerinfer")


def train_config(args: argparse.Namespace) -> TrainConfig:
    """Return the training options at the command's budget; others have their defaults."""
    given = {"heads": args.head_budget, "neurons": args.neuron_budget}
    given = {name: value for name, value in given.items() if value is not None}
    return build(args, TrainConfig, budget=replace(DEFAULT_BUDGET, **given))


def add_engines(parser: argparse.ArgumentParser) -> None:
    """Add the options of `EngineOptions`, except the flavour."""
    add_flags(
        parser.add_argument_group("engines"), EngineOptions, parse={"workspace_bytes": _workspace, "sms": _capability}
    )


def _capability(text: str) -> int:
    """Return a compute capability, written as 89 or 8.9."""
    return whole("--sm", 1, LARGEST)(re.sub(r"^([7-9]|1\d)\.(\d)$", r"\1\2", text))


def _workspace(text: str) -> int:
    pool, _, size = text.partition(":")
    unit = size[-1:].upper() if size[-1:].isalpha() else ""
    number = size[: len(size) - len(unit)]
    if pool != "workspace" or unit not in SIZES or not number.isdigit():
        raise UserError(f"--memPoolSize {text!r} is not understood", "write it as workspace:512M")
    return int(number) * SIZES[unit]
