"""Trains a small OPT or a small Llama, which are real ReLU models that need no download.

    python -m shadowllm.benchmarks.small_model MODEL out/small-opt
    python -m shadowllm.benchmarks.small_model MODEL out/relu-llama --family llama --vocab-size 4096

It has the architecture of its family, with ReLU, and the tokenizer of the given model, or a smaller one of the same
kind. It is trained on Python's own documentation: the language reference, and the docstrings of the standard library,
except the modules that benchmarks evaluate on.
"""

from __future__ import annotations

import ast
import math
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from shadowllm.benchmarks.script_parser import script, script_parser
from shadowllm.evaluation.default_text import MODULES
from shadowllm.exporter.staging import check_output, staged
from shadowllm.malloc import keep_freed_memory
from shadowllm.models.registry import load_model
from shadowllm.progress import Advance, no_progress, progress

SEQLEN = 128


@dataclass(frozen=True)
class Recipe:
    """The sizes of a family's model, and how it is trained.

    Attributes:
        sizes: options of the family's config.
        batch: windows of `SEQLEN` tokens per step.
        warmup: steps in which the learning rate rises.
    """

    sizes: dict[str, Any]
    batch: int
    steps: int
    warmup: int
    learning_rate: float


RECIPES = {
    "opt": Recipe(
        {
            "hidden_size": 192,
            "ffn_dim": 768,
            "num_hidden_layers": 8,
            "num_attention_heads": 6,
            "word_embed_proj_dim": 192,
            "max_position_embeddings": 512,
            "dropout": 0.0,
        },
        batch=16,
        steps=1200,
        warmup=100,
        learning_rate=2e-3,
    ),
    "llama": Recipe(
        {
            "hidden_act": "relu",
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
        batch=4,
        steps=600,
        warmup=50,
        learning_rate=2e-3,
    ),
}


def documents() -> Iterator[str]:
    """The language reference, then the docstrings of all standard modules that are not evaluated on."""
    from pydoc_data.topics import topics

    yield from topics.values()
    yield from docstrings(Path(sysconfig.get_path("stdlib")), {"heapq", *MODULES})


def docstrings(folder: Path, without: Iterable[str] = ()) -> Iterator[str]:
    """The docstrings of each module in a folder, except tests and the modules named in ``without``."""
    skipped = {"test", "tests", "idle_test", "site-packages", "lib2to3", "__pycache__"}
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(folder.rglob("*.py")):
        if skipped & set(path.relative_to(folder).parts) or path.stem in without:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders))
        yield "\n\n".join(text for text in found if text and len(text) > 40)


def train(tokenizer: Any, family: str, steps: int, seed: int = 0, advance: Advance = no_progress) -> Any:
    """Train the model of a family for causal language modelling.

    Args:
        family: a key of `RECIPES`.
        steps: number of steps.
        advance: called with 1 after each step.
    """
    torch.manual_seed(seed)
    recipe = RECIPES[family]
    ids = torch.tensor([token for text in documents() for token in tokenizer(text, add_special_tokens=False).input_ids])
    # Most of the work would be the logits of tokens that never occur in the text. They share one row, whose logit is
    # counted once for each of them. The result is the same as if each had its own copy of that row.
    seen, ids = torch.unique(ids, return_inverse=True)
    others = torch.tensor(float(len(tokenizer) - len(seen)))
    model = _untrained(family, vocab_size=len(seen) + 1, pad_token_id=len(seen))
    optimiser = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        rate = min(1, (step + 1) / recipe.warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * rate
        batch = _batch(ids, recipe.batch)
        logits = model(input_ids=batch).logits
        logits[..., -1] += others.log()
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        advance(1)
    return _for_all_tokens(model, family, seen, tokenizer)


def _untrained(family: str, **config: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **RECIPES[family].sizes, **config))


def _for_all_tokens(trained: Any, family: str, seen: Tensor, tokenizer: Any) -> Any:
    """Expand a model of the ``seen`` tokens, int64 ``(n,)``, plus one row for the others, to all tokens."""
    rows = torch.full((len(tokenizer),), len(seen))
    rows[seen] = torch.arange(len(seen))
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = _untrained(family, vocab_size=len(tokenizer), **special)
    weights = trained.state_dict()
    for name in weights:
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weights[name] = weights[name][rows]
    model.load_state_dict(weights)
    return model.eval()


def _batch(ids: Tensor, size: int) -> Tensor:
    starts = torch.randint(0, len(ids) - SEQLEN, (size,))
    return torch.stack([ids[start : start + SEQLEN] for start in starts.tolist()])


@script
def main() -> None:
    """Command line."""
    parser = script_parser("small_model", __doc__)
    parser.add_argument("tokenizer", help="model whose tokenizer to use")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--family", choices=RECIPES, default="opt")
    parser.add_argument("--steps", type=int, help="default: 1200 for OPT, 600 for Llama")
    parser.add_argument(
        "--vocab-size", type=int, help="train a tokenizer of this size, of the same kind, on the documentation"
    )
    args = parser.parse_args()
    check_output(args.out, overwrite=False)
    keep_freed_memory()
    tokenizer = load_model(args.tokenizer)[2].tokenizer()
    if args.vocab_size:
        tokenizer = tokenizer.train_new_from_iterator(documents(), args.vocab_size)
    steps = RECIPES[args.family].steps if args.steps is None else args.steps
    with staged(args.out) as folder:
        with progress("Training", steps) as advance:
            model = train(tokenizer, args.family, steps, advance=advance)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
