"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from shadowllm import __version__
from shadowllm.commands.outputs import check_outputs
from shadowllm.errors import UserError, os_error
from shadowllm.threads import share_threads

COMMANDS = {
    "export": "model -> bundle: ONNX graphs, predictor and, if asked for, TensorRT engines",
    "run": "generate text from a bundle",
    "serve": "serve a bundle over HTTP, with OpenAI's interface and a page",
    "repository": "bundle -> model repository for Triton Inference Server",
    "bench": "measure a bundle and compare it with dense ONNX Runtime",
    "eval": "perplexity and agreement with the dense model, over budgets and selectors",
    "drift": "measure how well a bundle's predictor fits a text",
    "tune": "choose a bundle's budgets for a target perplexity or speedup",
    "inspect": "describe a bundle, an ONNX file, an engine or a predictor",
    "families": "list the model families that are supported, and their features",
    "calibrate": "model -> importance traces (the first step of export on its own)",
    "train": "traces -> predictor (the second step of export on its own)",
    "build": "bundle -> TensorRT engines (the last step of export on its own)",
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # they end a command
EPILOG = """examples:
  shadowllm export MODEL my-bundle/
  shadowllm run my-bundle/ --prompt "The shadow of a model"
  shadowllm bench my-bundle/ --against ort-dense --json bench.json

MODEL is a folder with safetensors, a .gguf file, or a Hugging Face id. `shadowllm COMMAND --help`
shows the options and examples of a command."""


def script() -> int:
    """The program ``shadowllm``: `main` in a process of its own."""
    share_threads()
    status = main()
    for number in SIGNALS:  # while Python ends, an exception would only be printed
        if signal.getsignal(number) == _interrupt:
            signal.signal(number, signal.SIG_DFL)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0 success, 1 an error that the user can fix, 2 wrong usage."""
    _interrupt_on_signals()
    if sys.stdout is None:
        return _fail("standard output is closed; redirect it to a file, or to /dev/null")
    _print_anything()
    warnings.formatwarning = _format_warning
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(arguments).parse_args(arguments)
        _check_names(args)
        check_outputs(args)
        args.run(args)
    except UserError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written")
    except BrokenPipeError:
        # The reader of our output has closed it (as in `| head`), so a message would not be seen.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if (known := os_error(error)) is None:
            raise
        return _fail(str(known))
    return 0


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="shadowllm",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Contextual sparsity for language models: for each token, the heads and neurons that matter are "
        "computed from the full weights, and the others from a 4-bit copy or not at all.",
    )
    parser.add_argument("--version", action="version", version=f"shadowllm {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        # Only the requested command is imported, so that --help does not wait for PyTorch.
        if name in arguments:
            module = importlib.import_module(f"shadowllm.commands.{name}")
            command.description, command.epilog = f"{summary[0].upper()}{summary[1:]}.", module.EPILOG
            module.configure(command)
            command.set_defaults(run=module.run)
    return parser


def _check_names(args: argparse.Namespace) -> None:
    """Refuse file names that are not UTF-8, because other packages cannot read or write them."""
    names = [value for name, value in vars(args).items() if isinstance(value, Path) or name == "model"]
    for name in map(os.path.abspath, names):
        if os.fsencode(name) != name.encode(errors="replace"):
            raise UserError(
                f"the name {name!r} is not UTF-8 here", "rename it; if only the locale is not UTF-8, set PYTHONUTF8=1"
            )


def _print_anything() -> None:
    """Replace characters that the output's encoding lacks, so that a result is not lost because of one."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(message: str) -> int:
    message = message.replace("\n", "\\n")  # a file name may contain one, but an error is one line
    print(f"shadowllm: error: {message}", file=sys.stderr)
    return 1


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    return f"shadowllm: warning: {message}\n"


class _Interrupted(KeyboardInterrupt):
    """An interrupt by a signal.

    A subclass is needed: Python kills itself with SIGINT at exit if a plain KeyboardInterrupt has passed through an
    `exec` of text, even if it was caught.
    """


def _interrupt_on_signals() -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread can set handlers
    for number in SIGNALS:
        # A shell starts background jobs with Ctrl-C ignored, and nohup ignores SIGHUP. That must not change.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupted


if __name__ == "__main__":
    sys.exit(main())
