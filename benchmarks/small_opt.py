"""The former name of `small_model`, for scripts that use it."""

from __future__ import annotations

import sys

from shadowllm.benchmarks.small_model import main

if __name__ == "__main__":
    sys.exit(main())
