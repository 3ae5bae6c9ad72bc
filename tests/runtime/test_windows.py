"""Sessions of models with sliding windows, compared with transformers on texts several times as long as the windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shadowllm.runtime import Budget, generate
from shadowllm.runtime.generation.draft_length import DraftLength
from shadowllm.runtime.ort.session import OrtSession
from shadowllm.runtime.torch_session import TorchSession

LENGTHS, STEPS = (26, 3, 11), 4  # windows have 5 to 8 positions; the second text grows beyond the window of Qwen2
TOLERANCE = 2e-5

SESSIONS = {
    "ort-dense": lambda folder: OrtSession(folder, "dense"),
    "native": lambda folder: OrtSession(folder, "sparse", exact=True),
    "functions": lambda folder: OrtSession(folder, "sparse", native=False, exact=True),
    "torch": lambda folder: TorchSession.open(folder),
}


def texts(steps=STEPS):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(3, 97, (length + steps,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def expected(checkpoint):
    """A function that returns transformers' logits of the last prompt token and of each step, ``(steps, batch, V)``."""

    def get(variant):
        model = AutoModelForCausalLM.from_pretrained(checkpoint(variant), dtype=torch.float32).eval()
        with torch.no_grad():
            rows = [model(torch.tensor([text])).logits[0, -STEPS - 1 :] for text in texts()]
        return torch.stack(rows, dim=1).numpy()

    return get


def close(found, expected):
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("open_one", SESSIONS.values(), ids=SESSIONS)
@pytest.mark.parametrize(
    ("variant", "kind", "rest"),
    [
        ("mistral", "shadow", "drop"),
        ("qwen2", "shadow", "drop"),
        ("qwen2", "quantized-shadow", "shadow"),
        ("gemma3", "quantized-shadow", "shadow"),
        ("phi3", "layerwise", "drop"),
    ],
)
@pytest.mark.filterwarnings("ignore:texts are limited to 48")
def test_everything_active_equals_transformers(bundle, expected, variant, kind, rest, open_one):
    """A prompt of uneven rows, one-token steps, and the same tokens again as a step of several after rewinding."""
    rows = texts()
    with open_one(bundle(variant, kind=kind, rest=rest)) as session:
        session.set_budget(Budget())
        session.reset(len(rows))
        found = [session.prefill([row[:-STEPS] for row in rows]).copy()]
        forced = np.array([row[-STEPS:] for row in rows])
        found += [session.decode(forced[:, step]).copy() for step in range(STEPS)]
        wanted = expected(variant)
        close(np.stack(found), wanted)
        session.rewind(np.array(LENGTHS))
        close(session.verify(forced), wanted[1:].swapaxes(0, 1))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("variant", "kind", "rest"), [("qwen2", "quantized-shadow", "shadow"), ("mistral", "shadow", "drop")]
)
def test_a_budget_follows_the_reference(bundle, variant, kind, rest, native):
    rows, folder = texts(), bundle(variant, kind=kind, rest=rest)
    with OrtSession(folder, "sparse", native=native, exact=True) as ours, TorchSession.open(folder) as theirs:
        found = []
        for session in (ours, theirs):
            session.set_budget(Budget(neurons=(0.25, 0.6), heads=(0.75, 0.5)))
            session.reset(len(rows))
            session.prefill([row[:-STEPS] for row in rows])
            forced = np.array([row[-STEPS:] for row in rows])
            found.append(np.stack([session.decode(forced[:, step]).copy() for step in range(STEPS)]))
    close(*found)


def test_lossless_text_is_that_of_transformers(bundle, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2"), dtype=torch.float32).eval()
    prompt = texts()[0][: LENGTHS[0]]
    theirs = model.generate(
        torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    lengths = DraftLength(3)
    with OrtSession(bundle("qwen2", kind="quantized-shadow", rest="shadow"), "sparse") as session:
        session.set_budget(Budget(neurons=0.5, heads=0.5))
        found = [row[0] for row in generate(session, [prompt], 20, draft_length=lengths)]
    assert found == theirs[0, len(prompt) :].tolist()
    assert lengths.record.drafted > 0
