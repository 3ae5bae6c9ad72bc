"""How the next token is chosen from the logits: the user's options, and the model's generation config."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowllm.bundle.manifest import Manifest, verify_files
from shadowllm.config_fields import option
from shadowllm.errors import UserError, in_one_line
from shadowllm.json_types import check_type
from shadowllm.limits import check_seed

if TYPE_CHECKING:
    from transformers import LogitsProcessorList

LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 1e-30, 1e30  # logits up to 1e8 divided by the least stay finite in float32
CONFIG = "generation_config.json"
REMEDY = "mend that file of the model, and export again"
# Fields of the generation config that are used always, and those that are used only with a temperature.
ALWAYS = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
SAMPLED = ("top_k", "top_p", "min_p")
SUPPRESSED = {"suppress_tokens", "begin_suppress_tokens"}
# Fields that would change the text but are not supported here, each with the value that has no effect.
UNUSED = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0,
    "guidance_scale": 1,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_time": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "token_healing": False,
    "watermarking_config": None,
}
UNUSED_SAMPLED = {"typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": None}


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits, with the names and meanings of `transformers`.

    Attributes:
        temperature: 0 takes the most probable token (greedy); above 0 samples.
        top_k: keep only the k most probable tokens; 0 keeps all. Like top_p and min_p, it has no effect when greedy.
        top_p: keep the fewest most probable tokens whose probabilities reach this sum (nucleus
            sampling, Holtzman et al., arXiv 1904.09751); 0 keeps one, 1 keeps all.
        seed: seed of the random numbers.
        min_p: keep tokens whose probability is at least this fraction of the highest one; 0 keeps all.
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that are already in
            prompt or text (Keskar et al., arXiv 1909.05858); 1 changes nothing.
        no_repeat_ngram_size: no sequence of N tokens occurs twice; 0 allows all.
        bad_words_ids: sequences of tokens that are never generated.
        suppress_tokens, begin_suppress_tokens: tokens that are never generated, or not as the first new token.

    Raises:
        UserError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = option(0, metavar="N")
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature <= LARGEST_TEMPERATURE:
            raise UserError(
                f"temperature {self.temperature} cannot be used",
                f"0 is greedy, 1 samples as trained, others are from {LEAST_TEMPERATURE} to {LARGEST_TEMPERATURE}",
            )
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k} is negative", "0 keeps all tokens")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top-p {self.top_p} is not in [0, 1]", "0 keeps one token, 1 keeps all")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min-p {self.min_p} is not in [0, 1]", "0 keeps all tokens")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition penalty {self.repetition_penalty} is not above 0", "1 changes nothing")
        if self.no_repeat_ngram_size < 0:
            raise UserError(f"no-repeat n-gram size {self.no_repeat_ngram_size} is negative", "0 allows all")
        check_seed(self.seed)

    def processors(self, prompt_len: int, stop_ids: Sequence[int] = ()) -> LogitsProcessorList:
        """The logits processors of `transformers` for these values, in its order; empty if none is needed.

        Args:
            prompt_len: number of tokens in the sequence's prompt.
            stop_ids: tokens that end a sequence; bad words that consist of one of them are ignored.
        """
        import transformers as t

        found = t.LogitsProcessorList()
        if self.repetition_penalty != 1:
            found.append(t.RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.no_repeat_ngram_size:
            found.append(t.NoRepeatNGramLogitsProcessor(self.no_repeat_ngram_size))
        if words := [list(word) for word in self.bad_words_ids if tuple(word) not in {(stop,) for stop in stop_ids}]:
            found.append(t.NoBadWordsLogitsProcessor(words))
        if self.suppress_tokens:
            found.append(t.SuppressTokensLogitsProcessor(list(self.suppress_tokens)))
        if self.begin_suppress_tokens:
            found.append(t.SuppressTokensAtBeginLogitsProcessor(list(self.begin_suppress_tokens), prompt_len))
        if self.temperature:
            found.extend(self._warpers())
        return found

    def _warpers(self) -> LogitsProcessorList:
        import transformers as t

        found = t.LogitsProcessorList()
        if self.temperature != 1:
            found.append(t.TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            found.append(t.TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            found.append(t.TopPLogitsWarper(self.top_p))
        if self.min_p:
            found.append(t.MinPLogitsWarper(self.min_p))
        return found


def bundle_sampling(
    bundle: Path,
    manifest: Manifest,
    stops: Sequence[str] | None = None,
    config: Mapping[str, Any] | None = None,
    **given: Any,
) -> tuple[Sampling, tuple[str, ...]]:
    """The sampling options for a bundle, and the stop strings.

    Args:
        stops: stop strings; None uses those of the model's generation config.
        config: contents of the generation config; None reads the bundle's file.
        given: values of `Sampling`; None uses the generation config. Decoding is greedy unless a temperature is
            given, and only then the config's options for sampling are used.

    Raises:
        UserError: a value out of range, given or in the generation config, or a damaged config.
    """
    path, config = bundle / CONFIG, generation_config(bundle, manifest) if config is None else config
    given = _plain({name: value for name, value in given.items() if value is not None})
    sampled = bool(given.get("temperature"))
    unused = UNUSED | (UNUSED_SAMPLED if sampled else {})
    ignored = [name for name, neutral in unused.items() if config.get(name) not in (None, False, neutral)]
    if ignored:
        warnings.warn(f"{path} asks for what is not done here: {', '.join(ignored)}", stacklevel=2)
    _check_given(given, manifest.spec.vocab_size)
    return _read(path, config, manifest.spec.vocab_size, REMEDY, stops, given)


def check_generation_config(path: Path, config: Mapping[str, Any], vocab_size: int) -> None:
    """Refuse a model's generation config with which no text of its bundle could be generated.

    Options of sampling are not checked: greedy decoding, the default, does not use them.

    Args:
        path: the file of the model that holds it.
        config: its contents.

    Raises:
        UserError: a value cannot be used.
    """
    _read(path, config, vocab_size, "mend that file")


def _read(
    path: Path,
    config: Mapping[str, Any],
    vocab_size: int,
    remedy: str,
    stops: Sequence[str] | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Sampling, tuple[str, ...]]:
    """The sampling options and stop strings: those that are given, and the config's."""
    wanted = (*ALWAYS, *(SAMPLED if given.get("temperature") else ()))
    own = {name: config[name] for name in wanted if config.get(name) is not None and name not in given}
    try:
        check_type(own, Sampling, "it")
        for name in SUPPRESSED & own.keys():
            own[name] = [token for token in own[name] if token >= 0]  # no token has such an id: -1 stands for none
        sampling = Sampling(**({name: _frozen(value) for name, value in own.items()} | dict(given)))
        _check_tokens(sampling, vocab_size)
        sampling.processors(prompt_len=1)  # transformers itself refuses some values
        return sampling, _stop_strings(config) if stops is None else tuple(stops)
    except (ValueError, UserError) as error:
        cause = error.problem if isinstance(error, UserError) else in_one_line(error)
        raise UserError(f"{path} has a value that cannot be used ({cause})", remedy) from error


def _check_given(given: Mapping[str, Any], vocab_size: int) -> None:
    """Refuse the caller's wrong values, so that later errors are about the config."""
    try:
        sampling = Sampling(**given)
        _check_tokens(sampling, vocab_size)
        sampling.processors(prompt_len=1)
    except ValueError as error:
        raise UserError(f"the options cannot be used ({in_one_line(error)})", "see the fields of Sampling") from error


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    """Options with numbers of Python in place of NumPy's.

    Raises:
        UserError: an unknown option, or a value of another type.
    """
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in options.items()}
    try:
        # `Sampling` itself refuses infinity and NaN.
        finite = {n: v for n, v in plain.items() if not isinstance(v, float) or math.isfinite(v)}
        check_type(finite, Sampling, "options")
    except ValueError as error:
        raise UserError(str(error), "see the fields of Sampling, or of GenerateOptions") from error
    return plain


def _stop_strings(config: Mapping[str, Any]) -> tuple[str, ...]:
    found = config.get("stop_strings") or ()
    check_type(found, str | tuple[str, ...], "stop_strings")
    stops = (found,) if isinstance(found, str) else tuple(found)
    if "" in stops:
        raise ValueError("a stop string is empty")
    return stops


def generation_config(bundle: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the contents of a bundle's generation_config.json; empty if it has none.

    Raises:
        UserError: the file is damaged.
    """
    if CONFIG not in manifest.files:
        return {}
    verify_files(bundle, manifest.digests(CONFIG))
    try:
        config = json.loads((bundle / CONFIG).read_text(encoding="utf-8"))
        check_type(config, dict[str, Any], "it")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{bundle / CONFIG} is damaged ({in_one_line(error)})", REMEDY) from error
    return dict(config)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _check_tokens(sampling: Sampling, vocab_size: int) -> None:
    """Refuse token ids that the model lacks."""
    words: Iterable[Sequence[int]] = (sampling.suppress_tokens, sampling.begin_suppress_tokens, *sampling.bad_words_ids)
    for token in (token for word in words for token in word):
        if not 0 <= token < vocab_size:
            raise ValueError(f"it suppresses the token {token}, and the model has {vocab_size}")
