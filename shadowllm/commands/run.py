"""``shadowllm run``"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowllm.commands import options
from shadowllm.commands.flags import add_flags, values
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget

if TYPE_CHECKING:
    from shadowllm.runtime.generation.completion import Request
    from shadowllm.runtime.session import Prefill

EPILOG = """examples:
  shadowllm run out/ --prompt "The shadow of a model"
  shadowllm run out/ --prompt "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 7
  shadowllm run out/ --prompt "One" --prompt "Two" --neuron-budget 0.3      # a batch, another budget
  shadowllm run out/ --prompt "The sea" --against ort-dense                 # sparse and dense side by side
  shadowllm run out/ --prompt "The sea" --lossless                          # dense's own text, drafted sparse
  shadowllm run out/ --prompt-file question.txt --chat --stop "###"         # a file; - is standard input

Decoding is greedy unless --temperature is given. Sampling options that are not given come from the model's generation
config, except --temperature and --seed. top-k, top-p and min-p have an effect only with a temperature."""


# Options that the model's generation config may set, by their names in `Sampling`.
CONFIGURED = ("top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    from shadowllm.runtime import BACKENDS

    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle that `shadowllm export` made")
    parser.add_argument(
        "--prompt", action="append", type=_text, metavar="TEXT", help="text to continue; repeat it for a batch"
    )
    parser.add_argument(
        "--prompt-file",
        action="append",
        dest="prompt",
        type=_file,
        metavar="FILE",
        help="read the prompt from a UTF-8 file, including its last line end; - is standard input",
    )
    parser.add_argument("--chat", action="store_true", help="put each prompt through the model's chat template")
    parser.add_argument("--chat-template", metavar="NAME", help="the same, with this template if the model has several")
    parser.add_argument("--backend", choices=BACKENDS, default="ort", help="backend (default: ort)")
    parser.add_argument("--against", choices=BACKENDS, help="run a second backend too and print both")
    options.add_whole(
        parser, "--max-new-tokens", default=64, metavar="N", help="largest number of new tokens (default: 64)"
    )
    options.add_threads(parser, help="threads of each operator on the CPU (default: the backend's own)")
    options.add_prefill(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options.add_budget(parser)
    options.add_drafting(parser)
    _add_sampling(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    from shadowllm.runtime import Sampling

    group = parser.add_argument_group("sampling")
    add_flags(group, Sampling, "temperature")
    add_flags(group, Sampling, *CONFIGURED, unset=True)
    add_flags(group, Sampling, "seed")
    group.add_argument(
        "--stop", action="append", type=_text, metavar="TEXT", help="end the text before this; may be repeated"
    )


def run(args: argparse.Namespace) -> None:
    """Generate with one backend, or with two for comparison."""
    from functools import partial

    from shadowllm.bundle.manifest import read_manifest
    from shadowllm.draft_config import Drafting
    from shadowllm.runtime import Sampling
    from shadowllm.runtime.generation.completion import make_request
    from shadowllm.runtime.generation.text import load_tokenizer

    if not args.prompt:
        raise UserError("no prompt", "give --prompt TEXT or --prompt-file FILE")
    manifest = read_manifest(args.bundle)
    request = make_request(
        args.bundle,
        manifest,
        partial(load_tokenizer, args.bundle, manifest),
        args.prompt,
        args.max_new_tokens,
        chat=args.chat,
        chat_template=args.chat_template,
        stop=args.stop,
        **values(args, Drafting),
        **values(args, Sampling, "temperature", *CONFIGURED, "seed"),
    )
    budget = options.budget(args, manifest.draft_budget if args.lossless else manifest.budget)
    streaming = not (args.json or args.against or len(args.prompt) > 1)
    backends = [backend for backend in (args.backend, args.against) if backend]
    results = [_generate(args, request, backend, budget, streaming) for backend in backends]
    if args.json:
        print(json.dumps({"prompts": args.prompt, "results": results}, indent=2))
    elif not streaming:
        _print_table(args.prompt, results)


def _generate(
    args: argparse.Namespace, request: Request, backend: str, budget: Budget, streaming: bool
) -> dict[str, Any]:
    from shadowllm.runtime import open_session
    from shadowllm.runtime.generation.completion import Completion
    from shadowllm.runtime.recomputed_rows import RecomputedRows

    completion, prompt, recomputed = Completion(request), args.prompt[0], RecomputedRows(budget)
    fired = list[Sequence[float]]()
    prefill: Prefill = args.prefill if backend == args.backend else "dense"  # the backend of --against has its own way
    prepack = args.prepack and (backend == args.backend or backend.startswith("ort"))
    with open_session(args.bundle, backend, threads=args.threads, prefill=prefill, prepack=prepack) as session:
        session.set_budget(budget)
        start = time.perf_counter()
        known = 1  # the first tokens come from the prefill
        for pieces in completion.grow(session):
            if (longest := max(map(len, completion.tokens))) > known:
                # With drafts, each token comes from a dense step.
                recomputed.add(None if args.lossless else session.recomputed)
                fired.append(() if args.lossless else session.fired or ())
                known = longest
            if streaming:
                print(prompt + pieces[0], end="", flush=True)
                prompt = ""
        seconds = time.perf_counter() - start
        memory, decodes = session.memory, session.decodes
    if streaming:
        print()
    if completion.drafts and not args.json:
        print(f"{backend}: {completion.drafts}", file=sys.stderr)
    return {
        "backend": backend,
        "budget": vars(budget),
        "decodes": decodes,
        "texts": completion.texts,
        "tokens": completion.tokens,
        "lossless": completion.drafts.to_dict() if completion.drafts else None,
        "seconds": seconds,
        "recomputed_rows": recomputed.summary(),
        "tokens_per_second": sum(map(len, completion.tokens)) / seconds,
        "device_memory": vars(memory) if memory else None,
        "fired": _mean_by_layer(fired),
    }


def _mean_by_layer(fired: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean share of neurons that fired in each sparse layer, over the sparse steps."""
    steps = [shares for shares in fired if shares]
    return [sum(layer) / len(steps) for layer in zip(*steps, strict=True)]


def _text(argument: str) -> str:
    """Return an argument decoded as UTF-8, if the locale's encoding could not decode it."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        try:
            return os.fsencode(argument).decode()
        except UnicodeDecodeError as error:
            raise UserError(
                f"the argument {argument!r} has bytes that are not UTF-8", "write it in UTF-8, or use --prompt-file"
            ) from error
    return argument


def _file(name: str) -> str:
    """Return the text of a file or of standard input."""
    what = "standard input" if name == "-" else name
    if name == "-" and sys.stdin is None:  # the caller closed it
        raise UserError("standard input is closed", "give a text file to --prompt-file")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {what} ({error.strerror})", "give a text file to --prompt-file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text ({error})", "convert it to UTF-8") from error


def _mean_share(fired: Sequence[float]) -> str:
    return f"{sum(fired) / len(fired):.1%}" if fired else "-"


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
    if any(result["fired"] for result in results):
        table.add_row("neurons that fired", *(_mean_share(result["fired"]) for result in results))
    Console().print(table)
