"""Text in and out of a bundle, with the tokenizer that lies in it."""

from __future__ import annotations

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
    verify_files(bundle, {name: manifest.files[name]})
    return Tokenizer.from_file(str(bundle / name))


class TextStream:
    """Turns token ids into text as they come; characters split over tokens wait for their last part."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """The text that became complete with this token; may be empty."""
        return self._stream.step(self._tokenizer, token) or ""
