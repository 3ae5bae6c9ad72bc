"""``bench`` on a tiny bundle with real workers, and its report."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from shadowllm.benchmarks import peers
from shadowllm.benchmarks.peers import Setting, _check_tokens, compare, save_checkpoint
from shadowllm.draft_config import Drafting
from shadowllm.errors import UserError
from shadowllm.evaluation.speed.bench import bench
from shadowllm.evaluation.speed.figure import draw
from shadowllm.evaluation.speed.report import Result, latency_line
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget

ENVIRONMENT = {"cpu", "cores", "ram_gb", "os", "machine", "python", "packages", "commit", "date", "threads"}
RESULT = {
    "name",
    "ttft_ms",
    "itl_ms",
    "tokens_per_second",
    "tokens_per_second_spread",
    "bytes_per_token",
    "bytes_by_part",
    "gb_per_second",
    "peak_rss_mb",
    "device_memory",
    "parts_ms",
    "fired",
    "quality",
    "recomputed_rows",
    "lossless",
    "same_tokens",
}
SHORT = {"prompt_len": 12, "new_tokens": 6, "runs": 2, "warmup": 1, "quality_tokens": 8, "threads": 1}


@pytest.fixture(scope="module")
def report(bundle):
    return bench(bundle(), budget=Budget(heads=0.5, neurons=0.5), **SHORT)


@pytest.fixture(scope="module")
def data(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.json"
    report.save_json(path)
    return json.loads(path.read_text())


def test_json_schema(data):
    assert set(data) == {"environment", "settings", "bandwidth_gb_s", "results", "comparison", "predictor"}
    assert set(data["environment"]) == ENVIRONMENT
    assert [result["name"] for result in data["results"]] == ["sparse", "ort-dense"]
    for result in data["results"]:
        assert set(result) == RESULT
        assert result["device_memory"] == {}  # on a CPU
        assert {"p50", "p90", "p99"} <= set(result["itl_ms"])
        assert set(result["quality"]) == {"next_token_agreement", "perplexity", "tokens"}
        assert result["gb_per_second"] == pytest.approx(result["bytes_per_token"] / result["itl_ms"]["p50"] / 1e6)
        assert result["bytes_per_token"] == sum(result["bytes_by_part"].values())
    assert [(pair["name"], pair["baseline"]) for pair in data["comparison"]] == [("sparse", "ort-dense")]
    assert data["comparison"][0]["speedup"].keys() == {"median", "min", "max"}


def test_sparse_reads_less_and_its_parts_are_timed(data):
    sparse, dense = data["results"]
    assert sparse["bytes_per_token"] < dense["bytes_per_token"]
    assert set(sparse["parts_ms"]) == {"stem", "predictor", "body"}
    assert sum(sparse["parts_ms"].values()) < sparse["itl_ms"]["max"]
    assert data["predictor"]["ms_per_token"] == sparse["parts_ms"]["predictor"]
    assert 0 < data["predictor"]["share_of_step"] < 1


def test_the_baseline_agrees_with_itself(data):
    sparse, dense = (result["quality"] for result in data["results"])
    assert dense["next_token_agreement"] == 1
    assert sparse["next_token_agreement"] < 1  # half of a random model's neurons are not the whole model
    assert dense["tokens"] == 8 + 6  # the documentation, and the text that the baseline generated
    assert sparse["perplexity"] != dense["perplexity"]


def test_everything_active_is_as_good_as_dense(bundle):
    sparse, dense = bench(bundle(), budget=Budget(heads=1.0, neurons=1.0), **SHORT | {"runs": 1, "warmup": 0}).results
    assert sparse.quality["next_token_agreement"] == 1
    assert sparse.quality["perplexity"] == pytest.approx(dense.quality["perplexity"], rel=1e-5)


@pytest.mark.parametrize(("backend", "against"), [("torch", "ort"), ("ort-dense", "ort")])
def test_bytes_are_those_of_the_backend_whatever_its_place(bundle, backend, against):
    options = SHORT | {"runs": 1, "warmup": 0, "quality_tokens": 0}
    report = bench(bundle(), (against,), backend=backend, **options)
    predicted = [result.traffic.parts["predictor"] > 0 for result in report.results]
    assert predicted == [backend == "torch", True]


def test_the_rows_of_a_certificate_are_reported_and_counted_as_bytes(bundle):
    folder = bundle("llama-blocks", kind="quantized-shadow", rest="shadow")
    budget = Budget(neurons=0.2, shortlist=2, certify=True)
    report = bench(folder, budget=budget, **SHORT | {"runs": 1, "warmup": 0, "quality_tokens": 0})
    sparse, dense = report.results
    assert sparse.recomputed_rows["mean"] > 2
    assert 0 < sparse.recomputed_rows["fallback_share"] <= 1
    assert dense.recomputed_rows == {}
    assert sparse.traffic.parts["shortlist"] == round(sparse.recomputed_rows["mean"]) * 64 * 4
    console = Console(width=80, file=StringIO())
    report.print(console)
    assert "Steps beyond the shortlist" in console.file.getvalue()


def test_lossless(bundle):
    """It has the baseline's tokens, and says how much of the drafts was accepted."""
    folder, budget = bundle("llama-blocks", kind="quantized-shadow", rest="shadow"), Budget(heads=0.5, neurons=0.5)
    drafting = Drafting(lossless=True, draft_length=2)
    report = bench(folder, budget=budget, drafting=drafting, **SHORT | {"quality_tokens": None})
    ours, dense = report.results
    assert (ours.name, dense.name) == ("lossless", "ort-dense")
    assert ours.same_tokens
    assert [run["drafted"] for run in ours.lossless] == [ours.lossless[0]["drafted"]] * 2
    assert not dense.lossless
    means = [result.summary.itl_ms["mean"] for result in (dense, ours)]
    assert report.comparison[0]["speedup"]["min"] <= means[0] / means[1] <= report.comparison[0]["speedup"]["max"]
    console = Console(width=80, file=StringIO())
    report.print(console)
    for words in ("ITL mean, ms", "Same tokens", "Accepted per draft", "lossless against ort-dense:"):
        assert words in console.file.getvalue()


def test_printed_report_fits_a_terminal(report):
    console = Console(width=80, file=StringIO())
    report.print(console)
    text = console.file.getvalue()
    for words in (
        "sparse",
        "ort-dense",
        "ITL median, ms",
        "ITL percentile(99%), ms",
        "Next-token agreement",
        "Perplexity",
        "sparse against ort-dense:",
        "Predictor:",
        "Memory:",
    ):
        assert words in text
    assert "GPU memory" not in text
    line = latency_line(report.results[0])
    assert line.startswith("sparse: Latency: min = ")
    assert "percentile(90%) = " in line
    assert "percentile(50%)" not in line


def test_gpu_memory_is_told_of_whoever_reports_it(report):
    on_gpu = replace(report.results[1].summary, device_memory={"weights": 1_200_000_000, "cache": 34_000_000})
    results = [report.results[0], Result("tensorrt", on_gpu)]
    console = Console(width=80, file=StringIO())
    replace(report, results=results).print(console)
    row = next(line for line in console.file.getvalue().splitlines() if "GPU memory, MB" in line)
    assert [cell.strip() for cell in row.split("│")[2:4]] == ["-", "1234"]
    assert results[1].to_dict()["device_memory"] == {"weights": 1_200_000_000, "cache": 34_000_000}


def test_figure(report, tmp_path):
    draw(report, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(UserError, match="cannot write"):
        draw(report, tmp_path / "missing" / "figure.png")
    with pytest.raises(UserError, match=r"cannot use /dev/full .*; free disk space"):
        draw(report, Path("/dev/full"))


def test_json_needs_its_folder(report, tmp_path):
    with pytest.raises(UserError, match=r"cannot use /dev/full .*; free disk space"):
        report.save_json(Path("/dev/full"))
    with pytest.raises(UserError, match="cannot write"):
        report.save_json(tmp_path / "missing" / "report.json")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"against": ()}, "cannot compare with nothing"),
        ({"against": ("ort-dense", "ort-dense")}, "each backend once"),
        ({"against": ("fast",)}, "no backend 'fast'"),
        ({"runs": 0}, "number of runs is 0"),
        ({"drafting": Drafting(lossless=True)}, "and not measured; leave out quality tokens"),
        ({"new_tokens": 1}, "number of new tokens is 1"),
        ({"prompt_len": 60}, "new tokens exceed the model's 64 positions; ask for fewer new tokens"),
        ({"quality_tokens": 60}, "quality tokens exceed the model's 64 positions; ask for fewer quality tokens"),
    ],
)
def test_bad_arguments(bundle, arguments, words):
    with pytest.raises(UserError, match=words):
        bench(bundle(), **SHORT | arguments)


def test_no_bundle(tmp_path):
    with pytest.raises(UserError, match="is not a bundle"):
        bench(tmp_path)


class TestPeers:
    def test_nothing_to_compare_with(self, bundle, tmp_path):
        with pytest.raises(UserError, match="no other toolkit"):
            compare("model", bundle(), tmp_path, None, None, Setting(1, 8, 4), runs=1)

    def test_sixteen_bit_bundle(self, bundle, tmp_path):
        with pytest.raises(UserError, match="float16 bundle"):
            compare("model", bundle(dtype="float16"), tmp_path, None, None, Setting(1, 8, 4), runs=1)

    def test_a_checkpoint_is_whole_and_of_the_model(self, checkpoint, tmp_path, monkeypatch):
        model, folder = str(checkpoint("llama-gqa")), tmp_path / "checkpoint"

        def interrupted(path):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(peers, "_spell_rope_for_transformers_4", interrupted)
            with pytest.raises(KeyboardInterrupt):
                save_checkpoint(model, folder)
        assert not folder.exists()
        assert save_checkpoint(model, folder) == save_checkpoint(model, folder) == folder
        assert load_model(folder)[1].fingerprint()
        with pytest.raises(UserError, match="has another checkpoint; remove it"):
            save_checkpoint(str(checkpoint("llama-blocks")), folder)

    def test_other_tokens_are_noticed(self):
        with pytest.raises(UserError, match="genai-graph generates other tokens"):
            _check_tokens({"dense": [1, 2, 3], "genai-graph": [1, 9, 3]})
        _check_tokens({"dense": [1] * 9 + [2], "genai-graph": [1] * 9 + [3]})
