"""``shadowllm run``"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowllm.commands import options
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, StopStringCriteria

    from shadowllm.bundle.manifest import Manifest
    from shadowllm.runtime import Sampling

EPILOG = """examples:
  shadowllm run out/ --prompt "The shadow of a model"
  shadowllm run out/ --prompt "Once upon a time" --temperature 0.8 --top-p 0.9 --seed 7
  shadowllm run out/ --prompt "One" --prompt "Two" --neuron-budget 0.3      # a batch, another budget
  shadowllm run out/ --prompt "The sea" --against ort-dense                 # sparse and dense side by side
  shadowllm run out/ --prompt-file question.txt --chat --stop "###"         # a file; - is standard input

Decoding is greedy unless --temperature is given. What is left out of the options under "sampling" comes from the
model's generation config, but for --temperature and --seed; top-k, top-p and min-p count only with a temperature."""


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
        help="the same from a UTF-8 file, all of it, its last line end included; - is standard input",
    )
    parser.add_argument("--chat", action="store_true", help="put each prompt through the model's chat template")
    parser.add_argument("--chat-template", metavar="NAME", help="the same, by name, where the model has several")
    parser.add_argument("--backend", choices=BACKENDS, default="ort", help="what runs it (default: ort)")
    parser.add_argument("--against", choices=BACKENDS, help="run a second backend too and print both")
    options.add_whole(parser, "--max-new-tokens", default=64, metavar="N", help="(default: 64)")
    options.add_threads(parser, help="of each operator on the CPU (default: the backend's own)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    options.add_budget(parser, None, None)
    _add_sampling(parser)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--temperature", type=float, help="0 is greedy (default: 0)")
    group.add_argument("--top-k", type=int, help="0 keeps all tokens")
    group.add_argument("--top-p", type=float, help="1 keeps all tokens")
    group.add_argument("--min-p", type=float, help="0 keeps all tokens")
    group.add_argument("--repetition-penalty", type=float, help="1 changes nothing")
    group.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="0 allows every repetition")
    group.add_argument("--seed", type=int, help="of the draws (default: 0)")
    group.add_argument(
        "--stop", action="append", type=_text, metavar="TEXT", help="end the text before this; may be repeated"
    )


@dataclass(frozen=True)
class Request:
    """What is asked of every backend alike.

    Attributes:
        prompts: token ids.
        stops: strings that end a text.
        stopping: tells when one has come.
    """

    manifest: Manifest
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    budget: Budget
    sampling: Sampling
    stops: tuple[str, ...]
    stopping: StopStringCriteria | None


def run(args: argparse.Namespace) -> None:
    """Generate with one backend, or with two for comparison."""
    if not args.prompt:
        raise UserError("no prompt", "give --prompt TEXT or --prompt-file FILE")
    streaming = not (args.json or args.against or len(args.prompt) > 1)
    request = _request(args)
    results = [_generate(args, request, backend, streaming) for backend in (args.backend, args.against) if backend]
    if args.json:
        print(json.dumps({"prompts": args.prompt, "results": results}, indent=2))
    elif not streaming:
        _print_table(args.prompt, results)


def _request(args: argparse.Namespace) -> Request:
    from shadowllm.bundle.manifest import read_manifest
    from shadowllm.runtime.generation.sampling import bundle_sampling
    from shadowllm.runtime.generation.text import encode_prompt, load_tokenizer, stop_criteria

    manifest = read_manifest(args.bundle)
    sampling, stops = bundle_sampling(
        args.bundle,
        manifest,
        args.stop,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
        seed=args.seed,
    )
    tokenizer = load_tokenizer(args.bundle, manifest)
    chat = args.chat or args.chat_template is not None
    prompts = [encode_prompt(args.bundle, manifest, tokenizer, p, chat, args.chat_template) for p in args.prompt]
    budget = Budget(args.neuron_budget or manifest.budgets["neurons"], args.head_budget or manifest.budgets["heads"])
    return Request(manifest, tokenizer, prompts, budget, sampling, stops, stop_criteria(tokenizer, stops))


def _generate(args: argparse.Namespace, request: Request, backend: str, streaming: bool) -> dict[str, Any]:
    from shadowllm.runtime import generate, open_session

    texts = Texts(request, args.prompt[0] if streaming else None)
    stop_ids = request.manifest.spec.eos_token_ids
    with open_session(args.bundle, backend, threads=args.threads) as session:
        session.set_budget(request.budget)
        start = time.perf_counter()
        for step in generate(
            session, request.prompts, args.max_new_tokens, request.sampling, stop_ids, request.stopping
        ):
            texts.add(step)
        texts.finish()
        seconds = time.perf_counter() - start
        memory = session.memory
    return {
        "backend": backend,
        "budget": vars(request.budget),
        "decodes": session.decodes,
        "texts": texts.texts,
        "tokens": texts.tokens,
        "seconds": seconds,
        "tokens_per_second": sum(map(len, texts.tokens)) / seconds,
        "device_memory": vars(memory) if memory else None,
    }


class Texts:
    """The text of each sequence as it grows.

    Args:
        prompt: to be printed in front of the only sequence, whose text is then printed as it comes; None to print
            nothing.

    Attributes:
        texts: what each sequence says.
        tokens: its token ids, those of a stop string included.
    """

    def __init__(self, request: Request, prompt: str | None) -> None:
        from shadowllm.runtime.generation.text import TextStream

        self._streams = [TextStream(request.tokenizer, ids, request.stops) for ids in request.prompts]
        self._prompt, self._printing = prompt or "", prompt is not None
        self.texts = [""] * len(self._streams)
        self.tokens: list[list[int]] = [[] for _ in self._streams]

    def add(self, step: Sequence[int | None]) -> None:
        """One new token of each sequence, None of those that have ended."""
        for row, token in enumerate(step):
            if token is not None:
                self.tokens[row].append(token)
                self._write(row, self._streams[row].push(token))

    def finish(self) -> None:
        """No more tokens come."""
        for row, stream in enumerate(self._streams):
            self._write(row, stream.finish())
        if self._printing:
            print()

    def _write(self, row: int, piece: str) -> None:
        self.texts[row] += piece
        if self._printing:
            print(self._prompt + piece, end="", flush=True)
            self._prompt = ""


def _text(argument: str) -> str:
    """An argument as UTF-8, where the locale's encoding could not read it."""
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
    """What a file or standard input holds."""
    what = "standard input" if name == "-" else name
    if name == "-" and sys.stdin is None:  # as Python has it where the caller closed it
        raise UserError("standard input is closed", "give a text file to --prompt-file")
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {what} ({error.strerror})", "give a text file to --prompt-file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text ({error})", "convert it to UTF-8") from error


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
