"""Contextual sparsity for language models: predictor, sparse ONNX export, TensorRT engines, runtime.

import shadowllm

shadowllm.export("model.gguf", "bundle", budget=shadowllm.Budget(neurons=0.5, heads=0.75))
with shadowllm.load("bundle") as model:
    print(shadowllm.generate(model, "Hello", max_new_tokens=32))
shadowllm.evaluate("bundle")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if not (Path(__file__).parent / "models").is_dir():  # git wrote the symbolic links as text files
    raise ImportError(
        "this copy of shadowllm was checked out or built without symbolic links; in the checkout run "
        "`git config core.symlinks true && git checkout -- shadowllm`, then install again"
    )

from shadowllm.errors import UserError

if TYPE_CHECKING:
    from shadowllm.api import evaluate, export, generate, load
    from shadowllm.models.sparsity import Budget
    from shadowllm.runtime.hugging_face import ShadowForCausalLM

    __version__: str
else:
    # Slow imports happen on first access (PEP 562).
    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            found = version("shadowllm")
        elif name == "ShadowForCausalLM":
            from shadowllm.runtime import hugging_face

            found = hugging_face.ShadowForCausalLM
        elif name in __all__:
            from shadowllm import api

            found = getattr(api, name)
        else:
            raise AttributeError(f"module 'shadowllm' has no attribute {name!r}")
        globals()[name] = found
        return found


__all__ = ["Budget", "ShadowForCausalLM", "UserError", "__version__", "evaluate", "export", "generate", "load"]


def __dir__() -> list[str]:
    return sorted(__all__)
