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
    """Passes its arguments on to ``shadowllm export``."""

    COMMAND = CommandInfo(name="shadowllm", help=COMMANDS["export"])

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        # Without a prefix for options every argument, even --help, is positional. `shadowllm export` parses them.
        parser.prefix_chars = ""
        parser.add_argument("arguments", nargs="*")

    def run(self) -> None:
        sys.exit(main(["export", *self.args.arguments]))


REGISTER_COMMANDS = [(ShadowLLMExport, ExportCommand)]
