"""From prompts to texts: the request, which is the same for every backend, and the growing texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from shadowllm.bundle.manifest import Manifest
from shadowllm.draft_config import Drafting
from shadowllm.errors import UserError
from shadowllm.limits import check_switch, check_whole
from shadowllm.runtime.generation.draft_length import DraftRecord, draft_length_of
from shadowllm.runtime.generation.generate import generate
from shadowllm.runtime.generation.sampling import Sampling, bundle_sampling
from shadowllm.runtime.generation.text import TextStream, encode_prompt, stopping_tokens
from shadowllm.runtime.inputs import check_prompt
from shadowllm.runtime.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GenerateOptions(TypedDict, total=False):
    """Options of generation; None uses the model's generation config, or the default if the config has no value.

    Attributes:
        chat: apply the model's chat template to each text.
        chat_template: apply the chat template with this name, if the model has several.
        stop: a string, or several; the text ends before the first of them.
        lossless, draft_length: as in `Drafting`.
        temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram_size, seed: as in `Sampling`.
            Temperature and seed never come from the config. Without a temperature, decoding is greedy.
    """

    chat: bool
    chat_template: str | None
    stop: str | Sequence[str] | None
    lossless: bool
    draft_length: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    seed: int | None


@dataclass(frozen=True)
class Request:
    """A generation request, which is the same for every backend.

    Attributes:
        prompts: token ids of each sequence.
        max_new_tokens: most new tokens of each sequence.
        stop_ids: tokens that end a text.
        stops: strings that end a text.
        drafting: whether the text is that of the dense model, and how it is drafted.
        tokenizer: None if all prompts are token ids and there are no stop strings. Then no text is made.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    sampling: Sampling
    stop_ids: Sequence[int]
    stops: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None
    drafting: Drafting = field(default_factory=Drafting)


def make_request(
    bundle: Path,
    manifest: Manifest,
    load: Callable[[], PreTrainedTokenizerBase],
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    config: Mapping[str, Any] | None = None,
    **options: Unpack[GenerateOptions],
) -> Request:
    """Make the request for a bundle.

    Args:
        load: returns the bundle's tokenizer; called only if a prompt or a stop string needs it.
        prompts: texts or token ids.
        config: contents of the generation config; None reads the bundle's file.

    Raises:
        UserError: a value out of range, a prompt that cannot be used, an unknown chat template, or no tokenizer.
    """
    check_whole("the number of new tokens", max_new_tokens)
    chat, template = _switch(options.pop("chat", None), "chat"), options.pop("chat_template", None)
    if (chat or template is not None) and not all(isinstance(prompt, str) for prompt in prompts):
        raise UserError("a chat template is for texts, and a prompt is token ids", "leave chat and chat_template out")
    stop = options.pop("stop", None)
    stop = (stop,) if isinstance(stop, str) else stop
    if stop is not None and not (isinstance(stop, Sequence) and all(isinstance(text, str) for text in stop)):
        raise UserError(f"stop is {stop!r:.60}, which is no text", "give a string, or a list of strings")
    lossless = _switch(options.pop("lossless", None), "lossless")
    drafting = Drafting(lossless, options.pop("draft_length", None), manifest.tuned_drafts)
    sampling, stops = bundle_sampling(bundle, manifest, stop, config, **options)
    tokenizer = load() if stops or any(isinstance(prompt, str) for prompt in prompts) else None

    def encoded(prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return check_prompt(prompt)
        assert tokenizer is not None
        return encode_prompt(bundle, manifest, tokenizer, prompt, chat or template is not None, template)

    ids = [encoded(prompt) for prompt in prompts]
    stop_ids = manifest.spec.eos_token_ids
    if tokenizer is not None:
        stop_ids = (*stop_ids, *stopping_tokens(tokenizer, stops))
    return Request(ids, max_new_tokens, sampling, stop_ids, stops, tokenizer, drafting)


def _switch(value: bool | None, name: str) -> bool:
    return False if value is None else check_switch(name, value)


class Completion:
    """The growing text of each sequence.

    Attributes:
        texts: the new text of each sequence so far; empty if the request has no tokenizer.
        tokens: the new token ids of each sequence, those of a stop string included.
        drafts: what the drafts of a lossless request gave so far; None for other requests.
    """

    def __init__(self, request: Request) -> None:
        self._request, tokenizer = request, request.tokenizer
        self._streams = (
            [TextStream(tokenizer, ids, request.stops) for ids in request.prompts] if tokenizer is not None else []
        )
        # The parts of each text that belong to tokens that `generate` has not yielded yet.
        self._pieces: list[deque[str]] = [deque() for _ in self._streams]
        self.texts = [""] * len(request.prompts)
        self.tokens: list[list[int]] = [[] for _ in request.prompts]
        self._draft_length = draft_length_of(request.drafting)
        self.drafts: DraftRecord | None = self._draft_length.record if self._draft_length else None

    def grow(self, session: Session) -> Iterator[list[str]]:
        """Generate the texts; call this only once.

        Yields:
            The new final part of each text, after each step and once at the end; it may be empty.

        Raises:
            UserError: as `generate`.
        """
        asked, stops_at = self._request, self._push if self._streams else None
        options = asked.max_new_tokens, asked.sampling, asked.stop_ids, stops_at, self._draft_length
        for step in generate(session, asked.prompts, *options):
            pieces = [""] * len(self.texts)
            for row, token in enumerate(step):
                if token is not None:
                    self.tokens[row].append(token)
                    pieces[row] = self._pieces[row].popleft() if self._streams else ""
            yield self._add(pieces)
        if self._streams:
            yield self._add([stream.finish() for stream in self._streams])

    def _push(self, row: int, token: int) -> bool:
        """Add a token to a text. Returns whether the text has reached a stop string."""
        stream = self._streams[row]
        self._pieces[row].append(stream.push(token))
        return stream.stopped

    def _add(self, pieces: list[str]) -> list[str]:
        self.texts = [text + piece for text, piece in zip(self.texts, pieces, strict=True)]
        return pieces
