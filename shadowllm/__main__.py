"""``python -m shadowllm`` is the command ``shadowllm``."""

import sys

from shadowllm.cli import script

if __name__ == "__main__":
    sys.exit(script())
