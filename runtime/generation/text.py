"""Encodes prompts and decodes tokens with the tokenizer of a bundle."""

from __future__ import annotations

import re
from codecs import getincrementaldecoder
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

from shadowllm.bundle.manifest import Manifest, verify_files
from shadowllm.errors import UserError, foreign_reader
from shadowllm.models.files.tokenizer import encode, refusal, text_encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

# Names of the tokenizer files that transformers may read. Each must be in the manifest, with the right hash.
PREFIXES = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "additional_chat_templates/", "vocab")
UNFINISHED = "\ufffd"  # bytes that are not a complete character decode to this
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# The clean-up replaces at most " ' " and " n't", one after the other, so it changes at most the last 8 characters.
CLEANED_LATER = 8
PLAIN = "give the prompt without a chat template"


def load_tokenizer(bundle: Path, manifest: Manifest) -> PreTrainedTokenizerBase:
    """The bundle's tokenizer, a `PreTrainedTokenizerFast`.

    Raises:
        UserError: the bundle has none, or a file of it is damaged, not listed in the manifest, or too new.
    """
    from transformers import PreTrainedTokenizerFast

    if "tokenizer.json" not in manifest.files:
        raise UserError(f"{bundle} has no tokenizer", "export from a checkpoint that has tokenizer.json")
    found = {path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()}
    verify_files(bundle, manifest.digests(*(n for n in sorted(found | set(manifest.files)) if n.startswith(PREFIXES))))
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(bundle, local_files_only=True)
    except Exception as error:  # the parsers raise many types, for example if newer versions wrote the bundle
        raise refusal(bundle, None, error) from error
    if type(tokenizer.backend_tokenizer.model).__name__ == "BPE":
        # transformers ignores the clean-up option for BPE, and would warn at every start. Its version 5.0 follows it.
        forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True)
        tokenizer.clean_up_tokenization_spaces &= forced
    return tokenizer


def plain_encoder(tokenizer: PreTrainedTokenizerBase, manifest: Manifest | None = None) -> Callable[[str], list[int]]:
    """A function from text to token ids without special tokens; with a manifest it refuses tokens the model lacks."""
    return text_encoder(tokenizer, manifest.spec.vocab_size if manifest else None)


def encode_prompt(
    bundle: Path | str,
    manifest: Manifest,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    chat: bool = False,
    template: str | None = None,
) -> list[int]:
    """Token ids of a prompt, with the special tokens that the tokenizer adds.

    Args:
        bundle: the bundle, or the name of the model, for errors.
        chat: apply the model's chat template, with the text as a user's message.
        template: name of the chat template, if the model has several; None is the default template.

    Raises:
        UserError: the prompt is empty, is not Unicode, or has a token that the model lacks, the bundle has no such
            chat template, or the template fails.
    """
    if not text:
        raise UserError("the prompt is empty", "give some text")
    if chat:
        return encode_chat(bundle, manifest, tokenizer, [{"role": "user", "content": text}], template)
    _check_unicode(text, "the prompt", "write it in UTF-8")
    ids = encode(tokenizer, text, manifest.spec.vocab_size, special=True)
    if not ids:
        raise UserError(f"the prompt {text!r:.60} has no tokens", "give other text")
    return ids


def encode_chat(
    bundle: Path | str,
    manifest: Manifest,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    template: str | None = None,
) -> list[int]:
    """Token ids of messages in the model's chat template, up to where the answer begins.

    Args:
        bundle, template: as for `encode_prompt`.
        messages: each with the keys role and content.

    Raises:
        UserError: as `encode_prompt`.
    """
    for message in messages:
        _check_unicode(message["content"], "the prompt", "write it in UTF-8")
    text = _render(bundle, tokenizer, messages, template)
    source, remedy = f"what the chat template of {bundle} makes of the prompt", PLAIN
    _check_unicode(text, source, remedy)
    ids = encode(tokenizer, text, manifest.spec.vocab_size, special=False)
    if not ids:
        raise UserError(f"{source} has no tokens", remedy)
    return ids


def _check_unicode(text: str, source: str, remedy: str) -> None:
    """Refuse text with surrogate characters, which represent invalid UTF-8 bytes or halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{source} {text!r:.60} has bytes that are not UTF-8", remedy) from error


def _render(
    bundle: Path | str, tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], template: str | None
) -> str:
    """Messages in the model's chat template."""
    found = tokenizer.chat_template
    if not found:
        raise UserError(f"{bundle} has no chat template", PLAIN)
    names = sorted(found) if isinstance(found, dict) else ["default"]
    if (template or "default") not in names:
        problem = f"no chat template {template!r}" if template else "several chat templates and none is the default"
        raise UserError(f"{bundle} has {problem}", f"choose one of these chat templates: {', '.join(names)}")
    # A template is code from the checkpoint, so it may raise any error.
    with foreign_reader(f"the chat template of {bundle} does not render", PLAIN):
        rendered = tokenizer.apply_chat_template(
            list(messages),
            chat_template=template if isinstance(found, dict) else None,
            add_generation_prompt=True,
            tokenize=False,
        )
    return str(rendered)


def stopping_tokens(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> list[int]:
    """The special tokens whose text has a stop string in it. `TextStream` has no text of special tokens.

    Raises:
        UserError: a stop string is empty.
    """
    if "" in stops:
        raise UserError("a stop string is empty", "leave it out")
    found = tokenizer.added_tokens_decoder.items() if stops else ()  # made anew at each access
    return [index for index, token in found if token.special and any(stop in token.content for stop in stops)]


class TextStream:
    """Turns token ids into text, one token at a time.

    The joined pieces are the text after the prompt, as if prompt and tokens were decoded at once without special
    tokens. A character that begins in the prompt and ends after it is theirs. Text that a later token may change is
    kept back, for example an incomplete character.

    Args:
        tokenizer: a tokenizer of `transformers`, or the one of `tokenizers` inside it.
        prompt: token ids before the text; they decide whether the text starts with a space.
        stops: strings that end the text. It stops before the first complete one. The prompt is not searched.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | Tokenizer, prompt: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._backend = tokenizer, getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._later = CLEANED_LATER if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self._ids, self._seen = list(prompt), len(prompt)
        self._in_bytes = False
        # A character that begins in the prompt is given with the text. Its bytes alone are longer than it.
        self._given = len(self._text(end=len(prompt) - self._unfinished()))
        self._stops = StopText(stops)

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def push(self, token: int) -> str:
        """Add a token and return the text that is final now; it may be empty."""
        self._ids.append(token)
        text = self._text()
        in_bytes, unfinished = self._bytes_end_with(token), text.endswith(UNFINISHED)
        # After a stop string nothing follows that could change the text.
        if unfinished or (in_bytes and not self._stops.would_stop(text[self._given :])):
            return ""
        end = len(text) if in_bytes else max(self._given, len(text) - self._later)
        piece = text[self._given : end]
        if piece and self._later:
            self._given = end
        elif piece:
            # Keep only the tokens of this piece: earlier ones no longer influence the text.
            self._ids = self._ids[self._seen :]
            self._seen, self._given = len(self._ids), len(self._text())
        return self._stops.push(piece)

    def finish(self) -> str:
        """Return the text that was kept back; no token follows."""
        piece, self._given = self._text()[self._given :], len(self._text())
        return self._stops.push(piece) + self._stops.finish()

    def _text(self, end: int | None = None) -> str:
        return str(self._tokenizer.decode(self._ids[:end], skip_special_tokens=True))

    def _unfinished(self) -> int:
        """How many byte tokens at the end are the beginning of a character. It has at most four bytes."""
        last = [self._backend.id_to_token(token) or "" for token in reversed(self._ids[-3:])]
        found = [int(token[3:5], 16) for token in takewhile(BYTE_TOKEN.fullmatch, last)]
        decoder = getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(reversed(found)))
        return len(decoder.getstate()[0])

    def _bytes_end_with(self, token: int) -> bool:
        """Whether the text ends with byte tokens, which a following byte may make invalid."""
        if BYTE_TOKEN.fullmatch(self._backend.id_to_token(token) or ""):
            self._in_bytes = True
        elif self._in_bytes and self._backend.decode([token], skip_special_tokens=True):
            self._in_bytes = False
        return self._in_bytes


class StopText:
    """Returns text up to the first complete stop string, and keeps back text that may become one.

    Args:
        stops: strings that end the text.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self.stopped, self._held = tuple(stops), False, ""

    def push(self, piece: str) -> str:
        """Add text and return the part that is before any stop string; empty after a stop string."""
        if self.stopped:
            return ""
        self._held += piece
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found)[1])
        return self._release(len(self._held) - self._begun())

    def would_stop(self, piece: str) -> bool:
        """Whether a stop string is complete with this text."""
        return any(stop in self._held + piece for stop in self._stops)

    def finish(self) -> str:
        """Return the text that was kept back; no text follows."""
        return "" if self.stopped else self._release(len(self._held))

    def _begun(self) -> int:
        """How many of the last characters may be the beginning of a stop string."""
        return max((_overlap(self._held, stop) for stop in self._stops), default=0)

    def _release(self, end: int) -> str:
        """Remove the held characters up to ``end`` and return them."""
        piece, self._held = self._held[:end], self._held[end:]
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
