"""Measures the cost of an export: seconds, and peak memory relative to the size of the weights. Then decodes a little.

    python -m shadowllm.benchmarks.export_cost smollm2.gguf
    python -m shadowllm.benchmarks.export_cost --shape opt-1.3b --dtype fp16 --json cost.json
    python -m shadowllm.benchmarks.export_cost --shape mistral-7b

The export runs in a child process, without validation and with a random ranking, so that it only writes
the bundle. (Validation runs in another process, and holds the model twice.) The models of `random_model.PUBLISHED` have
the published sizes and two layers.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shadowllm.benchmarks.random_model import PUBLISHED, SHAPES, TINY_SHAPES, write_random_model
from shadowllm.benchmarks.script_parser import script, script_parser
from shadowllm.errors import UserError
from shadowllm.evaluation.speed.environment import environment

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
NEW_TOKENS = 8


def measure(model: str, dtype: str = "fp32") -> dict[str, Any]:
    """Export ``model`` to a temporary folder.

    Returns:
        ``seconds`` (wall, interpreter start included), ``peak_rss_mb``, ``weights_mb`` (parameters in
        ``dtype``), their ratio ``peak_over_weights``, and ``decoded``, the number of tokens that the bundle wrote.

    Raises:
        UserError: the export failed; its message is on stderr.
    """
    import shadowllm
    from shadowllm.bundle.manifest import read_manifest

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bundle"
        command = [
            sys.executable,
            "-P",
            "-m",
            "shadowllm.cli",
            "export",
            model,
            str(out),
            "--selector",
            "random",
            "--skip-validation",
            "--dtype",
            dtype,
        ]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            raise UserError(f"the export of {model} failed", "see its message above")
        # Linux reports ru_maxrss in KiB. The export is the largest child process so far.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        weights = read_manifest(out).spec.n_parameters * ITEMSIZE[dtype]
        with shadowllm.load(out) as opened:
            decoded = len(shadowllm.generate(opened, [3, 4, 5], max_new_tokens=NEW_TOKENS))
    return {
        "model": Path(model).name,
        "dtype": dtype,
        "seconds": seconds,
        "peak_rss_mb": peak / 1e6,
        "weights_mb": weights / 1e6,
        "peak_over_weights": peak / weights,
        "decoded": decoded,
    }


@script
def main() -> None:
    """Parse, measure, print."""
    parser = script_parser("export_cost", __doc__)
    parser.add_argument("model", nargs="?", help="folder, .gguf file or Hugging Face id")
    shapes = SHAPES | PUBLISHED | TINY_SHAPES
    parser.add_argument("--shape", choices=shapes, help="measure a random model of this shape instead")
    parser.add_argument("--dtype", choices=tuple(ITEMSIZE), default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to this file")
    args = parser.parse_args()
    if bool(args.model) == bool(args.shape):
        parser.error("give a model or --shape")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if args.shape:
            model = str(Path(folder) / args.shape)
            Path(model).mkdir()
            write_random_model(args.shape, Path(model))
        found = measure(model, args.dtype)
    print(
        f"{found['model']} {found['dtype']}: {found['seconds']:.1f} s, peak {found['peak_rss_mb']:.0f} MB "
        f"= {found['peak_over_weights']:.2f} x {found['weights_mb']:.0f} MB of weights; "
        f"{found['decoded']} tokens decoded"
    )
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "results": [found]}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
