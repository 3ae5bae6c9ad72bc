"""Text in and out of a bundle, with the tokenizer that lies in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from shadowllm.errors import UserError
from shadowllm.exporter.manifest import Manifest, verify_files


def load_tokenizer(bundle: Path, manifest: Manifest) -> Tokenizer:
    """The bundle's tokenizer.

    Raises:
        UserError: the bundle has none, or its file is damaged.
    """
    name = "tokenizer.json"
    if name not in manifest.files:
        raise UserError(f"{bundle} has no tokenizer", "export from a checkpoint that has tokenizer.json")
    verify_files(bundle, manifest.digests(name))
    return Tokenizer.from_file(str(bundle / name))


def plain_encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    """Text to token ids without special tokens: what running text is made of."""
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def encode_prompt(bundle: Path, manifest: Manifest, tokenizer: Tokenizer, text: str, chat: bool = False) -> list[int]:
    """Token ids of a prompt, with the special tokens the tokenizer adds by itself.

    Args:
        chat: put the text through the model's chat template as a user's message.

    Raises:
        UserError: the prompt is empty, or the bundle has no chat template.
    """
    if not text:
        raise UserError("the prompt is empty", "give some text")
    if not chat:
        return list(tokenizer.encode(text).ids)
    name = "chat_template.jinja"
    if name not in manifest.files:
        raise UserError(f"{bundle} has no chat template", "leave out --chat")
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    verify_files(bundle, manifest.digests(name))
    # Sandboxed and trimmed as transformers renders chat templates: a template is code from the checkpoint.
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        rendered = environment.from_string((bundle / name).read_text()).render(
            messages=[{"role": "user", "content": text}], add_generation_prompt=True, bos_token="", eos_token=""
        )
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template of {bundle} does not render ({error})", "leave out --chat") from error
    return list(tokenizer.encode(rendered, add_special_tokens=False).ids)


class TextStream:
    """Turns token ids into text as they come; characters split over tokens wait for their last part."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that became complete with this token; may be empty."""
        return self._stream.step(self._tokenizer, token) or ""
