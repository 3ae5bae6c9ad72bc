"""Measures decoding with TensorRT engines and ONNX Runtime's CUDA provider, if they run on this card.

Run as a program, this module is the child process that `measure_shape` starts for each flavour of TensorRT, because
a process can load only one. It builds the engines into the bundle and answers with the contenders' times, or
``{"error": ...}``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from shadowllm.benchmarks.gpu.child import answer
from shadowllm.benchmarks.gpu.decode import Setting, interleaved, spread
from shadowllm.benchmarks.gpu.probe import probe
from shadowllm.child import Progress, module_command, serve
from shadowllm.config import EngineOptions, Flavour
from shadowllm.errors import UserError
from shadowllm.models.sparsity import Budget
from shadowllm.plugins.tensorrt.load_tensorrt import FLAVOURS, gpu_capability
from shadowllm.runtime.session import Decodes, Session

DTYPE = "float16"
TIMEOUT = 3600.0  # seconds to build and measure the engines of a flavour


def measure_shape(shape: str, setting: Setting) -> dict[str, Any]:
    """Measure sparse and dense engines of each flavour, and ``dense.onnx`` on ONNX Runtime, with one random bundle.

    Returns:
        JSON types: per toolkit, its contenders' milliseconds per token and to the first token, or its ``error``,
        a line that names the toolkit.
        Contenders of one toolkit take turns. Toolkits run one after another, to limit the card's memory.
    """
    from shadowllm.benchmarks.shapes import export_random

    with tempfile.TemporaryDirectory() as folder:
        bundle = export_random(shape, Path(folder), "shadow", DTYPE, None, setting.rank)
        found: dict[str, Any] = {"shape": shape, "dtype": DTYPE, "budget": vars(setting.budget)}
        for flavour in FLAVOURS:
            found[flavour] = probe(flavour)
            if found[flavour]["runs"]:
                found[flavour] = in_child(bundle, flavour, setting)
        found["onnxruntime"] = _guarded("onnxruntime", partial(_onnxruntime, bundle, setting))
    return found


def in_child(bundle: Path, flavour: Flavour, setting: Setting) -> dict[str, Any]:
    """Build and time a bundle's engines of one flavour in a child process; JSON as in `measure_shape`."""
    values = {name: getattr(setting, name) for name in ("prompt_len", "new_tokens", "runs")}
    request = {"bundle": str(bundle), "flavour": flavour, "setting": values | {"budget": vars(setting.budget)}}
    return answer(flavour, module_command("shadowllm.benchmarks.gpu.engines"), request, timeout=TIMEOUT)


def _answer(request: dict[str, Any], _: Progress) -> Any:
    """The child's part of `in_child`."""
    bundle, flavour, values = Path(request["bundle"]), request["flavour"], request["setting"]
    os.environ["XDG_CACHE_HOME"] = str(bundle.parent)  # these engines run only once: keep no kernels
    setting = Setting(**values | {"budget": Budget(**values["budget"])})
    return _guarded(flavour, partial(_engines, bundle, flavour, setting))


def _guarded(name: str, work: Callable[[], Any]) -> Any:
    """Run a toolkit; its failure is recorded as a result."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001  # any failure of one toolkit must not lose the others
        return {"error": " ".join(f"{name}: {type(error).__name__}: {error}".split())}


def _engines(bundle: Path, flavour: Flavour, setting: Setting) -> dict[str, Any]:
    from shadowllm.exporter.engines.build import build_engine
    from shadowllm.exporter.engines.graph import describe_onnx
    from shadowllm.exporter.engines.profiles import profiles_for
    from shadowllm.pipeline import build_engines
    from shadowllm.runtime.gpu.trt_session import TrtSession

    sm = gpu_capability()
    if sm is None:
        raise UserError("there is no NVIDIA GPU here to run engines on", "run this on a machine with one")
    sms = (sm,) if flavour == "tensorrt_rtx" else ()
    capacity, longest = _capacity(setting), setting.prompt_len
    build_engines(bundle, EngineOptions(flavour, sms=sms, capacity=capacity, max_seqlen=longest))
    profiles = profiles_for(describe_onnx(bundle / "dense.onnx"), capacity=capacity, max_seqlen=longest)
    target = bundle / "engines" / flavour / "dense.engine"
    build_engine(bundle / "dense.onnx", target, flavour=flavour, profiles=profiles, sms=sms)
    with ExitStack() as stack:
        sparse, dense = (stack.enter_context(TrtSession.open(bundle, flavour, k)) for k in ("sparse", "dense"))
        sparse.set_budget(setting.budget)
        taken = _measured({"sparse": sparse, "dense": dense}, setting)
        return taken | {"memory": {"sparse": vars(sparse.memory), "dense": vars(dense.memory)}}


def _onnxruntime(bundle: Path, setting: Setting) -> dict[str, Any]:
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise UserError(
            f"version {ort.__version__} has no CUDAExecutionProvider",
            "uninstall onnxruntime, then pip install 'shadowllm[onnxruntime-gpu]'",
        )
    with OrtDense(bundle, _capacity(setting), "CUDAExecutionProvider", "cuda") as session:
        return _measured({"dense": session}, setting)


def _measured(sessions: dict[str, Session], setting: Setting) -> dict[str, Any]:
    interleaved(sessions, Setting(setting.prompt_len, setting.new_tokens, 1))  # warm-up
    taken = interleaved(sessions, setting)
    return {
        name: {"ttft_ms": spread([a for a, _ in times]), "ms_per_token": spread([b for _, b in times])}
        for name, times in taken.items()
    }


def _capacity(setting: Setting) -> int:
    return -(-(setting.prompt_len + setting.new_tokens) // 256) * 256


class OrtDense:
    """``dense.onnx`` on a provider of ONNX Runtime, for one sequence; the cache is updated in place on the device.

    Args:
        device: ONNX Runtime's name of the provider's device.
    """

    decodes: Decodes = "dense"
    memory = step_seconds = fired = recomputed = None  # not known

    def __init__(self, bundle: Path, capacity: int, provider: str, device: str) -> None:
        import onnxruntime as ort

        from shadowllm.bundle.manifest import read_manifest

        manifest = read_manifest(bundle)
        self.spec, self._ort, self._device = manifest.spec, ort, device
        self._session = ort.InferenceSession(bundle / "dense.onnx", providers=[provider])
        self._shape = (1, self.spec.n_kv_heads, capacity, self.spec.head_dim)
        self._dtype = {"float16": np.float16, "float32": np.float32}[manifest.dtype]

    def __enter__(self) -> Self:
        self._binding = self._session.io_binding()
        values = [value.name for value in self._session.get_inputs() if value.name.startswith("past_key_values.")]
        self._cache = {
            name: self._ort.OrtValue.ortvalue_from_numpy(np.zeros(self._shape, self._dtype), self._device, 0)
            for name in values
        }
        self._logits = np.zeros((1, 1, self.spec.vocab_size), dtype=np.float32)
        self._binding.bind_ortvalue_output("logits", self._ort.OrtValue.ortvalue_from_numpy(self._logits))
        for name, value in self._cache.items():
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        self._cache.clear()
        del self._binding, self._session

    def reset(self, batch: int = 1) -> None:
        """See `Session.reset`."""
        assert batch == 1
        self._length = 0

    def set_budget(self, budget: Any) -> None:
        """Do nothing: a dense session has no budget."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """See `Session.prefill`."""
        return self._run(np.array(prompts, dtype=np.int64))

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """See `Session.decode`."""
        return self._run(tokens[:, None].astype(np.int64))

    def decode_greedy(self, tokens: np.ndarray, steps: int) -> None:
        """Return None; see `Session.decode_greedy`."""

    def _run(self, ids: np.ndarray) -> np.ndarray:
        seqlen = ids.shape[1]
        positions = np.arange(self._length, self._length + seqlen, dtype=np.int64)[None]
        inputs = {"input_ids": ids, "position_ids": positions, "logits_to_keep": np.array([[seqlen - 1]])}
        for name, array in inputs.items():
            self._binding.bind_cpu_input(name, array)
        self._session.run_with_iobinding(self._binding)
        self._binding.synchronize_outputs()
        self._length += seqlen
        return self._logits[:, 0]


if __name__ == "__main__":
    sys.exit(serve(_answer))
