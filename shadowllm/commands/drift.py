"""``shadowllm drift``"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from shadowllm.commands import options
from shadowllm.errors import UserError

EPILOG = """examples:
  shadowllm drift out/ --text served.txt
  shadowllm drift out/ --text served.txt --tokens 4096 --json

Recall is the share of the truly important heads and neurons that were active. If it is clearly lower on
your text than on text like the calibration's, export again with your text as --calibration-text.

The start of a file that the predictor was calibrated on is left out. Files are known by their names."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("bundle", type=Path, metavar="OUT", help="bundle to check")
    parser.add_argument("--text", nargs="+", required=True, metavar="FILE", help="text as the bundle will serve it")
    parser.add_argument(
        "--calibration-text",
        nargs="+",
        default=(),
        metavar="FILE",
        help="text like the calibration's, or its files; needed if it was not the built-in text",
    )
    options.add_whole(parser, "--tokens", default=1024, metavar="N", help="tokens of each text (default: 1024)")
    options.add_whole(
        parser,
        "--seqlen",
        least=2,
        default=128,
        metavar="N",
        help="tokens per window (default: 128)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    """Decode both texts and print how well each was predicted."""
    from dataclasses import asdict

    from shadowllm.bundle.manifest import read_manifest
    from shadowllm.bundle.weights import read_weights
    from shadowllm.evaluation.drift import runtime_recall
    from shadowllm.predictor.calibration import BUILT_IN, measuring_windows, token_windows, used_tokens
    from shadowllm.progress import progress
    from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
    from shadowllm.runtime.ort.session import OrtSession

    manifest = read_manifest(args.bundle)
    record = manifest.predictor
    source = record.get("text", BUILT_IN)
    if not (args.calibration_text or source.endswith(BUILT_IN)):
        raise UserError(f"the predictor was calibrated on {source}", "give text like it with --calibration-text")
    encode = plain_encoder(load_tokenizer(args.bundle, manifest), manifest)
    seqlen = min(args.seqlen, manifest.spec.max_seqlen)
    served = token_windows(args.text, encode, seqlen, max(1, args.tokens // seqlen), used_tokens(record, args.text))
    weights = dict(read_weights(args.bundle, manifest).sparse)
    like = measuring_windows(
        manifest.spec, weights, encode, record, texts=args.calibration_text, tokens=args.tokens, seqlen=seqlen
    )
    found = {}
    with OrtSession(args.bundle, "sparse") as session:
        for name, windows in (("text", served), ("calibration", like)):
            with progress(f"Decoding ({name})", len(windows) * (seqlen // 2)) as advance:
                found[name] = asdict(runtime_recall(session, weights, windows, advance=advance))
    if args.json:
        print(json.dumps(found, indent=2))
        return
    for name, recall in found.items():
        print(
            f"{name:12} {recall['tokens']} tokens: {recall['heads']:.1%} of the important heads "
            f"(chance {recall['expected_heads']:.1%}), {recall['neurons']:.1%} of the neurons "
            f"(chance {recall['expected_neurons']:.1%})"
        )
