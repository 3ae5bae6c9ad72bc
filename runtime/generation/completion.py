"""Prompts to texts: what is asked of every backend alike, and the texts as they grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from shadowllm.bundle.manifest import Manifest
from shadowllm.limits import check_whole
from shadowllm.runtime.generation.generate import generate
from shadowllm.runtime.generation.sampling import Sampling, bundle_sampling
from shadowllm.runtime.generation.text import TextStream, encode_prompt, stop_criteria
from shadowllm.runtime.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, StopStringCriteria


class GenerateOptions(TypedDict, total=False):
    """How to generate; None stands for what the model's generation config says, or changes nothing.

    Attributes:
        chat: put each text through the model's chat template.
        chat_template: the same by name, where the model has several.
        stop: the text ends before this string, or before any of these.
        temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram_size, seed: as in `Sampling`. Greedy
            unless a temperature is given.
    """

    chat: bool
    chat_template: str | None
    stop: str | Sequence[str] | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    seed: int | None


@dataclass(frozen=True)
class Request:
    """What is asked of every backend alike.

    Attributes:
        prompts: token ids of each sequence.
        max_new_tokens: most tokens of each.
        stop_ids: tokens that end a text.
        stops: strings that end a text.
        stopping: tells when one has come.
        tokenizer: None where all prompts are token ids and no string ends them: there is no text then.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling
    stop_ids: Sequence[int]
    stops: tuple[str, ...] = ()
    stopping: StopStringCriteria | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


def make_request(
    bundle: Path,
    manifest: Manifest,
    load: Callable[[], PreTrainedTokenizerBase],
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    **options: Unpack[GenerateOptions],
) -> Request:
    """What to generate with a bundle.

    Args:
        load: gives the bundle's tokenizer; called only where there is text.
        prompts: texts or token ids.

    Raises:
        UserError: a value out of range, a prompt that cannot be used, no such chat template, or no tokenizer.
    """
    check_whole("the number of new tokens", max_new_tokens)
    chat, template = bool(options.pop("chat", False)), options.pop("chat_template", None)
    stop = options.pop("stop", None)
    sampling, stops = bundle_sampling(bundle, manifest, (stop,) if isinstance(stop, str) else stop, **options)
    tokenizer = load() if stops or any(isinstance(prompt, str) for prompt in prompts) else None

    def encoded(prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        assert tokenizer is not None
        return encode_prompt(bundle, manifest, tokenizer, prompt, chat or template is not None, template)

    ids = [encoded(prompt) for prompt in prompts]
    stopping = None if tokenizer is None else stop_criteria(tokenizer, stops)
    return Request(ids, max_new_tokens, sampling, manifest.spec.eos_token_ids, stops, stopping, tokenizer)


class Completion:
    """The text of each sequence as it grows.

    Attributes:
        texts: what each sequence says so far; empty where the request has no tokenizer.
        tokens: its token ids, those of a stop string included.
    """

    def __init__(self, request: Request) -> None:
        self._request, tokenizer = request, request.tokenizer
        self._streams = (
            [TextStream(tokenizer, ids, request.stops) for ids in request.prompts] if tokenizer is not None else []
        )
        self.texts = [""] * len(request.prompts)
        self.tokens: list[list[int]] = [[] for _ in request.prompts]

    def grow(self, session: Session) -> Iterator[list[str]]:
        """Generate; to be called once.

        Yields:
            What became certain of each text, after each step and once more at the end; may be empty.

        Raises:
            UserError: as `generate`.
        """
        asked = self._request
        for step in generate(
            session, asked.prompts, asked.max_new_tokens, asked.sampling, asked.stop_ids, asked.stopping
        ):
            pieces = [""] * len(self.texts)
            for row, token in enumerate(step):
                if token is not None:
                    self.tokens[row].append(token)
                    pieces[row] = self._streams[row].push(token) if self._streams else ""
            yield self._add(pieces)
        if self._streams:
            yield self._add([stream.finish() for stream in self._streams])

    def _add(self, pieces: list[str]) -> list[str]:
        self.texts = [text + piece for text, piece in zip(self.texts, pieces, strict=True)]
        return pieces
