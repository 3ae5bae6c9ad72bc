"""Measures the cost of an export: seconds, and peak memory relative to the size of the weights. Then decodes a little.

    python -m shadowllm.benchmarks.export_cost smollm2.gguf
    python -m shadowllm.benchmarks.export_cost smollm2.gguf --complete
    python -m shadowllm.benchmarks.export_cost --shape qwen3-0.6b --complete --tokenizer out/noisy
    python -m shadowllm.benchmarks.export_cost --shape opt-1.3b --dtype fp16 --json cost.json
    python -m shadowllm.benchmarks.export_cost --shape relullama-7b mistral-7b --dtype fp16 --engine tensorrt_rtx

The export runs in a child process, without validation and with a random ranking, so that it only writes the bundle.
With --complete it calibrates, trains and chooses budgets too. (Validation runs in another process, and holds the model
twice.) With --engine another export of the same model builds an engine too; if that is refused, the results give the
reason. The peak is the resident set size of the child, with everything: libraries, and pages of mapped files that the
system could drop. The models of `random_model.PUBLISHED` have the published sizes, and fewer layers.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shadowllm.benchmarks.random_model import PUBLISHED, SHAPES, TINY_SHAPES, write_random_model
from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.errors import UserError
from shadowllm.evaluation.speed.environment import environment
from shadowllm.models.files.tokenizer import load_tokenizer
from shadowllm.plugins.tensorrt.load_tensorrt import FLAVOURS

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
NEW_TOKENS = 8
SMALL = "tiny-llama"
RANDOM = ("--selector", "random")
REFUSAL = "shadowllm: error: "  # how the message of a user's error starts; a bug has a traceback
# The child reports its own peak. The system's figure for a child includes the peak of its parent, and this process has
# made a random model.
EXPORT = """
import resource
import sys
from shadowllm.cli import main
from shadowllm.evaluation.speed.worker import peak_rss_mb
status = main()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6, peak_rss_mb())
sys.exit(status)
"""


def measure_libraries(dtype: str) -> float:
    """Return the peak RSS, in 1e6 bytes, of the export of a model of a few kilobytes."""
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / SMALL
        small.mkdir()
        write_random_model(SMALL, small)
        return export(str(small), Path(folder) / "bundle", "--dtype", dtype, *RANDOM)[0]


def measure(model: str, libraries: float, dtype: str = "fp32", complete: bool = False) -> dict[str, Any]:
    """Export ``model`` to a temporary folder.

    Args:
        libraries: what `measure_libraries` gives.
        complete: also calibrate, train a predictor and choose budgets.

    Returns:
        ``seconds`` (wall, interpreter start included), ``peak_rss_mb``, ``weights_mb`` (parameters in
        ``dtype``), their ratio ``peak_over_weights``, ``libraries_mb``, ``rest_over_weights`` (the ratio without
        them), and ``decoded``, the number of tokens that the bundle wrote.

    Raises:
        UserError: the export failed; its message is on stderr.
    """
    import shadowllm
    from shadowllm.bundle.manifest import read_manifest

    how = ("--dtype", dtype, *(() if complete else RANDOM))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        start = time.perf_counter()
        peak, _ = export(model, out, *how)
        seconds = time.perf_counter() - start
        weights = read_manifest(out).spec.n_parameters * ITEMSIZE[dtype] / 1e6
        with shadowllm.load(out) as opened:
            decoded = len(shadowllm.generate(opened, [3, 4, 5], max_new_tokens=NEW_TOKENS))
    return {
        "model": Path(model).name,
        "dtype": dtype,
        "complete": complete,
        "seconds": seconds,
        "peak_rss_mb": peak,
        "libraries_mb": libraries,
        "weights_mb": weights,
        "peak_over_weights": peak / weights,
        "rest_over_weights": (peak - libraries) / weights,
        "decoded": decoded,
    }


def measure_engine(model: str, dtype: str, engine: str, sm: str) -> dict[str, Any]:
    """Export ``model`` to a temporary folder, with an engine.

    Returns:
        ``flavour``, ``sm``, and either ``refused`` (the message) or ``seconds`` of the whole export, ``peak_rss_mb`` of
        its process, ``builder_peak_rss_mb`` of the process that builds an engine, and ``engines_mb``.
    """
    found: dict[str, Any] = {"flavour": engine, "sm": sm}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        start = time.perf_counter()
        try:
            options = ("--dtype", dtype, *RANDOM, "--engine", engine, "--sm", sm)
            peak, builder = export(model, out, *options, stderr=subprocess.PIPE)
        except UserError as error:
            if REFUSAL not in error.problem:
                raise
            return found | {"refused": error.problem}
        files = [path for path in (out / "engines").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        found |= {"seconds": time.perf_counter() - start, "peak_rss_mb": peak, "builder_peak_rss_mb": builder}
        return found | {"engines_mb": size}


def export(model: str, out: Path, *options: str, stderr: int | None = None) -> tuple[float, float]:
    """Export ``model`` in a child process; return its peak RSS, and the largest of its own children, in 1e6 bytes.

    That of a child is at least what its parent had when it started the child.

    Args:
        stderr: `subprocess.PIPE` to have the child's messages in the error. By default they are shown, with its
            progress.

    Raises:
        UserError: the export failed.
    """
    command = [sys.executable, "-P", "-c", EXPORT, "export", model, str(out), "--skip-validation", *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
    if done.returncode:
        told = f": {done.stderr.strip()}" if done.stderr else ""
        raise UserError(f"the export of {Path(model).name} failed{told}", "see its message")
    children, own = map(float, done.stdout.split()[-2:])
    return own, children


@script
def main() -> None:
    """Parse, measure, print."""
    parser = script_parser("export_cost", __doc__)
    parser.add_argument("model", nargs="?", help="folder, .gguf file or Hugging Face id")
    shapes = SHAPES | PUBLISHED | TINY_SHAPES
    parser.add_argument("--shape", nargs="+", choices=shapes, help="measure random models of these shapes instead")
    parser.add_argument("--complete", action="store_true", help="also calibrate, train and choose budgets")
    parser.add_argument("--tokenizer", metavar="DIR", help="give random models this folder's, so that --complete works")
    parser.add_argument("--dtype", choices=tuple(ITEMSIZE), default="fp32")
    parser.add_argument("--engine", choices=FLAVOURS, help="also build an engine, in another export")
    parser.add_argument("--sm", default="89", help="compute capability that the engine is for (default: %(default)s)")
    add_json(parser)
    args = parser.parse_args()
    if bool(args.model) == bool(args.shape):
        parser.error("give a model or --shape")
    results, libraries = [], measure_libraries(args.dtype)
    for model in args.shape or [args.model]:
        with tempfile.TemporaryDirectory() as folder:
            path = model
            if args.shape:
                path = str(Path(folder) / model)
                Path(path).mkdir()
                write_random_model(model, Path(path))
                if args.tokenizer:
                    load_tokenizer(Path(args.tokenizer), None, False).save_pretrained(path)
            found = measure(path, libraries, args.dtype, args.complete)
            if args.engine:
                found["engine"] = measure_engine(path, args.dtype, args.engine, args.sm)
        show(found)
        results.append(found)
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=2) + "\n")


def show(found: dict[str, Any]) -> None:
    """Print a line about an export, and one about its engine."""
    print(
        f"{found['model']} {found['dtype']}: {found['seconds']:.1f} s, peak {found['peak_rss_mb']:.0f} MB "
        f"= {found['peak_over_weights']:.2f} x {found['weights_mb']:.0f} MB of weights, or "
        f"{found['rest_over_weights']:.2f} x without the {found['libraries_mb']:.0f} MB of the libraries; "
        f"{found['decoded']} tokens decoded"
    )
    engine = found.get("engine")
    if engine and "refused" in engine:
        print(f"  {engine['flavour']}: {engine['refused']}")
    elif engine:
        print(
            f"  {engine['flavour']}, sm_{engine['sm']}: {engine['engines_mb']:.0f} MB; with it the export takes "
            f"{engine['seconds']:.1f} s, peak {engine['peak_rss_mb']:.0f} MB, and the builder's process "
            f"{engine['builder_peak_rss_mb']:.0f} MB"
        )


if __name__ == "__main__":
    sys.exit(main())
