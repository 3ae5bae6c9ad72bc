"""Compares our dense graph and loop with those of other toolkits, each in its own process and environment.

    python -m shadowllm.benchmarks.peers MODEL BUNDLE --genai-python PYTHON --optimum-python PYTHON

MODEL is the model that BUNDLE was exported from, in float32. The toolkits need different versions of
transformers, and so two environments (the ``.`` is the folder of this project):

    python -m venv .peers/genai
    .peers/genai/bin/pip install torch==2.13.0
    .peers/genai/bin/pip install onnxruntime==1.32.0 onnxruntime-genai==0.18.0 "transformers>=5,<6" onnx onnx-ir
    .peers/genai/bin/pip install --no-deps .
    python -m venv .peers/optimum
    .peers/optimum/bin/pip install torch==2.13.0
    .peers/optimum/bin/pip install onnxruntime==1.32.0 optimum-onnx==0.1.0 "transformers<4.58"
    .peers/optimum/bin/pip install --no-deps .

All three environments should have the same version of onnxruntime. A toolkit without an interpreter
is skipped, and the report lists it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shadowllm.benchmarks.script_parser import add_json, script, script_parser
from shadowllm.bundle.cost_model import Itemsizes, mean_traffic
from shadowllm.bundle.manifest import read_manifest
from shadowllm.child import module_command
from shadowllm.errors import UserError
from shadowllm.evaluation.default_text import passage
from shadowllm.evaluation.speed.environment import environment
from shadowllm.evaluation.speed.harness import Contender, Generation, race, speedup, summarise
from shadowllm.evaluation.speed.report import Report, Result
from shadowllm.exporter.staging import staged
from shadowllm.models.registry import load_model
from shadowllm.progress import progress
from shadowllm.runtime.generation.text import load_tokenizer, plain_encoder

# Our contender, the other toolkit's contender, and the target speedup of ours.
MADE_OF = "made-of.txt"  # in the folder of a checkpoint: the fingerprint of the model
TARGETS = (
    ("dense", "genai-graph", 0.95),
    ("dense", "optimum-run", 1.2),
    ("dense", "optimum-bound", 1.2),
    ("dense-loop", "genai-default", 1.2),
    ("dense-loop", "genai-tuned", 1.2),
)


@dataclass(frozen=True)
class Setting:
    """Settings of all contenders."""

    threads: int
    prompt_len: int
    new_tokens: int


def own_contenders(bundle: Path, setting: Setting) -> list[Contender]:
    """Our dense graph, and our whole generation loop over it."""
    arguments = (str(bundle), "ort-dense", "--threads", str(setting.threads))
    command = module_command("shadowllm.evaluation.speed.worker", *arguments)
    return [Contender("dense", command), Contender("dense-loop", (*command, "--loop"))]


def genai_contenders(python: Path, checkpoint: Path, folder: Path, setting: Setting) -> list[Contender]:
    """The graph that onnxruntime-genai's builder writes, on plain ONNX Runtime and with its own generator.

    The generator runs twice: as its builder configures it, which leaves the number of threads to
    onnxruntime-genai, and with the same number of threads as the others.
    """
    _export(
        folder,
        (
            str(python),
            "-P",
            "-m",
            "onnxruntime_genai.models.builder",
            "-m",
            str(checkpoint),
            "-o",
            str(folder),
            "-p",
            "fp32",
            "-e",
            "cpu",
            "-c",
            str(folder.with_name("genai-cache")),
        ),
    )
    tuned = _with_threads(folder, setting.threads)
    return [
        Contender("genai-graph", _peer(python, "shared", folder, setting)),
        Contender("genai-default", _peer(python, "genai", folder, setting)),
        Contender("genai-tuned", _peer(python, "genai", tuned, setting)),
    ]


def _with_threads(folder: Path, threads: int) -> Path:
    """Copy a builder's folder, and set the number of threads in the configuration of the copy."""
    tuned = folder.with_name(f"{folder.name}-tuned")
    tuned.mkdir(exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and not (tuned / path.name).exists():
            os.link(path, tuned / path.name)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
    (tuned / "genai_config.json").unlink()  # writing to this hard link would change the builder's file
    (tuned / "genai_config.json").write_text(json.dumps(config, indent=2))
    return tuned


def optimum_contenders(python: Path, checkpoint: Path, folder: Path, setting: Setting) -> list[Contender]:
    """Optimum's traced export, run as optimum runs it on a CPU, and with IO binding."""
    _export(
        folder,
        (
            str(python),
            "-P",
            "-m",
            "optimum.exporters.onnx",
            "--model",
            str(checkpoint),
            "--task",
            "text-generation-with-past",
            str(folder),
        ),
    )
    return [
        Contender("optimum-run", _peer(python, "run", folder, setting)),
        Contender("optimum-bound", _peer(python, "bound", folder, setting)),
    ]


def _peer(python: Path, how: str, folder: Path, setting: Setting) -> tuple[str, ...]:
    capacity = setting.prompt_len + setting.new_tokens
    return (
        str(python),
        "-P",
        # By path, because the package that is installed there has no benchmarks.
        str(Path(__file__).resolve().with_name("peer_worker.py")),
        how,
        str(folder),
        "--threads",
        str(setting.threads),
        "--capacity",
        str(capacity),
    )


def _export(folder: Path, command: Sequence[str]) -> None:
    """Run another toolkit's exporter, unless its graph exists."""
    if (folder / "model.onnx").is_file():
        return
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"cannot start {command[0]} ({error.strerror})", "name an interpreter that exists") from error
    if done.returncode:
        # The next run must not take a half-written graph for a finished one.
        (folder / "model.onnx").unlink(missing_ok=True)
        last = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        raise UserError(f"{command[3]} failed: {last}", "see the module's documentation for the packages it needs")


def save_checkpoint(model: str, folder: Path) -> Path:
    """Write a model as a plain float32 Hugging Face checkpoint that both toolkits read, unless it is there already.

    Raises:
        UserError: see `load_model`, or the folder has something else.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _, weights, checkpoint = load_model(model)
    if folder.exists():
        if not (folder / MADE_OF).is_file() or (folder / MADE_OF).read_text() != weights.fingerprint():
            raise UserError(f"{folder} has another checkpoint", "remove it, or name another folder with --work")
        return folder
    extra = {"gguf_file": checkpoint.gguf} if checkpoint.gguf else {}
    loaded = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=torch.float32, **extra)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # Copy the weights to a new model: transformers refuses to save one that it loaded from a quantised file.
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    with staged(folder) as part:
        fresh.save_pretrained(part)
        checkpoint.tokenizer().save_pretrained(part)
        _spell_rope_for_transformers_4(part / "config.json")
        (part / MADE_OF).write_text(weights.fingerprint())
    return folder


def _spell_rope_for_transformers_4(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    config["torch_dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2))


def compare(
    model: str,
    bundle: Path,
    work: Path,
    genai_python: Path | None,
    optimum_python: Path | None,
    setting: Setting,
    runs: int,
    starts: int = 1,
) -> tuple[Report, list[str]]:
    """Export missing graphs, race all contenders, and return the report and the skipped toolkits.

    Args:
        starts: how often to race with new processes. The placement of its memory pages makes a process a few
            percent faster or slower for its whole life.

    Raises:
        UserError: there is no other toolkit, the bundle is not float32, or an exporter or worker failed.
    """
    manifest = read_manifest(bundle)
    if manifest.dtype != "float32":
        raise UserError(f"{bundle} is a {manifest.dtype} bundle", "the comparison is in float32: export it so")
    toolkits = {
        "onnxruntime-genai (--genai-python)": (genai_python, genai_contenders, work / "genai"),
        "optimum (--optimum-python)": (optimum_python, optimum_contenders, work / "optimum"),
    }
    skipped = [name for name, (python, _, _) in toolkits.items() if python is None]
    if len(skipped) == len(toolkits):
        raise UserError("no other toolkit to compare with", "give --genai-python or --optimum-python")
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = save_checkpoint(model, work / "checkpoint")
    contenders = own_contenders(bundle, setting)
    for python, make, folder in toolkits.values():
        if python is not None:
            contenders += make(python, checkpoint, folder, setting)
    prompt = passage(plain_encoder(load_tokenizer(bundle, manifest), manifest), setting.prompt_len)
    taken: dict[str, list[Generation]] = {contender.name: [] for contender in contenders}
    with progress("Peers", len(contenders) * starts * (1 + runs)) as advance:
        for _ in range(starts):
            request = {"prompt": prompt, "new_tokens": setting.new_tokens}
            found, _ = race(contenders, request, runs=runs, warmup=1, tick=lambda _: advance(1))
            for name, generations in found.items():
                taken[name] += generations
    _check_tokens({name: generations[0].tokens for name, generations in taken.items()})
    traffic = mean_traffic(manifest.spec, Itemsizes.of(4), setting.prompt_len, setting.new_tokens)
    results = [Result(name, summarise(generations), traffic) for name, generations in taken.items()]
    pairs = [
        {"name": ours, "baseline": theirs, "speedup": speedup(taken[theirs], taken[ours]), "target": target}
        for ours, theirs, target in TARGETS
        if theirs in taken
    ]
    settings = {"model": manifest.model, "runs": starts * runs, "starts": starts, "skipped": skipped} | vars(setting)
    return Report(environment(setting.threads), settings, results, pairs), skipped


def _check_tokens(tokens: dict[str, list[int]]) -> None:
    """Check that all contenders start with the same tokens; otherwise their times are not comparable."""
    reference = tokens["dense"]
    for name, found in tokens.items():
        # Rounding can make greedy texts differ late. Another model or a wrong cache makes them differ at once.
        if found[:8] != reference[:8]:
            raise UserError(
                f"{name} generates other tokens than our dense graph ({found[:8]}, not {reference[:8]})",
                "give the model that the bundle was exported from, and an empty --work folder",
            )


@script
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; prints the table and whether each target was met."""
    from rich.console import Console

    parser = script_parser("peers", __doc__)
    parser.add_argument("model", help="Hugging Face id, folder or .gguf file")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--genai-python", type=Path, help="interpreter that has onnxruntime-genai")
    parser.add_argument("--optimum-python", type=Path, help="interpreter that has optimum-onnx")
    parser.add_argument("--work", type=Path, default=Path(".peers"), help="folder of the peers' exports, for reuse")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3, help="runs of each process (default: 3)")
    parser.add_argument("--starts", type=int, default=5, help="how often to start new processes (default: 5)")
    add_json(parser)
    given = parser.parse_args(arguments)
    console = Console(width=max(Console().width, 120))  # seven contenders side by side
    report, skipped = compare(
        given.model,
        given.bundle,
        given.work,
        given.genai_python,
        given.optimum_python,
        Setting(given.threads, given.prompt_len, given.new_tokens),
        given.runs,
        given.starts,
    )
    report.print(console)
    for pair in report.comparison:
        met = "met" if pair["speedup"]["median"] >= pair["target"] else "missed"
        console.print(f"Target: {pair['name']} at least {pair['target']}x {pair['baseline']}: {met}", highlight=False)
    for name in skipped:
        console.print(f"Skipped: {name} was not given", highlight=False)
    if given.json:
        report.save_json(given.json)


if __name__ == "__main__":
    sys.exit(main())
