"""Checks whether TensorRT runs an engine on this card, in a child process, because a refusal may be a crash.

    echo '"tensorrt_rtx"' | python -m shadowllm.benchmarks.gpu.probe

The command builds an engine of one node, deserialises and runs it, and prints JSON with
``{"version": ..., "runs": true}`` as the ``result``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from shadowllm.benchmarks.gpu.child import answer
from shadowllm.child import module_command, serve

MODULE = "shadowllm.benchmarks.gpu.probe"


def probe(flavour: str, timeout: float = 300) -> dict[str, Any]:
    """The result of the child process: ``runs``, and ``version`` or the exact ``error``."""
    if importlib.util.find_spec(flavour) is None:
        return {"runs": False, "error": f"{flavour} is not installed"}
    return {"runs": False} | answer(flavour, module_command(MODULE), flavour, timeout=timeout)


def run_one(flavour: str) -> dict[str, Any]:
    """Build, deserialise and run the negation of a vector.

    Raises:
        RuntimeError: TensorRT refuses; the message has everything that it logged.
    """
    import torch

    trt: Any = importlib.import_module(flavour)
    logged: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.WARNING:
                logged.append(message)

    def need(value: Any, what: str) -> Any:
        if not value:
            raise RuntimeError(f"{what} failed: {' | '.join(logged)}")
        return value

    logger = Logger()
    builder = need(trt.Builder(logger), "making a builder")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    layer = network.add_unary(network.add_input("x", trt.float32, (8,)), trt.UnaryOperation.NEG)
    layer.get_output(0).name = "y"
    network.mark_output(layer.get_output(0))
    serialised = need(builder.build_serialized_network(network, builder.create_builder_config()), "building")
    engine = need(trt.Runtime(logger).deserialize_cuda_engine(serialised), "deserialising")
    context = need(engine.create_execution_context(), "making a context")
    x = torch.arange(8, dtype=torch.float32, device="cuda")
    y = torch.zeros_like(x)
    for name, tensor in (("x", x), ("y", y)):
        need(context.set_tensor_address(name, tensor.data_ptr()), f"binding {name}")
    need(context.execute_async_v3(torch.cuda.current_stream().cuda_stream), "running")
    torch.cuda.synchronize()
    return {"version": trt.__version__, "runs": torch.equal(y, -x)}


if __name__ == "__main__":
    sys.exit(serve(lambda flavour, _: run_one(flavour)))
