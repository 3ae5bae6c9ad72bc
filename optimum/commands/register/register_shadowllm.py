"""``optimum-cli export shadowllm``. Hugging Face optimum loads every file of this folder, from any installed package.

No folder here has an ``__init__.py``, because optimum's packages are namespaces (PEP 420) that wheels share.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand

from shadowllm.cli import COMMANDS, main


class ShadowLLMExport(BaseOptimumCLICommand):
    """Passes its arguments on to ``shadowllm export``; ``--model`` names the model, as in optimum's own exports."""

    COMMAND = CommandInfo(name="shadowllm", help=COMMANDS["export"])

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        # Without a prefix for options every argument, even --help, is positional. `shadowllm export` parses them.
        parser.prefix_chars = ""
        parser.add_argument("arguments", nargs="*")

    def run(self) -> None:
        parser = ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("-m", "--model", action="append", default=[])
        named, others = parser.parse_known_args(self.args.arguments)
        sys.exit(main(["export", *named.model, *others]))


REGISTER_COMMANDS = [(ShadowLLMExport, ExportCommand)]
