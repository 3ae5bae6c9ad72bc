"""``shadowllm inspect``"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shadowllm.commands.describe import describe
from shadowllm.models.sparsity import describe_fractions
from shadowllm.predictor.network_options import NETWORKS

EPILOG = """examples:
  shadowllm inspect out/                                        # a bundle: sizes, budgets, validation, engines
  shadowllm inspect out/body.onnx                               # a graph, and what an engine build needs
  shadowllm inspect out/engines/tensorrt_rtx/body.engine        # plugins per layer, targets, profiles
  shadowllm inspect predictor.safetensors --json                # everything

The text is a summary; --json leaves nothing out."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("path", type=Path, metavar="PATH", help="bundle, .onnx, .engine or predictor .safetensors")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> None:
    """Describe the file or bundle at the path."""
    if args.json:
        print(json.dumps(describe(args.path)[1], indent=2))
    else:
        show(args.path)


def show(path: Path) -> None:
    """Print a summary of the file or bundle at the path."""
    from rich.console import Console

    kind, found = describe(path)
    summarise = {"bundle": _bundle, "onnx": _onnx, "engine": _engine, "predictor": _predictor}[kind]
    console = Console(soft_wrap=True, markup=False, highlight=False)
    console.print(f"{kind} {path}")
    for label, text in summarise(found):
        console.print(f"  {label + ':':<14}{text}")


Lines = list[tuple[str, str]]


def _bundle(found: dict[str, Any]) -> Lines:
    spec = found["spec"]
    lines = [
        (
            "model",
            f"{found['model']} ({spec['family']}, {found['parameters'] / 1e6:.0f} M parameters, {found['dtype']})",
        ),
        (
            "layers",
            f"{spec['n_layers']}, of which the first {found['dense_layers']} dense; "
            f"{spec['n_heads']} heads over {spec['n_kv_heads']} KV heads, {spec['intermediate_size']} neurons"
            + (", heads chosen in KV groups" if spec["head_unit"] == "kv_group" else ""),
        ),
        ("budget", _budget(found["budgets"], found["rest"])),
        *([("tuned", _tuned(found["allocation"]))] if found["allocation"] else []),
        *([("drafts", _drafts(found["drafting"], found["rest"]))] if found["drafting"] else []),
        *([("dense", _layers({f"layer {n}": [why] for n, why in found["dense"].items()}))] if found["dense"] else []),
        ("predictor", _trained(found["predictor"])),
        ("validation", _validation(found["validation"])),
        ("transformers", _transformers(found["validation"])),
        *([("adapter", f"SHA-256 {found['adapter_fingerprint']}")] if found["adapter_fingerprint"] else []),
        ("files", ", ".join(f"{name} {_size(size)}" for name, size in found["files"].items() if size > 4096)),
    ]
    for name, engine in found["engines"].items():
        lines.append(("engine", f"{name} {_size(engine['bytes'])}, {_targets(engine)}; plugins: {_counts(engine)}"))
    return lines


def _budget(budgets: dict[str, Any], rest: str) -> str:
    parts = [f"{describe_fractions(budgets['neurons'])} of neurons, {describe_fractions(budgets['heads'])} of heads"]
    if budgets.get("shortlist"):
        parts.append(f"{budgets['shortlist']} rows of the output table")
    if (budgets.get("rest") or rest) == "shadow":
        parts.append("the rest from the low-bit copy")
    return ", ".join(parts)


def _tuned(allocation: dict[str, Any]) -> str:
    words = {"ppl_increase": "perplexity {:+.1%}", "speedup": "{:.2f} times as fast as dense"}

    def said(figures: dict[str, float]) -> str:
        return ", ".join(words[name].format(value) for name, value in figures.items())

    return f"for {said(allocation['target'])}; measured {said(allocation['measured'])}"


def _drafts(drafting: dict[str, Any], rest: str) -> str:
    measured = drafting["measured"]
    return (
        f"{drafting['draft_length']} tokens with {_budget(drafting['budget'], rest)}; measured acceptance "
        f"{measured['acceptance']:.0%}, {measured['speedup']:.2f} times as fast as dense"
    )


def _onnx(found: dict[str, Any]) -> Lines:
    def ports(tensors: dict[str, list[Any]]) -> str:
        shown = {name: f"{dtype} {shape}" for name, (dtype, *shape) in tensors.items()}
        caches = [name for name in shown if name.startswith(("past_key_values", "present"))]
        text = ", ".join(f"{name} {kind}" for name, kind in shown.items() if name not in caches)
        more = f"{len(caches)} x {caches[0].split('.')[0]}.N.key/value {shown[caches[0]]}" if caches else ""
        return ", ".join(filter(None, (text, more)))

    return [
        ("graph", f"{found['graph']}, opset {found['opset']}, {sum(found['ops'].values())} nodes"),
        ("weights", f"{_size(found['weight_bytes'])} in {', '.join(found['data_files']) or 'the file itself'}"),
        ("inputs", ports(found["inputs"])),
        ("outputs", ports(found["outputs"])),
        ("plugins", _layers(found["plugins"])),
        ("ops", ", ".join(f"{name} x{count}" for name, count in found["ops"].items())),
    ]


def _engine(found: dict[str, Any]) -> Lines:
    return [
        ("TensorRT", f"{found['flavour']} {found['version']}, built in {found['build_seconds']} s"),
        ("size", _size(found["bytes"])),
        ("targets", _targets(found)),
        ("plugins", f"{_layers(found['plugins'])}; in all: {_counts(found)}"),
        ("kernels", _kernels(found["kernels"])),
        *((f"profile {i}", f"{profile['name']}: {_range(profile)}") for i, profile in enumerate(found["profiles"])),
    ]


def _predictor(found: dict[str, Any]) -> Lines:
    return [
        ("kind", _trained({"kind": found["kind"], "rank": found["rank"], **found["record"]})),
        ("size", f"{found['parameters'] / 1e6:.2f} M parameters for {found['n_sparse']} sparse layers"),
        ("made for", f"a checkpoint with SHA-256 {found['base_fingerprint']}"),
    ]


def _trained(record: dict[str, Any]) -> str:
    rank = f" of rank {record['rank']}" if record.get("rank") else ""
    text = f"{record['kind']}{rank}"
    if "tokens" in record and "criterion" in record:
        trained = record["kind"] in NETWORKS and "networks" not in record  # those of PowerInfer are only calibrated
        text += f", {'trained' if trained else 'calibrated'} on {record['tokens']} tokens by {record['criterion']}"
    if fired := record.get("fired"):
        text += f", {sum(fired) / len(fired):.1%} of neurons fired ({min(fired):.1%} to {max(fired):.1%} by layer)"
    judged = record.get("held_out", {}).get(record["kind"])
    return text + (f"; held out: {', '.join(f'{k} {v:.3f}' for k, v in judged.items())}" if judged else "")


def _validation(found: dict[str, Any]) -> str:
    if not found:
        return "skipped"
    worst = max(found["errors"], key=lambda error: error["max_rel"])
    agreement = min(error["greedy_agreement"] for error in found["errors"] if error["greedy_agreement"] is not None)
    return (
        f"{len(found['errors'])} outputs within {worst['max_rel']:.1e} of the reference (relative; worst: "
        f"{worst['output']}; {found['tolerance']:.0e} allowed), greedy tokens agree {agreement:.0%}"
    )


def _transformers(found: dict[str, Any]) -> str:
    compared = found.get("transformers", {"skipped": "the validation was skipped" if not found else "not recorded"})
    if "skipped" in compared:
        return f"not compared: {compared['skipped']}"
    return f"the checkpoint's logits within {compared['max_rel']:.1e} of its forward pass ({compared['tokens']} tokens)"


def _layers(plugins: dict[str, list[str]]) -> str:
    """List the plugins of layers, with consecutive layers that have the same ones as one range."""
    runs: list[tuple[str, str, list[str]]] = []
    for place, ops in plugins.items():
        if runs and runs[-1][2] == ops and _follows(place, runs[-1][1]):
            runs[-1] = (runs[-1][0], place, ops)
        else:
            runs.append((place, place, ops))
    return (
        "; ".join(
            f"{first if first == last else f'layers {first.split()[-1]}-{last.split()[-1]}'}: {', '.join(ops)}"
            for first, last, ops in runs
        )
        or "none"
    )


def _follows(place: str, last: str) -> bool:
    """Whether both are layers, and one comes after the other."""
    return all(name.startswith("layer ") for name in (place, last)) and int(place[6:]) == int(last[6:]) + 1


def _range(profile: dict[str, Any]) -> str:
    shown = {name: f"{list(low)}..{list(high)}" for name, (low, _, high) in profile["shapes"].items()}
    caches = [name for name in shown if name.startswith("past_key_values")]
    rest = ", ".join(f"{name} {text}" for name, text in shown.items() if name not in caches)
    return rest + (f", caches {shown[caches[0]]}" if caches else "")


def _targets(engine: dict[str, Any]) -> str:
    from shadowllm.bundle.gpu_images import architectures

    return architectures(engine["compute_capabilities"])


def _kernels(kernels: dict[str, list[int]]) -> str:
    """List kernels, grouped by the compute capabilities they are compiled for."""
    from shadowllm.bundle.gpu_images import architectures

    alike: dict[str, list[str]] = {}
    for name, images in kernels.items():
        alike.setdefault(architectures(images), []).append(name)
    return "; ".join(f"{', '.join(names)} for {built}" for built, names in alike.items()) or "none"


def _counts(engine: dict[str, Any]) -> str:
    return ", ".join(f"{op} x{count}" for op, count in engine["plugin_counts"].items()) or "none"


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
