"""What an export costs: seconds and peak memory against the size of the weights.

    python -m shadowllm.benchmarks.export_cost smollm2.gguf
    python -m shadowllm.benchmarks.export_cost --opt-1.3b --dtype fp16 --json cost.json

The export runs in a process of its own without validation (which runs in another one, and holds
the model twice) and with a random ranking, so that writing the bundle is all it does.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shadowllm.benchmarks.environment import environment
from shadowllm.errors import UserError

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


def measure(model: str, dtype: str = "fp32") -> dict[str, Any]:
    """Export ``model`` to a temporary folder.

    Returns:
        ``seconds`` (wall, interpreter start included), ``peak_rss_mb``, ``weights_mb`` (parameters in
        ``dtype``) and their quotient ``peak_over_weights``.

    Raises:
        UserError: the export failed; its own message stands on stderr.
    """
    from shadowllm.exporter.manifest import read_manifest

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
        # Linux counts ru_maxrss in KiB; the export is the largest child this process ever had.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        weights = read_manifest(out).spec.n_parameters * ITEMSIZE[dtype]
    return {
        "model": Path(model).name,
        "dtype": dtype,
        "seconds": seconds,
        "peak_rss_mb": peak / 1e6,
        "weights_mb": weights / 1e6,
        "peak_over_weights": peak / weights,
    }


def write_opt_1_3b(folder: Path) -> None:
    """A checkpoint of OPT-1.3B's shape with random float16 weights, in shards, written tensor by tensor."""
    import torch
    from safetensors.torch import save_file
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=2048,
        ffn_dim=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        word_embed_proj_dim=2048,
        max_position_embeddings=2048,
        dtype="float16",
    )
    with torch.device("meta"):
        shapes = {
            name: value.shape for name, value in OPTForCausalLM(config).state_dict().items() if name != "lm_head.weight"
        }
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    names = list(shapes)
    for number, part in enumerate(names[i : i + 64] for i in range(0, len(names), 64)):
        file = f"model-{number:05d}.safetensors"
        save_file(
            {name: torch.randn(shapes[name], generator=generator).mul_(0.02).half() for name in part}, folder / file
        )
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder, .gguf file or Hugging Face id")
    parser.add_argument(
        "--opt-1.3b", dest="opt", action="store_true", help="measure a random model of OPT-1.3B's shape instead"
    )
    parser.add_argument("--dtype", choices=tuple(ITEMSIZE), default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    if bool(args.model) == args.opt:
        parser.error("give a model or --opt-1.3b")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if args.opt:
            model = str(Path(folder) / "opt-1.3b-shape")
            Path(model).mkdir()
            write_opt_1_3b(Path(model))
        found = measure(model, args.dtype)
    print(
        f"{found['model']} {found['dtype']}: {found['seconds']:.1f} s, peak {found['peak_rss_mb']:.0f} MB "
        f"= {found['peak_over_weights']:.2f} x {found['weights_mb']:.0f} MB of weights"
    )
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "results": [found]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
