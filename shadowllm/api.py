"""The library in four functions, which ``import shadowllm`` provides. The command line offers these and more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Literal, Unpack, overload

from shadowllm.limits import check_kind, check_path, check_switch
from shadowllm.models.sparsity import Budget

if TYPE_CHECKING:
    from shadowllm.bundle.manifest import Manifest
    from shadowllm.bundle.predictor_file import Predictor
    from shadowllm.config import Calibration, EngineOptions, Selector, Target, TrainConfig
    from shadowllm.eval_config import Aggregate
    from shadowllm.evaluation.quality import Result
    from shadowllm.models.sparsity import Fractions, Rest
    from shadowllm.models.spec import HeadUnit
    from shadowllm.runtime.generation.completion import GenerateOptions
    from shadowllm.runtime.model import Model
    from shadowllm.runtime.session import Prefill

__all__ = ["Budget", "evaluate", "export", "generate", "load"]

StrPath = str | PathLike[str]
Ids = Sequence[int]


def export(
    model: StrPath,
    out: StrPath,
    *,
    budget: Budget | None = None,
    target: Target | None = None,
    selector: Selector | None = None,
    predictor: StrPath | Predictor | None = None,
    dtype: str = "float32",
    weight_dtype: str | None = None,
    head_unit: HeadUnit = "query_head",
    rest: Rest | None = None,
    engines: Sequence[EngineOptions] = (),
    validate: bool = True,
    calibration: Calibration | None = None,
    training: TrainConfig | None = None,
    cache_dir: StrPath | None = None,
    trust_remote_code: bool = False,
    activation: str | None = None,
    activation_threshold: float | None = None,
    adapter: StrPath | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Make a bundle of a model, as ``shadowllm export`` does.

    Args:
        model: folder with safetensors, .gguf file, or name on the Hugging Face hub.
        out: folder to make; it appears only when everything is done.
        budget: the default budget of the bundle; None chooses it for ``target``, so only one of the two is given.
        target, selector, dtype, weight_dtype, head_unit, rest, engines, validate: as in `shadowllm.config.Export`.
        predictor: a predictor or its file, to use instead of training one.
        calibration, training: how to trace the model and train the predictor; defaults when None.
        cache_dir, trust_remote_code, activation, activation_threshold, adapter: as in `shadowllm.config.Source`.
        overwrite: replace ``out`` if it is a bundle.

    Returns:
        The manifest of the bundle.

    Raises:
        UserError: an input cannot be used, or the bundle fails its validation.
    """
    from shadowllm.bundle.predictor_file import Predictor
    from shadowllm.config import Calibration, Export, Source, TrainConfig
    from shadowllm.pipeline import export_model

    plan = Export(
        selector=selector,
        budget=budget,
        dtype=dtype,
        validate=validate,
        engines=engines,
        weight_dtype=weight_dtype,
        target=target,
        head_unit=head_unit,
        rest=rest,
    )
    if calibration is not None:
        check_kind("the calibration", calibration, Calibration, "Calibration(tokens=4096)")
    if training is not None:
        check_kind("the training", training, TrainConfig, "TrainConfig(epochs=2)")
    if predictor is not None and not isinstance(predictor, Predictor):
        predictor = Predictor.load(check_path("the predictor", predictor))
    return export_model(
        Source(
            str(model),
            None if cache_dir is None else check_path("the cache", cache_dir),
            trust_remote_code,
            activation,
            activation_threshold,
            None if adapter is None else check_path("the adapter", adapter),
        ),
        check_path("the output", out),
        plan,
        predictor=predictor,
        calibration=calibration,
        train_config=training,
        overwrite=check_switch("overwrite", overwrite),
    )


def load(
    bundle: StrPath,
    backend: str = "ort",
    *,
    threads: int | None = None,
    budget: Budget | None = None,
    prefill: Prefill = "dense",
    prepack: bool = False,
) -> Model:
    """Open a bundle for `generate` on one backend. Use the result in a ``with`` statement.

    Args:
        bundle: folder that an export made.
        backend: one of `shadowllm.runtime.BACKENDS`; a ``-dense`` one runs the plain model.
        threads: threads of each operator, for backends that compute on the CPU.
        budget: fractions to keep; the bundle's own when None. `Model.set_budget` changes it at any time.
        prefill: which graphs prefill in the backend ``ort``. "sparse" needs less memory for integer
            weights, whose prompts then take longer.
        prepack: keep a packed copy of float weights, with which ONNX Runtime's dense steps are faster. It is of use for
            ``generate(..., lossless=True)``.

    Raises:
        UserError: there is no bundle, it is damaged, or the backend is unknown, cannot run here or does not have
            ``prefill``.
    """
    from shadowllm.runtime.model import Model

    return Model(bundle, backend, threads=threads, budget=budget, prefill=prefill, prepack=prepack)


@overload
def generate(
    model: Model,
    prompt: str,
    max_new_tokens: int = 64,
    *,
    stream: Literal[False] = False,
    **options: Unpack[GenerateOptions],
) -> str: ...
@overload
def generate(
    model: Model,
    prompt: Ids,
    max_new_tokens: int = 64,
    *,
    stream: Literal[False] = False,
    **options: Unpack[GenerateOptions],
) -> list[int]: ...
@overload
def generate(
    model: Model, prompt: str, max_new_tokens: int = 64, *, stream: Literal[True], **options: Unpack[GenerateOptions]
) -> Iterator[str]: ...
@overload
def generate(
    model: Model, prompt: Ids, max_new_tokens: int = 64, *, stream: Literal[True], **options: Unpack[GenerateOptions]
) -> Iterator[int]: ...
def generate(
    model: Model,
    prompt: str | Ids,
    max_new_tokens: int = 64,
    *,
    stream: bool = False,
    **options: Unpack[GenerateOptions],
) -> str | list[int] | Iterator[str] | Iterator[int]:
    """Continue a prompt, as ``shadowllm run`` does. Decoding is greedy unless a temperature is given.

    Args:
        model: from `load`, inside its ``with`` statement. It writes one text at a time: a stream that goes on after
            another generation began raises an error.
        prompt: text, or token ids, which are used unchanged.
        max_new_tokens: largest number of tokens to generate.
        stream: return an iterator over pieces of text, or over token ids, as they are generated.
        options: `GenerateOptions`: ``lossless`` (the dense model's own text, drafted at the model's budget),
            ``draft_length``, ``chat``, ``chat_template``, ``stop``, ``temperature``, ``top_k``, ``top_p``,
            ``min_p``, ``repetition_penalty``, ``no_repeat_ngram_size`` and ``seed``. Options not given come from the
            model's generation config, except temperature and seed. Without a seed it is 0, so a sampled text is the
            same each time.

    Returns:
        Text for a text prompt, without the prompt. Token ids for token ids, including those of a stop string.

    Raises:
        UserError: the model is not open, a prompt or an option cannot be used, or logits are not finite.
    """
    from shadowllm.runtime.generation.completion import Completion

    session = model.session
    completion = Completion(model.request([prompt], max_new_tokens, **options))
    pieces = completion.grow(session)
    if check_switch("stream", stream):
        return _texts(pieces) if isinstance(prompt, str) else _ids(pieces, completion.tokens[0])
    for _ in pieces:
        pass
    return completion.texts[0] if isinstance(prompt, str) else completion.tokens[0]


def evaluate(
    bundle: StrPath,
    texts: Sequence[str] = (),
    *,
    tokens: int = 2048,
    seqlen: int = 512,
    selectors: Sequence[str] = (),
    neurons: Sequence[Fractions] = (),
    heads: Sequence[Fractions] = (),
    rest: Sequence[Rest] = (),
    shortlist: Sequence[int] = (),
    certify: bool = False,
    head_unit: HeadUnit | None = None,
    aggregate: Aggregate = "token",
) -> Sequence[Result]:
    """Measure perplexity and agreement with the dense model over selectors and budgets, as ``shadowllm eval``.

    Args:
        texts: files or a Hugging Face dataset id; the documentation of Python modules when empty.
        tokens, seqlen, selectors, neurons, heads, rest, shortlist, certify, head_unit, aggregate: as in
            `shadowllm.eval_config.Evaluation`.

    Returns:
        The result of the dense model, then of each selector at each budget.

    Raises:
        UserError: there is no bundle, it is damaged, or a text, selector or budget cannot be used.
    """
    from shadowllm.eval_config import Evaluation
    from shadowllm.evaluation.sweep import evaluate_text

    options = Evaluation(
        texts=texts,
        tokens=tokens,
        seqlen=seqlen,
        selectors=selectors,
        neurons=neurons,
        heads=heads,
        rest=rest,
        shortlist=shortlist,
        certify=certify,
        head_unit=head_unit,
        aggregate=aggregate,
    )
    return evaluate_text(check_path("the bundle", bundle), options).results


def _texts(pieces: Iterator[list[str]]) -> Iterator[str]:
    return (piece for (piece,) in pieces if piece)


def _ids(pieces: Iterator[list[str]], tokens: list[int]) -> Iterator[int]:
    """Yield each token after it is appended to ``tokens``."""
    given = 0
    for _ in pieces:
        yield from tokens[given:]
        given = len(tokens)
