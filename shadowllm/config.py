"""Configurations: how to trace, train, export, build and tune.

The command line makes its flags from these classes: names, defaults, limits and help. Nothing heavy is imported. More
are in `draft_config`, `eval_config` and `serve_config`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shadowllm.config_fields import check_values, option
from shadowllm.errors import UserError
from shadowllm.limits import LARGEST_SEED, LONGEST_DRAFT, check_kind
from shadowllm.models.activations import NAMES
from shadowllm.models.sparsity import Budget, Rest, check_budget
from shadowllm.models.spec import HeadUnit

Flavour = Literal["tensorrt_rtx", "tensorrt"]
Verbosity = Literal["none", "layer_names_only", "detailed"]
Selector = Literal["shadow", "layerwise", "quantized-shadow", "relu", "static", "random"]

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # by their short names
CRITERIA = ("l2norm", "plainact", "grad_norm", "fisher", "snip", "grasp", "nwot", "jacov", "epenas")
LOSSES = ("listnet", "weighted_bce", "bce", "mse")
NETWORK_OPTIONS = ("loss", "epochs", "learning_rate", "weight_decay", "batch_tokens", "rank")  # of `TrainConfig`
DEFAULT_BUDGET = Budget(neurons=0.5, heads=0.75)
WIDEST = 1 << 16  # limit of a network's width: a wider one would only exhaust the memory


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        model: folder with safetensors, .gguf file, or name on the hub: owner/name, owner/name:Q4_K_M.
        cache_dir: where downloads are kept.
        trust_remote_code: let transformers run code from the checkpoint.
        activation: activation of the MLP, if the checkpoint does not say it (GGUF) or its own code decides it.
        activation_threshold: threshold of the activation fatrelu.
        adapter: folder with a LoRA adapter of the model, to merge into its weights (needs peft).

    Raises:
        UserError: the activation is unknown, or it is fatrelu and has no threshold, or the reverse.
    """

    model: str
    cache_dir: Path | None = option(None)
    trust_remote_code: bool = option(False)
    activation: str | None = option(
        None, values={name: name for name in NAMES}, otherwise="the config's, or the family's for a GGUF file"
    )
    activation_threshold: float | None = option(None, metavar="T", otherwise="the config's")
    adapter: Path | None = option(None, metavar="DIR")

    def __post_init__(self) -> None:
        check_values(self)
        if self.activation_threshold is not None and self.activation != "fatrelu":
            raise UserError("only fatrelu has an activation threshold", "give the activation fatrelu too")

    @property
    def name(self) -> str:
        """The name of the model: of its folder or file, or on the hub without the owner."""
        local = Path(self.model)
        return (local.resolve() if local.exists() else local).name


@dataclass(frozen=True)
class Calibration:
    """How a model is traced.

    Attributes:
        texts: text files or a Hugging Face dataset id; the built-in text if empty.
        tokens: number of tokens to trace.
        seqlen: tokens per window.
        criterion: importance score: l2norm, plainact, grad_norm, fisher, snip, grasp, nwot, jacov or epenas.
        dense_layers: number of leading layers that stay dense.
        seed: seed of sampling and training.

    Raises:
        UserError: a number is outside its limits, or the criterion is unknown.
    """

    texts: Sequence[str] = option(
        (),
        flag="--calibration-text",
        metavar="FILE",
        help="text files or a Hugging Face dataset id",
        otherwise="text that the model writes, and Python's documentation",
    )
    tokens: int = option(
        8192, flag="--calibration-tokens", metavar="N", least=1, called="the number of calibration tokens"
    )
    seqlen: int = option(
        128, flag="--calibration-seqlen", metavar="N", least=2, called="the length of a calibration window"
    )
    criterion: str = option("l2norm")
    dense_layers: int = option(1, metavar="N", least=1, called="the number of dense layers")
    seed: int = option(0, least=0, most=LARGEST_SEED, called="the seed")

    def __post_init__(self) -> None:
        check_values(self)
        if self.criterion not in CRITERIA:
            raise UserError(f"no importance criterion {self.criterion!r}", f"known: {', '.join(sorted(CRITERIA))}")


@dataclass(frozen=True)
class TrainConfig:
    """How to train a predictor.

    Attributes:
        budget: fractions at which recall is measured; bce and weighted_bce also learn which units they keep. The scores
            rank all units, so other budgets work too.
        loss: listnet, weighted_bce, bce or mse.
        epochs: passes over the text; None for 4 over stored traces, or 1 if every pass traces again, which
            costs more than the training itself.
        learning_rate: peak learning rate of AdamW; it falls to zero along a cosine.
        weight_decay: weight decay of AdamW on the output weights; it pulls towards the static ranking.
        batch_tokens: tokens per step.
        rank: width of a network; None for the largest with all networks under 4% of the model's parameters.
        seed: seed of initial weights and order.
        powerinfer: predictor that PowerInfer published for the model (folder of model_0.pt and so on, or .gguf), to use
            its networks as a layerwise predictor instead of training them.

    Raises:
        UserError: the loss is unknown, a number is outside its limits, or imported networks have training options.
    """

    budget: Budget = DEFAULT_BUDGET
    loss: str = option("listnet")
    epochs: int | None = option(
        None, least=1, help="passes over the text", otherwise="4, or 1 if each pass traces again"
    )
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    batch_tokens: int = option(128, least=1, called="the batch size")
    rank: int | None = option(
        None,
        least=1,
        most=WIDEST,
        help="width of a network",
        otherwise="the largest with all networks under 4% of the model's parameters",
    )
    seed: int = option(0, least=0, most=LARGEST_SEED, called="the seed")
    powerinfer: Path | None = option(
        None,
        metavar="PATH",
        help="use the networks of a published PowerInfer predictor (folder of model_0.pt and so on, or .gguf)",
    )

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"no training loss {self.loss!r}", f"known: {', '.join(sorted(LOSSES))}")
        check_values(self)
        check_budget(self.budget)
        if not 0 < self.learning_rate < math.inf or not 0 <= self.weight_decay < math.inf:
            raise UserError(
                "the learning rate must be positive, and weight decay not negative", "correct the training options"
            )
        if self.powerinfer and (names := self.network_options):
            raise UserError(f"networks of PowerInfer are not trained, so {names} cannot be used", f"leave out {names}")

    @property
    def network_options(self) -> str:
        """The names of the options of networks that are not the defaults, joined by "and"."""
        return " and ".join(name for name in NETWORK_OPTIONS if getattr(self, name) != getattr(TrainConfig, name))

    def passes(self, anew: bool) -> int:
        """Return the number of epochs, given whether each one traces the text again."""
        return self.epochs or (1 if anew else 4)


@dataclass(frozen=True)
class EngineOptions:
    """How to build engines. Flags that trtexec also has keep its names.

    Attributes:
        flavour: which TensorRT, "tensorrt_rtx" or "tensorrt".
        sms: compute capabilities, as 89 for 8.9; all that the flavour supports if empty.
        capacity: number of positions in the KV cache.
        max_seqlen: longest prompt of one call, in tokens; None is 512, or ``capacity`` if that is less.
        max_batch: largest number of sequences in a batch.
        max_draft: most tokens that a round of lossless decoding drafts; 0 builds engines without it.
        timing_cache: file with kernel timings, kept across builds (full TensorRT).
        workspace_bytes: scratch memory per layer, in bytes.
        verbosity: how much detail the engine keeps for an inspector.
        plugin_library: library of the C++ plugins (`make plugin`) to use instead of the Python ones.
        programmatic_dependent_launch: let the plugins' kernels start before the one in front has ended (from sm_90 on).

    Raises:
        UserError: a size is not positive, or the longest prompt does not fit into the cache.
    """

    flavour: Flavour
    sms: Sequence[int] = option(
        (), flag="--sm", metavar="SM", least=1, help="compute capabilities, as 89 or 8.9", otherwise="all supported"
    )
    capacity: int = option(1024, least=1)
    max_seqlen: int | None = option(
        None, metavar="N", least=1, help="longest prompt of one call, in tokens", otherwise="512, or the capacity"
    )
    max_batch: int = option(1, least=1)
    max_draft: int = option(0, least=0, most=LONGEST_DRAFT)
    timing_cache: Path | None = option(None, flag="--timingCacheFile", metavar="FILE")
    workspace_bytes: int | None = option(
        None, flag="--memPoolSize", metavar="workspace:SIZE", help="scratch memory, as workspace:512M"
    )
    verbosity: Verbosity = option("layer_names_only", flag="--profilingVerbosity")
    plugin_library: Path | None = option(None, metavar="FILE")
    programmatic_dependent_launch: bool = option(False)

    def __post_init__(self) -> None:
        check_values(self)
        if self.max_seqlen is not None and self.max_seqlen > self.capacity:
            raise UserError(
                f"prompts of {self.max_seqlen} tokens do not fit into a cache of {self.capacity}",
                "raise the capacity or lower the longest prompt",
            )

    @property
    def longest_prompt(self) -> int:
        """`max_seqlen` with its default."""
        return min(512, self.capacity) if self.max_seqlen is None else self.max_seqlen


@dataclass(frozen=True)
class Target:
    """A target for the budgets of a bundle. Exactly one of the two is given.

    Attributes:
        ppl_increase: largest increase in perplexity over dense, as a fraction of dense perplexity.
        speedup: smallest speedup of a decode step over ``dense.onnx``, both on ONNX Runtime.

    Raises:
        UserError: both or neither are given, or no budget can meet the value.
    """

    ppl_increase: float | None = option(
        None,
        flag="--target-ppl-increase",
        metavar="SHARE",
        help="choose budgets that raise perplexity by at most this, as 2% or 0.02",
    )
    speedup: float | None = option(
        None,
        flag="--target-speedup",
        metavar="FACTOR",
        help="choose budgets that decode at least this many times as fast as dense on this machine, as 1.2",
    )

    def __post_init__(self) -> None:
        check_values(self)
        if (self.ppl_increase is None) == (self.speedup is None):
            raise UserError("one target is needed", "give a perplexity increase or a speedup")
        if self.ppl_increase is not None and not 0 < self.ppl_increase < math.inf:
            raise UserError(
                f"the perplexity increase {self.ppl_increase!r} is no finite number above 0", "0.02 asks for 2%"
            )
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise UserError(f"the speedup {self.speedup!r} is no finite number above 1", "1.2 asks for 1.2 times")


DEFAULT_TARGET = Target(ppl_increase=0.05)


@dataclass(frozen=True)
class Export:
    """Options of an export.

    Attributes:
        selector: predictor to make if none is given; quantized-shadow needs no training, relu leaves out the neurons
            that a ReLU sets to zero, random is only for measuring speed. None is quantized-shadow, or shadow if the
            rest is dropped; with networks of PowerInfer, layerwise.
        budget: the default budget of the bundle. None chooses it: see ``target``.
        dtype: of weights and activations: "float32", "float16" or "bfloat16"; "fp32", "fp16" and "bf16" are the same.
        validate: compare the graphs with PyTorch.
        engines: engines to build, one entry per flavour.
        weight_dtype: store matrices as integers with one scale per 32 or 64 elements. Those of int6 contain the low-bit
            copy, and so do those of int8 if there is one. ONNX Runtime runs all. Triton and TensorRT engines
            need the copy.
        target: choose the default budget for this target after the bundle is written. None, without a budget, is a
            perplexity of 5% above dense if the rest is computed from a shadow, else `DEFAULT_BUDGET`.
        head_unit: unit of head selection: each query head, or all query heads of one KV head; budgets are rounded to
            whole units.
        rest: what units that are not active contribute: their value in a low-bit copy of the matrices, which is stored
            beside floats and inside integers ("shadow"), or nothing ("drop"). None is "shadow", or "drop" with int4
            weights, which are as short, and with the selector relu, where they are zero.

    Raises:
        UserError: a value is unknown or of another class, or a budget is given and a target too.
    """

    selector: Selector | None = option(
        None,
        help="predictor to make; quantized-shadow needs no training, relu is exact and for ReLU models, random is only "
        "for measuring speed",
        otherwise="quantized-shadow; shadow with --rest drop or int4, and for train; layerwise with --powerinfer",
    )
    budget: Budget | None = None
    dtype: str = option(
        "float32",
        values=DTYPES | {name: name for name in DTYPES.values()},
        otherwise="float32",
        help="dtype of weights and activations",
    )
    validate: bool = option(
        True,
        flag="--skip-validation",
        help="do not compare the graphs with PyTorch (the manifest records this)",
    )
    engines: Sequence[EngineOptions] = option(())
    weight_dtype: str | None = option(
        None, values={"int8": "int8", "int6": "int6", "int4": "int4"}, otherwise="as --dtype"
    )
    target: Target | None = None
    head_unit: HeadUnit = option("query_head")
    rest: Rest | None = None

    def __post_init__(self) -> None:
        check_values(self)
        if self.budget is not None:
            check_budget(self.budget)
        if self.target is not None:
            check_kind("the target", self.target, Target, "Target(ppl_increase=0.02)")
        for engine in self.engines:
            check_kind("an engine", engine, EngineOptions, "EngineOptions('tensorrt_rtx')")
        if self.budget is not None and self.target is not None:
            raise UserError("a budget is given, and a target that chooses one", "leave out one of them")

    @property
    def kind(self) -> Selector:
        """The predictor to make."""
        return self.selector or ("quantized-shadow" if self.computes_rest == "shadow" else "shadow")

    @property
    def computes_rest(self) -> Rest:
        """What units that are not active contribute in the bundle."""
        return self.rest or ("drop" if self.weight_dtype == "int4" or self.selector == "relu" else "shadow")
