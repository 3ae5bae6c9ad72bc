"""Small tokenizers of the three kinds of Llama 3, Llama 2 and OPT, and models for them."""

from __future__ import annotations

import json
from pathlib import Path

from shadowllm.runtime.generation.text import TextStream
from tests.bundles import make_bundle
from tests.conftest import build_transformers_model

TEXT = "The sea is wide and the shadow of a model is small; what matters is said again, token by token. " * 8
WORDS = ("the", "sea", "shadow", "model", "small")


def llama3():
    """Byte-level BPE; the post-processor adds BOS at the start."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|header|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>")


def llama2():
    """Pieces with U+2581 for a space, byte tokens for other characters, and a decoder that strips the first space."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    special, space = ["<unk>", "<s>", "</s>"], "\u2581"
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), space, *map(chr, range(ord("A"), ord("z") + 1))]
    merges = []
    for word in WORDS:
        for end in range(1, len(word) + 1):
            left, right = space + word[: end - 1], word[end - 1]
            if left + right not in pieces:
                pieces.append(left + right)
                merges.append((left, right))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def opt():
    """GPT-2's BPE with </s> before every text, as in OPT: vocab.json and merges.txt, no tokenizer.json."""
    from transformers import GPT2Tokenizer

    model = json.loads(llama3().backend_tokenizer.to_str())["model"]
    vocabulary = {"</s>" if token == "<|end|>" else token: number for token, number in model["vocab"].items()}
    merges = [tuple(merge) for merge in model["merges"]]
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "</s>")
    return GPT2Tokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, **names)


KINDS = {"llama3": llama3, "llama2": llama2, "opt": opt}


def save_model(folder: Path, tokenizer, rows: int | None = None, **options) -> Path:
    """Write a tiny random model beside a tokenizer, by default with one embedding row per token."""
    sizes = {
        "vocab_size": rows or len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    build_transformers_model("llama", sizes | options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export(tokenizer, folder: Path, **options) -> Path:
    """Make a bundle of such a model in ``folder / "bundle"``; the checkpoint is in ``folder / "model"``."""
    model = save_model(folder / "model", tokenizer, **options)
    (folder / "bundle").mkdir()
    make_bundle(model, folder / "bundle")
    return folder / "bundle"


def stops_at(tokenizer, prompts, stops):
    """What `generate` takes to end texts after the token that completes a stop string."""
    streams = [TextStream(tokenizer, prompt, stops) for prompt in prompts]

    def ends(row, token):
        streams[row].push(token)
        return streams[row].stopped

    return ends
