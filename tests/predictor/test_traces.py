"""Traces: streaming, and the contents of a trace file."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shadowllm.bundle.predictor_file import Predictor
from shadowllm.errors import UserError
from shadowllm.models.decoder import Decoder
from shadowllm.predictor import tracefile
from shadowllm.predictor.tracefile import Traces, calibrate, decode, encode, relative
from shadowllm.predictor.traces import Tracer
from shadowllm.predictor.train import train_static
from tests.tiny import split, token_windows

PARTS = ("hidden", "heads", "neurons")


@pytest.mark.parametrize("criterion", ["l2norm", "plainact"])
def test_streamed_chunks_equal_one_pass(tiny, criterion):
    spec, weights = tiny
    windows = token_windows(spec, n=5)
    tracer = Tracer(spec, weights, criterion)
    chunks, whole = list(tracer.chunks(windows, 48)), tracer.trace(windows)
    assert [len(chunk.hidden) for chunk in chunks] == [48, 48, 24]
    for part in PARTS:
        streamed = torch.cat([getattr(chunk, part) for chunk in chunks])
        # Windows are independent; only the blocking of matrix products differs.
        torch.testing.assert_close(streamed, getattr(whole, part), atol=1e-5, rtol=1e-4)


def test_hidden_is_the_input_of_the_first_sparse_layer(tiny):
    spec, weights = tiny
    windows = token_windows(spec)
    decoder, positions = Decoder(spec, weights), torch.arange(24).expand_as(windows)
    x = decoder.layer(1, decoder.layer(0, decoder.embed(windows, positions), positions), positions)
    traced = Tracer(spec, weights, "l2norm", dense_layers=2).trace(windows)
    torch.testing.assert_close(traced.hidden, x.flatten(0, 1), atol=1e-6, rtol=1e-6)
    assert traced.heads.shape == (96, spec.n_layers - 2, spec.n_heads)


def test_codes_keep_scores_to_two_percent_over_fifteen_octaves():
    scores = torch.logspace(0, -15, 200, base=2)[None]
    torch.testing.assert_close(decode(encode(scores)), scores, rtol=0.022, atol=0)  # half a step: 2^(1/32)
    assert encode(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]
    assert encode(torch.tensor([[4.0, 0.0]])).tolist() == [[255, 0]]


def test_a_kept_trace_reads_like_a_fresh_one(tiny, tmp_path):
    spec, weights = tiny
    windows = replace(split(token_windows(spec, n=6), held_out=2), seed=7)
    made = calibrate(spec, weights, windows, "f00d")
    made.save(tmp_path / "traces")
    read = Traces.load(tmp_path / "traces")
    assert read.windows.seed == 7
    order = torch.tensor([2, 0, 3, 1])
    fresh = calibrate(spec, weights, read.windows, "f00d", limit_bytes=0)
    assert not fresh.stored
    tracer = Tracer(spec, weights, "l2norm")
    for kept, live in (
        (read.training(None, order), fresh.training(tracer, order)),
        (read.held_out(None), fresh.held_out(tracer)),
    ):
        kept, live = list(kept), list(live)
        assert [len(c.hidden) for c in kept] == [len(c.hidden) for c in live]
        torch.testing.assert_close(
            torch.cat([c.hidden for c in kept]), torch.cat([c.hidden for c in live]), atol=1e-6, rtol=1e-6
        )
        for unit in ("heads", "neurons"):
            scores = torch.cat([getattr(c, unit) for c in live])
            scores = scores / scores.amax(dim=-1, keepdim=True)
            torch.testing.assert_close(torch.cat([getattr(c, unit) for c in kept]), scores, rtol=0.022, atol=2**-15)
    assert all(torch.equal(read.statistics[unit], made.statistics[unit]) for unit in ("heads", "neurons"))


@pytest.mark.parametrize("criterion", ["l2norm", "grad_norm"])
def test_final_squares_are_those_of_the_inputs_of_the_output_table(tiny, criterion, tmp_path):
    spec, weights = tiny
    windows = split(token_windows(spec, n=4), held_out=1)
    decoder, positions = Decoder(spec, weights), torch.arange(24).expand_as(windows.train)
    x = decoder.embed(windows.train, positions)
    for layer in range(spec.n_layers):
        x = decoder.layer(layer, x, positions)
    expected = decoder.final_hidden(x).square().mean(dim=(0, 1))
    made = calibrate(spec, weights, windows, "f00d", criterion=criterion)
    torch.testing.assert_close(made.final_squares, expected, atol=1e-5, rtol=1e-4)
    made.save(tmp_path / "traces")
    assert torch.equal(Traces.load(tmp_path / "traces").final_squares, made.final_squares)
    predictor = train_static(spec, made)
    predictor.save(tmp_path / "predictor")
    assert torch.equal(Predictor.load(tmp_path / "predictor").final_squares, made.final_squares)


def test_statistics_are_of_the_training_tokens_only(llama):
    spec, weights = llama
    windows = split(token_windows(spec, n=6), held_out=2)
    scores = Tracer(spec, weights, "l2norm").trace(windows.train).neurons
    expected = (scores / scores.mean(dim=-1, keepdim=True)).mean(dim=0)
    found = calibrate(spec, weights, windows, "f00d").statistics["neurons"]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_numbers_beyond_float32_are_said_before_traces_are_written(llama):
    spec, weights = llama
    large = {
        name: tensor * (1e30 if "up_proj" in name or "down_proj" in name else 1) for name, tensor in weights.items()
    }
    with pytest.raises(UserError, match="computes NaN or infinite numbers on this text; it is damaged, or"):
        calibrate(spec, large, split(token_windows(spec)), "f00d")


def test_without_the_fit_of_the_heads_the_rest_is_the_same(llama):
    spec, weights = llama
    windows = split(token_windows(spec))
    whole = calibrate(spec, weights, windows, "f00d")
    without = calibrate(spec, weights, windows, "f00d", fit_heads=False)
    assert without.fit == {}
    assert whole.fit.keys() == {"weight", "bias"}
    assert all(torch.equal(without.statistics[unit], whole.statistics[unit]) for unit in whole.statistics)


def test_traces_that_were_not_kept_need_the_model(llama):
    spec, weights = llama
    made = calibrate(spec, weights, split(token_windows(spec)), "f00d", limit_bytes=1000)
    with pytest.raises(UserError, match="the traces were not kept"):
        next(made.training(None, torch.arange(1)))


def test_statistics_of_text_too_long_to_keep_are_those_of_a_sample(llama, monkeypatch):
    spec, weights = llama
    windows = split(token_windows(spec, n=6), held_out=2)
    monkeypatch.setattr(tracefile, "SAMPLE_TOKENS", 48)  # two windows
    told: list[int] = []
    made = calibrate(spec, weights, windows, "f00d", limit_bytes=0, advance=told.append)
    few = calibrate(spec, weights, replace(windows, train=windows.train[:2]), "f00d")
    assert all(torch.equal(made.statistics[unit], few.statistics[unit]) for unit in ("heads", "neurons"))
    assert torch.equal(made.windows.train, windows.train)  # all of it is used for training
    assert sum(told) == 6 * 24


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_the_last_token_of_a_window_is_not_learned_from_without_a_loss_after_it(tiny, limit):
    spec, weights = tiny
    windows = split(token_windows(spec, n=6), held_out=2)
    made = calibrate(spec, weights, windows, "f00d", criterion="plainact", limit_bytes=limit)
    tracer = None if limit else Tracer(spec, weights, "plainact")
    scores = Tracer(spec, weights, "plainact").trace(windows.train).neurons.unflatten(0, (4, 24))[:, :-1].flatten(0, 1)
    learned = torch.cat([chunk.neurons for chunk in made.training(tracer, torch.arange(4))])
    assert learned.shape == scores.shape
    assert bool((learned.amax(dim=-1) > 0).all())
    torch.testing.assert_close(made.statistics["neurons"], relative(scores).mean(dim=0))
    assert sum(chunk.tokens for chunk in made.held_out(tracer)) == 2 * 23


def test_a_ranking_needs_only_the_traces_of_the_held_out_windows(llama):
    spec, weights = llama
    windows = split(token_windows(spec, n=6), held_out=2)
    whole, few = (calibrate(spec, weights, windows, "f00d", keep_train=keep) for keep in (True, False))
    assert [len(tensor) for tensor in few.stored.values()] == [2 * 24] * 3
    with pytest.raises(UserError, match="the traces were not kept; give the model"):
        next(few.training(None, torch.arange(4)))
    assert all(torch.equal(tensor, whole.stored[name][: 2 * 24]) for name, tensor in few.stored.items())
    for kind in ("static", "quantized-shadow"):
        expected, found = (train_static(spec, traces, kind=kind) for traces in (whole, few))
        assert found.record == expected.record
        assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in found.tensors.items())
