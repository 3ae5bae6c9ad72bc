"""Checks that gate-first decoding gives the dense model's logits, and measures it beside ONNX Runtime dense.

    python -m shadowllm.benchmarks.small_model MODEL out/relu-llama --family llama --vocab-size 4096
    shadowllm export out/relu-llama out/gate-first --selector relu
    python -m shadowllm.benchmarks.gate_first out/gate-first --json gate-first.json

The text is the documentation that `small_model` is not trained on.

Activation sparsity: the share of the neurons of each layer whose gate is exactly 0, measured with PyTorch.

Logits: the dense session continues prompts greedily, and the sparse one gets its tokens. So if the most probable token
is the same at all places, the texts are the same.

Speed and bytes per token: those of `shadowllm bench`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.bundle.manifest import Manifest, read_manifest
from shadowllm.bundle.weights import read_weights
from shadowllm.errors import UserError
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.speed.bench import bench
from shadowllm.models.sparsity import SparseLayers
from shadowllm.predictor.silence import TOKENS, fired_shares
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
from shadowllm.runtime.ort.session import OrtSession

WINDOW = 256  # tokens in a text whose activation sparsity is measured
# Of the largest logit. The order of float32 sums changes less than this.
TOLERANCE = 1e-4


def measure_silence(bundle: Path, tokens: int = TOKENS) -> list[float]:
    """Return the share of neurons whose gate is exactly 0, for each layer, dense layers included.

    Args:
        tokens: tokens of text, rounded down to whole windows.
    """
    manifest = read_manifest(bundle)
    window = min(WINDOW, manifest.spec.max_seqlen)
    windows = torch.tensor(_passage(bundle, manifest, tokens // window * window)).view(-1, window)
    fired = fired_shares(SparseLayers(manifest.spec, 0), read_weights(bundle, manifest).dense, windows)
    return [1 - share for share in fired]


def compare_logits(
    bundle: Path, prompts: int = 10, new_tokens: int = 64, prompt_len: int = 64, threads: int | None = None
) -> dict[str, Any]:
    """Compare the logits of gate-first and dense steps.

    Returns:
        ``prompts``; ``tokens``, the number of steps compared; ``same_tokens``, at how many the most probable token is
        the same; ``largest_difference`` of two logits; ``largest_logit`` of the dense steps, by absolute value.
    """
    ids = _passage(bundle, read_manifest(bundle), prompts * prompt_len)
    same, difference, largest = 0, 0.0, 0.0
    with OrtSession(bundle, "sparse", threads) as sparse, OrtSession(bundle, "dense", threads) as dense:
        for start in range(0, len(ids), prompt_len):
            logits = []
            for session in (sparse, dense):
                session.reset(1)
                logits.append(session.prefill([ids[start : start + prompt_len]])[0])
            for _ in range(new_tokens):
                token = np.array([logits[1].argmax()])
                logits = [session.decode(token)[0] for session in (sparse, dense)]
                same += int(logits[0].argmax() == logits[1].argmax())
                difference = max(difference, float(np.abs(logits[0] - logits[1]).max()))
                largest = max(largest, float(np.abs(logits[1]).max()))
    return {
        "prompts": prompts,
        "tokens": prompts * new_tokens,
        "same_tokens": same,
        "largest_difference": difference,
        "largest_logit": largest,
    }


def _passage(bundle: Path, manifest: Manifest, length: int) -> list[int]:
    return passage(plain_encoder(load_tokenizer(bundle, manifest), manifest), length)


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("gate_first", __doc__)
    parser.add_argument("bundle", type=Path, help="a bundle with the selector relu")
    parser.add_argument("--prompts", type=int, default=10, help="number of texts whose logits are compared")
    parser.add_argument("--prompt-len", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens of each continuation")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    add_json(parser)
    args = parser.parse_args(arguments)
    manifest = read_manifest(args.bundle)
    if manifest.predictor["kind"] != "relu":
        raise UserError(f"{args.bundle} has another selector than relu", "export the model with --selector relu")
    silence = measure_silence(args.bundle)
    print("neurons whose gate is 0, by layer:", ", ".join(f"{share:.1%}" for share in silence))
    sizes = {"prompt_len": args.prompt_len, "new_tokens": args.new_tokens, "threads": args.threads}
    found = compare_logits(args.bundle, args.prompts, **sizes)
    print(f"{found['same_tokens']} of {found['tokens']} tokens are the same; ", end="")
    print(f"logits differ by up to {found['largest_difference']:.1e}, and are up to {found['largest_logit']:.1f}")
    report = bench(args.bundle, runs=args.runs, quality_tokens=args.new_tokens, **sizes)
    report.print(Console())
    if args.json:
        record = {"silence": silence, "logits": found, **report.to_dict()}
        args.json.write_text(json.dumps(record, indent=2) + "\n")
    if found["largest_difference"] > TOLERANCE * found["largest_logit"]:
        raise UserError("the logits are not those of the dense model", "report this with the JSON of --json")


if __name__ == "__main__":
    sys.exit(main())
