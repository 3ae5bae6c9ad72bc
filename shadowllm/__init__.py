"""Contextual sparsity for OPT and Llama: predictor, sparse ONNX export, TensorRT engines, runtime."""

from importlib.metadata import version
from pathlib import Path

if not (Path(__file__).parent / "models").is_dir():  # git wrote the links to the rooms as text files
    raise ImportError(
        "this copy of shadowllm was checked out or built without symbolic links; in the checkout run "
        "`git config core.symlinks true && git checkout -- shadowllm`, then install again"
    )

from shadowllm.errors import UserError

__version__ = version("shadowllm")
__all__ = ["UserError", "__version__"]
