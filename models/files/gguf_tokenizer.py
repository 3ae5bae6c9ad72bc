"""Read the tokenizer of a GGUF file with `transformers`, and correct what it does not read.

llama.cpp (src/llama-vocab.cpp) defines the keys, and what is true if a key is missing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "\u2581"
# Values of tokenizer.ggml.pre whose tokenizers add BOS if no key says otherwise, and take a word that is in the
# vocabulary as it is, even if its merges would give another token.
WHOLE_WORDS = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
)
# Those that split text as GPT-2 does, or also between digits, which their merges never join.
LIKE_GPT2 = ("gpt-2", "phi-2", "smollm", "refact")

Get = Callable[[str], Any]


def read_gguf_tokenizer(file: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Read the tokenizer in a GGUF file.

    Args:
        trust_remote_code: let ``transformers`` run tokenizer code from the checkpoint.

    Raises:
        Exception: of any type, from ``transformers`` or gguf: the file is damaged or has another kind of tokenizer.
    """
    from gguf import GGUFReader

    tokenizer = _read(file, trust_remote_code)
    fields = GGUFReader(file).fields

    def get(key: str) -> Any:
        field = fields.get(f"tokenizer.ggml.{key}")
        return None if field is None else field.contents()

    _correct_special_tokens(tokenizer, get)
    _correct_bos(tokenizer, get)
    if get("model") == "gpt2":
        _correct_byte_level(tokenizer, get("pre"))
    elif get("model") == "llama" and get("add_space_prefix") is False:
        _remove_first_space(tokenizer)
    return tokenizer


def _read(file: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # transformers takes a tokenizer.json beside the file before it, and that may be another model's.
    with TemporaryDirectory() as alone:
        (Path(alone) / file.name).symlink_to(file.resolve())
        try:
            return AutoTokenizer.from_pretrained(alone, gguf_file=file.name, trust_remote_code=trust_remote_code)
        except ValueError:
            # It reads the model's config too, which transformers cannot for every architecture. The tokenizer needs
            # none.
            return PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=file.name)


def _correct_special_tokens(tokenizer: PreTrainedTokenizerBase, get: Get) -> None:
    """Set BOS and EOS to those of the file, because ``transformers`` 5.0 exchanges them for byte-level BPE."""
    for name in ("bos", "eos"):
        stored = get(f"{name}_token_id")
        if stored is not None and getattr(tokenizer, f"{name}_token_id") not in (None, int(stored)):
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(stored)))


def _correct_bos(tokenizer: PreTrainedTokenizerBase, get: Get) -> None:
    """Let texts start with BOS if the file says so, or if llama.cpp adds it where a file says nothing."""
    adds = get("add_bos_token")
    if adds is None:
        adds = get("model") == "llama" or get("pre") in WHOLE_WORDS
    if tokenizer.bos_token is not None:
        tokenizer.add_bos_token = bool(adds)


def _correct_byte_level(tokenizer: PreTrainedTokenizerBase, pre: str | None) -> None:
    """Set what the kind of byte-level BPE implies; warn if ``transformers`` does not know how the kind splits text."""
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if pre in WHOLE_WORDS:
        backend.model.ignore_merges = True
    if pre not in LIKE_GPT2 and isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        says = "does not say how text is split (tokenizer.ggml.pre)" if pre is None else f"splits text as {pre!r}"
        warnings.warn(
            f"the GGUF file {says}, and transformers splits it as GPT-2 does: some texts may get other tokens than in "
            "the original model; use its safetensors checkpoint, or a newer transformers",
            stacklevel=2,
        )


def _remove_first_space(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a SentencePiece tokenizer not put a space before a text, and not remove it from decoded texts."""
    from tokenizers import decoders, normalizers

    backend = tokenizer.backend_tokenizer
    if not backend.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE):
        return  # it puts none there, as Gemma's
    backend.normalizer, backend.pre_tokenizer = normalizers.Replace(" ", SPACE), None
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
