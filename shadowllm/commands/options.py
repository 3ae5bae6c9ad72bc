"""Options that several commands share, and how they become the pipeline's own types."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowllm.errors import UserError
from shadowllm.limits import LARGEST, check_seed, check_threads, check_whole
from shadowllm.models.sparsity import Budget, parse_fractions

if TYPE_CHECKING:
    from shadowllm.evaluation.tuning import Target
    from shadowllm.pipeline import Calibration, EngineOptions, Source
    from shadowllm.plugins.tensorrt.flavour import Flavour
    from shadowllm.predictor.train import TrainConfig

Group = argparse._ActionsContainer  # a parser or a group of one
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
FLAVOURS = ("tensorrt_rtx", "tensorrt")
WIDEST = 1 << 16  # of a predictor's network: more would only exhaust the memory
SIZES = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_whole(group: Group, option: str, *, least: int = 1, most: int = LARGEST, **keywords: Any) -> None:
    """An option that takes a whole number from ``least`` to ``most``; the rest is as for ``add_argument``."""
    _add(group, option, lambda value: check_whole(option, value, least, most), keywords)


def add_seed(group: Group, help: str) -> None:
    """``--seed``, 0 unless given."""
    _add(group, "--seed", lambda value: check_seed(value, "--seed"), {"default": 0, "help": help})


def add_threads(group: Group, help: str) -> None:
    """``--threads``, None unless given."""
    _add(group, "--threads", lambda value: check_threads(value, "--threads"), {"help": help})


def _add(group: Group, option: str, check: Callable[[int], int], keywords: dict[str, Any]) -> None:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise UserError(f"{option} is {text!r}", "give a whole number") from None
        return check(value)

    group.add_argument(option, type=parse, **keywords)


def output_file(text: str) -> Path:
    """The argparse type of a file to write: what can be told beforehand is not found out after the work is done."""
    path = Path(text)
    if path.is_dir():
        raise UserError(f"{path} is a folder", "name a file")
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}", "name a file in a folder that exists")
    return path


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and how it is fetched."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder with safetensors, .gguf file, or name on the hub: owner/name, owner/name:Q4_K_M",
    )
    group = parser.add_argument_group("model")
    group.add_argument("--cache-dir", type=Path, help="where downloads are kept")
    group.add_argument("--trust-remote-code", action="store_true", help="let transformers run code from the checkpoint")


def source(args: argparse.Namespace) -> Source:
    """The model that `add_model` describes."""
    from shadowllm.pipeline import Source

    return Source(args.model, args.cache_dir, args.trust_remote_code)


def add_budget(parser: argparse.ArgumentParser, neurons: str | None = "0.5", heads: str | None = "0.75") -> None:
    """Fractions to keep."""
    group = parser.add_argument_group("budget")
    group.add_argument(
        "--neuron-budget",
        type=parse_fractions,
        default=neurons,
        metavar="FRACTION",
        help=f"MLP neurons to keep, in (0, 1], or one per sparse layer with commas{_default(neurons)}",
    )
    group.add_argument(
        "--head-budget",
        type=parse_fractions,
        default=heads,
        metavar="FRACTION",
        help=f"attention heads to keep, in (0, 1], or as above{_default(heads)}",
    )


def add_head_unit(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """What is chosen among heads; without a default, a bundle's own."""
    parser.add_argument(
        "--head-unit",
        choices=("query_head", "kv_group"),
        default=default,
        help="what is chosen among heads: each query head, or all that share a KV head together; budgets round to "
        f"whole ones{_default(default)}",
    )


def budget(args: argparse.Namespace) -> Budget:
    """The budget that `add_budget` describes."""
    return Budget(heads=args.head_budget, neurons=args.neuron_budget)


def add_target(parser: argparse.ArgumentParser) -> None:
    """What budgets are to be chosen for."""
    group = parser.add_argument_group("target").add_mutually_exclusive_group()
    group.add_argument(
        "--target-ppl-increase",
        type=_share,
        metavar="SHARE",
        help="choose budgets that raise perplexity by at most this, as 2%% or 0.02",
    )
    group.add_argument(
        "--target-speedup",
        type=float,
        metavar="FACTOR",
        help="choose budgets that decode at least this many times as fast as dense here, as 1.2",
    )


def target(args: argparse.Namespace) -> Target | None:
    """The target that `add_target` describes, if any."""
    from shadowllm.evaluation.tuning import Target

    if args.target_ppl_increase is None and args.target_speedup is None:
        return None
    return Target(args.target_ppl_increase, args.target_speedup)


def _share(text: str) -> float:
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise UserError(f"{text!r} is not a share", "write it as 2% or 0.02") from None


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Text to trace and how."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration-text",
        nargs="+",
        default=(),
        metavar="FILE",
        help="text files or a Hugging Face dataset id (default: text the model writes, and Python's documentation)",
    )
    add_whole(
        group,
        "--calibration-tokens",
        default=8192,
        metavar="N",
        help="tokens to trace (default: 8192)",
    )
    add_whole(
        group,
        "--calibration-seqlen",
        least=2,
        default=128,
        metavar="N",
        help="tokens of a window (default: 128)",
    )
    group.add_argument(
        "--criterion",
        default="l2norm",
        help="importance score: l2norm, plainact, grad_norm, fisher, snip, grasp, nwot, jacov or epenas "
        "(default: l2norm)",
    )
    add_whole(
        group,
        "--dense-layers",
        default=1,
        metavar="N",
        help="leading layers that stay dense (default: 1)",
    )
    add_seed(group, help="of sampling and training (default: 0)")


def calibration(args: argparse.Namespace) -> Calibration:
    """The calibration that `add_calibration` describes."""
    from shadowllm.pipeline import Calibration

    return Calibration(
        args.calibration_text,
        args.calibration_tokens,
        args.calibration_seqlen,
        args.criterion,
        args.dense_layers,
        args.seed,
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """How a network is trained."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--selector",
        choices=("shadow", "layerwise", "quantized-shadow", "static", "random"),
        default="shadow",
        help="predictor to train; quantized-shadow needs no training, random measures speed alone (default: shadow)",
    )
    add_whole(
        group,
        "--rank",
        most=WIDEST,
        help="width of a network (default: all of them under 4%% of the model's parameters)",
    )
    add_whole(group, "--epochs", help="passes over the text (default: 4, or 1 where it is traced anew)")
    group.add_argument("--loss", help="listnet, weighted_bce, bce or mse (default: listnet)")


def train_config(args: argparse.Namespace) -> TrainConfig:
    """The training that `add_training` describes, at the command's budget; the rest has its defaults."""
    from shadowllm.predictor.train import TrainConfig

    given = {name: getattr(args, name) for name in ("rank", "epochs", "loss") if getattr(args, name) is not None}
    return TrainConfig(budget=budget(args), seed=args.seed, **given)


def add_engines(parser: argparse.ArgumentParser) -> None:
    """How engines are built; names are those of trtexec."""
    group = parser.add_argument_group("engines")
    add_whole(
        group,
        "--sm",
        nargs="+",
        default=(),
        metavar="SM",
        help="compute capabilities, as 89 for 8.9 (default: all the flavour supports)",
    )
    add_whole(group, "--capacity", default=1024, help="positions of the KV cache (default: 1024)")
    add_whole(group, "--max-seqlen", default=512, help="longest prompt of one call (default: 512)")
    add_whole(group, "--max-batch", default=1, help="most sequences at once (default: 1)")
    group.add_argument("--timingCacheFile", type=Path, metavar="FILE", help="kept across builds (full TensorRT)")
    group.add_argument("--memPoolSize", metavar="workspace:SIZE", help="scratch memory, as workspace:512M")
    group.add_argument(
        "--profilingVerbosity", choices=("none", "layer_names_only", "detailed"), default="layer_names_only"
    )
    group.add_argument(
        "--plugin-library",
        type=Path,
        metavar="FILE",
        help="build with the C++ plugins (`make plugin`), not the Python ones",
    )


def engines(args: argparse.Namespace, flavour: Flavour) -> EngineOptions:
    """The engine options that `add_engines` describes."""
    from shadowllm.pipeline import EngineOptions

    return EngineOptions(
        flavour,
        args.sm,
        args.capacity,
        args.max_seqlen,
        args.max_batch,
        args.timingCacheFile,
        _workspace(args.memPoolSize),
        args.profilingVerbosity,
        args.plugin_library,
    )


def _workspace(text: str | None) -> int | None:
    if text is None:
        return None
    pool, _, size = text.partition(":")
    unit = size[-1:].upper() if size[-1:].isalpha() else ""
    number = size[: len(size) - len(unit)]
    if pool != "workspace" or unit not in SIZES or not number.isdigit():
        raise UserError(f"--memPoolSize {text!r} is not understood", "write it as workspace:512M")
    return int(number) * SIZES[unit]


def _default(value: str | None) -> str:
    return f" (default: {value})" if value else " (default: the bundle's own)"
