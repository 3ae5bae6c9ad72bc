"""Text in and out of a bundle, with the tokenizer that lies in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shadowllm.bundle.manifest import Manifest, verify_files
from shadowllm.errors import UserError, foreign_reader
from shadowllm.models.files.tokenizer import encode, refusal, text_encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, StopStringCriteria

# What transformers may read of a tokenizer: each is checked, and none is read that the manifest does not list.
PREFIXES = ("tokenizer", "special_tokens_map", "added_tokens", "chat_template", "additional_chat_templates/", "vocab")
UNFINISHED = "\ufffd"  # what bytes that are no character decode to
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Cleaning up replaces at most " ' " and " n't", one after the other: what it does reaches no further back than this.
CLEANED_LATER = 8


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
    except Exception as error:  # of other people's parsers, as where newer versions wrote the bundle
        raise refusal(bundle, None, error) from error
    if type(tokenizer.backend_tokenizer.model).__name__ == "BPE":
        # transformers ignores it there, and would say so at every start.
        forced = tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
        tokenizer.clean_up_tokenization_spaces &= forced
    return tokenizer


def plain_encoder(tokenizer: PreTrainedTokenizerBase, manifest: Manifest | None = None) -> Callable[[str], list[int]]:
    """Text to token ids without special tokens; with a manifest, a token without a row in its model is refused."""
    return text_encoder(tokenizer, manifest.spec.vocab_size if manifest else None)


def encode_prompt(
    bundle: Path,
    manifest: Manifest,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    chat: bool = False,
    template: str | None = None,
) -> list[int]:
    """Token ids of a prompt, with the special tokens the tokenizer adds by itself.

    Args:
        chat: put the text through the model's chat template as a user's message.
        template: name of the chat template, where the model has several; its default one when None.

    Raises:
        UserError: the prompt is empty, is not Unicode, or has a token that the model has no row for, or the bundle
            has no such chat template, or the template fails.
    """
    if not text:
        raise UserError("the prompt is empty", "give some text")
    _check_unicode(text, "the prompt", "write it in UTF-8, or give a file by --prompt-file")
    source, remedy = f"the prompt {text!r:.60}", "give other text"
    if chat:
        text = _render(bundle, tokenizer, text, template)
        source, remedy = f"what the chat template of {bundle} makes of the prompt", "leave out --chat"
        _check_unicode(text, source, remedy)
    ids = encode(tokenizer, text, manifest.spec.vocab_size, special=not chat)
    if not ids:
        raise UserError(f"{source} has no tokens", remedy)
    return ids


def _check_unicode(text: str, source: str, remedy: str) -> None:
    """Refuse text with characters that stand for bytes of no UTF-8, or for halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{source} {text!r:.60} has bytes that are not UTF-8", remedy) from error


def _render(bundle: Path, tokenizer: PreTrainedTokenizerBase, text: str, template: str | None) -> str:
    """A user's message in the model's chat template."""
    found = tokenizer.chat_template
    if not found:
        raise UserError(f"{bundle} has no chat template", "leave out --chat")
    names = sorted(found) if isinstance(found, dict) else ["default"]
    if (template or "default") not in names:
        problem = f"no chat template {template!r}" if template else "several chat templates and none is the default"
        raise UserError(f"{bundle} has {problem}", f"choose by --chat-template one of: {', '.join(names)}")
    messages = [{"role": "user", "content": text}]
    # A template is code from the checkpoint, which may fail in any way.
    with foreign_reader(f"the chat template of {bundle} does not render", "leave out --chat"):
        rendered = tokenizer.apply_chat_template(
            messages,
            chat_template=template if isinstance(found, dict) else None,
            add_generation_prompt=True,
            tokenize=False,
        )
    return str(rendered)


def stop_criteria(tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> StopStringCriteria | None:
    """What `transformers` tells by whether a text ends, for `generate`; None without stop strings.

    Raises:
        UserError: a stop string is empty, or has characters that the tokenizer cannot write.
    """
    if "" in stops:
        raise UserError("a stop string is empty", "leave it out")
    if not stops:
        return None
    from transformers import StopStringCriteria

    quoted = ", ".join(map(repr, stops))
    with foreign_reader(f"transformers cannot stop at {quoted} with this tokenizer", "give other stop strings"):
        return StopStringCriteria(tokenizer, list(stops))


class TextStream:
    """Turns token ids into text as they come.

    The pieces, joined, are what decoding the prompt and all tokens at once gives behind the decoded prompt, special
    tokens left out. Text that a later token may still change is kept back: characters split over several tokens.

    Args:
        tokenizer: of `transformers`, or the one of `tokenizers` within it.
        prompt: token ids that precede; they decide whether the text goes on with a space.
        stops: strings that end the text; it stops in front of the first that is complete, also where that string
            begins in the prompt.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | Tokenizer, prompt: Sequence[int] = (), stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self._backend = tokenizer, getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._later = CLEANED_LATER if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
        self._ids, self._seen = list(prompt), len(prompt)
        before = self._text()
        self._given = len(before)
        self._in_bytes = False
        self._stops = StopText(stops, before)

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def push(self, token: int) -> str:
        """The text that became certain with this token; may be empty."""
        self._ids.append(token)
        text = self._text()
        if self._bytes_end_with(token) or text.endswith(UNFINISHED):
            return ""
        end = max(self._given, len(text) - self._later)
        piece = text[self._given : end]
        if piece and self._later:
            self._given = end
        elif piece:
            # Decoding goes on from the tokens of this piece: what precedes them has no influence any more.
            self._ids = self._ids[self._seen :]
            self._seen, self._given = len(self._ids), len(self._text())
        return self._stops.push(piece)

    def finish(self) -> str:
        """The rest of the text, when no token follows: what was kept back, as `decode` gives it."""
        piece, self._given = self._text()[self._given :], len(self._text())
        return self._stops.push(piece) + self._stops.finish()

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _bytes_end_with(self, token: int) -> bool:
        """Whether the text ends with tokens that are bytes: one that follows may make all of them invalid."""
        if BYTE_TOKEN.fullmatch(self._backend.id_to_token(token) or ""):
            self._in_bytes = True
        elif self._in_bytes and self._backend.decode([token], skip_special_tokens=True):
            self._in_bytes = False
        return self._in_bytes


class StopText:
    """Text up to the first stop string that is complete; what may become one is kept back.

    Args:
        stops: strings that end the text.
        before: what precedes the text; a stop string may begin in it, but not lie in it.

    Attributes:
        stopped: whether a stop string has come.
    """

    def __init__(self, stops: Sequence[str], before: str = "") -> None:
        self._stops, self.stopped = tuple(stops), False
        self._held = before
        self._before = len(before)  # characters of what is held that are not of the text
        self._release(len(before) - self._begun())

    def push(self, piece: str) -> str:
        """The text that is certain to come before any stop string; empty after one."""
        if self.stopped:
            return ""
        self._held += piece
        found = [(start + len(stop), start) for stop in self._stops if (start := self._find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found)[1])
        return self._release(len(self._held) - self._begun())

    def finish(self) -> str:
        """What was kept back, when no text follows."""
        return "" if self.stopped else self._release(len(self._held))

    def _find(self, stop: str) -> int:
        return self._held.find(stop, max(0, self._before - len(stop) + 1))

    def _begun(self) -> int:
        """How many of the last characters may become a stop string."""
        return max((_overlap(self._held, stop) for stop in self._stops), default=0)

    def _release(self, end: int) -> str:
        """What is held up to ``end``, without what is not of the text; the rest stays."""
        piece, self._held = self._held[self._before : end], self._held[end:]
        self._before = max(0, self._before - end)
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that a stop string begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
