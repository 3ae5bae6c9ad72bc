"""``shadowllm run``"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from shadowllm.commands import options
from shadowllm.errors import UserError
from shadowllm.models.budget import Budget

EPILOG = """examples:
  shadowllm run out/ --prompt "The shadow of a model"
  shadowllm run out/ --prompt "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 7
  shadowllm run out/ --prompt "One" --prompt "Two" --neuron-budget 0.3      # a batch, another budget
  shadowllm run out/ --prompt "The sea" --against ort-dense                 # sparse and dense side by side"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    from shadowllm.runtime import BACKENDS

    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle that `shadowllm export` made")
    parser.add_argument("--prompt", action="append", required=True, help="text to continue; repeat it for a batch")
    parser.add_argument("--chat", action="store_true", help="put each prompt through the model's chat template")
    parser.add_argument("--backend", choices=BACKENDS, default="ort", help="what runs it (default: ort)")
    parser.add_argument("--against", choices=BACKENDS, help="run a second backend too and print both")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="(default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: 0)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all tokens (default: 0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 keeps all tokens (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument("--threads", type=int, help="of each operator (default: ONNX Runtime's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options.add_budget(parser, None, None)


def run(args: argparse.Namespace) -> None:
    """Generate with one backend, or with two for comparison."""
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}", "give at least 1")
    streaming = not (args.json or args.against or len(args.prompt) > 1)
    results = [_generate(args, backend, streaming) for backend in (args.backend, args.against) if backend]
    if args.json:
        print(json.dumps({"prompts": args.prompt, "results": results}, indent=2))
    elif not streaming:
        _print_table(args.prompt, results)


def _generate(args: argparse.Namespace, backend: str, streaming: bool) -> dict[str, Any]:
    from shadowllm.exporter.manifest import read_manifest
    from shadowllm.runtime import Sampling, generate, open_session
    from shadowllm.runtime.text import TextStream, encode_prompt, load_tokenizer

    manifest = read_manifest(args.bundle)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    tokenizer = load_tokenizer(args.bundle, manifest)
    prompts = [encode_prompt(args.bundle, manifest, tokenizer, text, args.chat) for text in args.prompt]
    budget = Budget(args.neuron_budget or manifest.budgets["neurons"], args.head_budget or manifest.budgets["heads"])
    texts = ["" for _ in prompts]
    tokens: list[list[int]] = [[] for _ in prompts]
    with open_session(args.bundle, backend, threads=args.threads) as session:
        session.set_budget(budget)
        streams = [TextStream(tokenizer) for _ in prompts]
        if streaming:
            print(args.prompt[0], end="", flush=True)
        start = time.perf_counter()
        for step in generate(session, prompts, args.max_new_tokens, sampling, manifest.spec.eos_token_ids):
            for row, token in enumerate(step):
                if token is not None:
                    piece = streams[row].push(token)
                    texts[row], tokens[row] = texts[row] + piece, [*tokens[row], token]
                    if streaming:
                        print(piece, end="", flush=True)
        seconds = time.perf_counter() - start
        memory = getattr(session, "memory", None)
    if streaming:
        print()
    count = sum(map(len, tokens))
    return {
        "backend": backend,
        "budget": vars(budget),
        "decodes": getattr(session, "decodes", "dense" if backend.endswith("-dense") else "sparse"),
        "texts": texts,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": count / seconds,
        "device_memory": vars(memory) if memory else None,
    }


def _print_table(prompts: list[str], results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True)
    table.add_column("prompt", ratio=1)
    for result in results:
        table.add_column(result["backend"], ratio=3)
    for row, prompt in enumerate(prompts):
        table.add_row(Text(prompt), *(Text(result["texts"][row]) for result in results))
    Console().print(table)
