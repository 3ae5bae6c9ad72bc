"""Measures how often a shortlist of the output table has the largest logit, and what its proof costs.

    python -m shadowllm.benchmarks.shortlist out/frontier/float32 --text wikitext-2-valid.txt

For each length of the shortlist: the share of positions whose largest logit is that of the whole table without a
certificate, and how many rows the certificate recomputes, with the weighting of the bundle and with one that is
calibrated on the first half of the tokens. Hidden states are those of the dense model. "session" is the same from a
sparse session of ONNX Runtime with all neurons and heads at full precision, decoding with the certificate.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.bundle.certificate import best_weighting, copy_errors
from shadowllm.bundle.manifest import read_manifest
from shadowllm.bundle.quantised_tensors import mean_square_errors
from shadowllm.bundle.weight_names import copy_weighting, integers, low_bit_copy, scales
from shadowllm.bundle.weights import map_copies, read_weights
from shadowllm.errors import UserError
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.speed.environment import environment
from shadowllm.models.decoder import Decoder
from shadowllm.models.sparsity import Budget
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.recomputed_rows import RecomputedRows

LENGTHS = (64, 256, 1024)
WINDOW = 512


@torch.no_grad()
def measure(bundle: Path, texts: Sequence[Path], tokens: int) -> list[dict[str, Any]]:
    """Return a row for each length of the shortlist.

    Raises:
        UserError: there is no bundle, it has no copy of the output table, or the text is too short.
    """
    manifest = read_manifest(bundle)
    if manifest.rest != "shadow":
        raise UserError(f"{bundle} has no low-bit copy of the output table", "export with --rest shadow")
    read, stored, table = read_weights(bundle, manifest), map_copies(bundle, manifest), manifest.spec.output_table
    encode = plain_encoder(load_tokenizer(bundle, manifest), manifest)
    ids = list(encode("\n".join(map(Path.read_text, texts)))) if texts else passage(encode, 2 * tokens)
    if len(ids) < 2 * tokens:
        raise UserError(f"the text has {len(ids)} tokens, {2 * tokens} are needed", "give more text or fewer tokens")
    decoder = Decoder(manifest.spec, read.dense)
    halves = [_windows(half, manifest.spec.max_seqlen) for half in (ids[:tokens], ids[tokens : 2 * tokens])]
    calibration, evaluated = (torch.cat([_final_hidden(decoder, window) for window in half]) for half in halves)
    copy = stored[integers(low_bit_copy(table))].view(len(read.sparse[table]), -1, 32).numpy()
    rows = read.sparse[table]
    weightings = {
        "bundle": stored[copy_weighting(table)].numpy(),
        "calibrated": best_weighting(
            calibration.square().mean(dim=0).numpy(), mean_square_errors(rows.numpy(), manifest.quantisation)
        ),
    }
    assert read.copies is not None
    exact, low = evaluated @ rows.T, evaluated @ read.copies[table].T
    bounds = {
        name: np.linalg.norm(evaluated.numpy() * weighting, axis=1)[:, None]
        * copy_errors(rows.numpy(), copy, stored[scales(low_bit_copy(table))].numpy(), weighting)
        for name, weighting in weightings.items()
    }
    lengths = [min(length, len(rows)) for length in LENGTHS]
    sessions = with_session(bundle, [window[0].tolist() for window in halves[1]], lengths)
    return [_row(exact, low, bounds, length) | {"session": sessions[length]} for length in lengths]


def with_session(bundle: Path, windows: Sequence[Sequence[int]], lengths: Sequence[int]) -> dict[int, dict[str, float]]:
    """Decode windows with certified shortlists.

    Returns:
        For each length: ``argmax_agreement`` with all rows exact, and the figures of `RecomputedRows.summary`.
    """
    found = {}
    with OrtSession(bundle, "sparse") as session:
        whole, _ = _decoded(session, windows, Budget())
        for length in dict.fromkeys(lengths):
            tokens, rows = _decoded(session, windows, Budget(shortlist=length, certify=True))
            found[length] = {"argmax_agreement": float((tokens == whole).mean())} | rows.summary()
    return found


def _decoded(
    session: OrtSession, windows: Sequence[Sequence[int]], budget: Budget
) -> tuple[np.ndarray, RecomputedRows]:
    """The most probable token after each token of the windows but the first, and the rows computed for it."""
    session.set_budget(budget)
    tokens, rows = [], RecomputedRows(budget)
    for window in windows:
        session.reset()
        session.prefill([window[:1]])
        for token in window[1:]:
            tokens.append(int(session.decode(np.array([token]))[0].argmax()))
            rows.add(session.recomputed)
    return np.array(tokens), rows


def _windows(ids: Sequence[int], longest: int) -> list[Tensor]:
    return list(torch.tensor(ids)[None].split(min(WINDOW, longest), dim=1))


def _final_hidden(decoder: Decoder, window: Tensor) -> Tensor:
    """The input of the output table, ``(seqlen, hidden_size)``."""
    positions = torch.arange(window.shape[1])[None]
    x = decoder.embed(window, positions)
    for layer in range(decoder.spec.n_layers):
        x = decoder.layer(layer, x, positions)
    return decoder.final_hidden(x)[0]


def _row(exact: Tensor, low: Tensor, bounds: Mapping[str, np.ndarray], length: int) -> dict[str, Any]:
    listed = low.topk(length, dim=1).indices
    largest = exact.gather(1, listed).amax(dim=1)
    found: dict[str, Any] = {
        "shortlist": length,
        "copy_alone": float((low.argmax(dim=1) == exact.argmax(dim=1)).float().mean()),
        "argmax_agreement": float((largest >= exact.amax(dim=1)).float().mean()),
        "positions": len(exact),
    }
    for name, bound in bounds.items():
        doubtful = low.numpy() + bound >= largest.numpy()[:, None]
        np.put_along_axis(doubtful, listed.numpy(), values=True, axis=1)
        counts = doubtful.sum(axis=1)
        found[f"recomputed_{name}"] = {
            "mean": float(counts.mean()),
            "median": float(np.median(counts)),
            "p99": float(np.percentile(counts, 99)),
        }
    return found


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = script_parser("shortlist", __doc__)
    parser.add_argument("bundle", type=Path, help="a bundle with a low-bit copy of the output table")
    parser.add_argument("--text", nargs="+", type=Path, default=(), help="default: documentation of Python modules")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of each half of the text")
    add_json(parser)
    args = parser.parse_args(arguments)
    rows = measure(args.bundle, args.text, args.tokens)
    for row in rows:
        print(json.dumps(row))
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
