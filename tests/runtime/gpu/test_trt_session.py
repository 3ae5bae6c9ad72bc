"""Compares the engine session, on fake engines in ONNX Runtime (`fake_tensorrt`), with the reference."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest

from shadowllm.bundle.manifest import read_manifest
from shadowllm.errors import UserError
from shadowllm.evaluation.speed.worker import StepTimer
from shadowllm.runtime import Budget, generate, open_session
from shadowllm.runtime.generation.draft_length import DraftLength
from shadowllm.runtime.gpu import trt_session as module
from shadowllm.runtime.gpu.trt_engine import PLUGINS_VARIABLE, load_plugins
from shadowllm.runtime.gpu.trt_session import TrtSession
from tests.runtime.gpu.fake_tensorrt import (
    FLAVOUR,
    Context,
    Engine,
    HostCuda,
    RuntimeCache,
    RuntimeConfig,
    at,
    played,
    write_engines,
)
from tests.runtime.gpu.reference import reference

PROMPTS = [[5, 17, 42], [8, 61]]
FORCED = np.array([[3, 90], [14, 7]])


@pytest.fixture
def engines(bundle, tmp_path, monkeypatch):
    """A function that opens a session on fake engines of a variant; options go to `write_engines`."""
    monkeypatch.setenv(PLUGINS_VARIABLE, __file__)  # the fake registry loads anything
    monkeypatch.setattr(module, "gpu_capability", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def opened(variant="llama-gqa", kind="sparse", bundle_options=None, rtx=True, **options):
        folder = tmp_path / variant
        shutil.copytree(bundle(variant, **(bundle_options or {})), folder)
        pieces = ("dense",) if kind == "dense" else None
        write_engines(folder, read_manifest(folder), pieces=pieces, **options)
        cuda = HostCuda()
        return TrtSession(folder, FLAVOUR, played(folder, cuda, rtx), lambda: cuda, kind)

    return opened


def steps(session, prompts, forced):
    """Logits after the prompts and after each row of forced tokens, ``(steps, batch, vocab_size)``."""
    session.reset(len(prompts))
    found = [session.prefill(prompts).copy()]
    return np.stack(found + [session.decode(tokens).copy() for tokens in forced])


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("variant", "options"),
    [("llama-gqa", {}), ("opt", {}), ("llama-gqa", {"kind": "static"}), ("llama-gqa", {"kind": "layerwise"})],
)
def test_a_ragged_batch_at_changing_budgets(engines, bundle, variant, options):
    first, second = Budget(neurons=(0.25, 0.6), heads=(0.75, 0.5)), Budget(heads=0.5, neurons=1.0)
    with engines(variant, bundle_options=options) as ours, reference(bundle(variant, **options)) as theirs:
        found = []
        for session in (ours, theirs):
            session.set_budget(first)
            logits = steps(session, PROMPTS, FORCED)
            session.set_budget(second)  # in the middle of a text: only counts change
            found.append(np.stack([*logits, session.decode(np.array([11, 12]))]))
    assert distance(*found) < 1e-5


@pytest.mark.parametrize("predictor", ["quantized-shadow", "layerwise", "shadow", "static"])
def test_a_rest_from_the_low_bit_copy(engines, bundle, predictor):
    budget, options = Budget(neurons=0.25, heads=0.5, shortlist=5), {"kind": predictor, "rest": "shadow"}
    with engines(bundle_options=options) as ours, reference(bundle(**options)) as theirs:
        found = []
        for session in (ours, theirs):
            session.set_budget(budget)
            logits = [*steps(session, PROMPTS, FORCED)]
            for second in (Budget(neurons=0.4, heads=0.5), replace(budget, rest="drop")):  # only numbers change
                session.set_budget(second)
                logits.append(session.decode(np.array([11, 12])))
            found.append(np.stack(logits))
        recomputed = at(ours._address("recomputed"), (2,), np.int32)
        assert recomputed.tolist() == [5, 5]
    for one, other in zip(*found, strict=True):
        assert distance(one, other) < 1e-5


@pytest.mark.parametrize("rtx", [True, False])
def test_dense_engines(engines, bundle, rtx):
    with engines(kind="dense", rtx=rtx) as ours, open_session(bundle(), "torch-dense") as theirs:
        assert distance(steps(ours, PROMPTS, FORCED), steps(theirs, PROMPTS, FORCED)) < 1e-5


def test_greedy_text_is_one_replay_a_token(engines, bundle):
    with engines() as ours, reference(bundle()) as theirs:
        for prompts in (PROMPTS, PROMPTS[:1], PROMPTS):  # another batch size needs another graph
            expected = list(generate(theirs, prompts, 10))
            before = ours._cuda.replays
            assert list(generate(ours, prompts, 10)) == expected
            assert ours._cuda.replays - before == 9
        ours.reset(2)
        first = ours.prefill(PROMPTS).argmax(axis=1)
        found = list(itertools.islice(ours.decode_greedy(first, 6), 2))
        assert [row.tolist() for row in found] == expected[1:3]
        # Steps that were launched after the last requested one have no effect.
        assert ours.decode(found[-1]).argmax(axis=1).tolist() == expected[3]


def test_a_text_with_nan_does_not_harm_the_next_one(engines):
    with engines() as ours:
        clean = list(generate(ours, PROMPTS, 4))
        for name, buffer in ours._buffers.items():
            if name.startswith("cache."):
                at(ours._address(name), buffer.shape, np.float32)[:] = np.nan
        assert list(generate(ours, PROMPTS, 4)) == clean


def test_a_step_that_cannot_be_captured_is_launched_directly(engines, bundle, monkeypatch):
    monkeypatch.setattr(Context, "is_stream_capturable", lambda _context, _stream: False, raising=False)
    with reference(bundle()) as theirs:
        expected = list(generate(theirs, PROMPTS, 6))
    session = engines()
    with pytest.warns(RuntimeWarning, match="cannot capture stem, predictor, body in a CUDA graph"):
        found = _text(session, PROMPTS)
    assert found == expected
    assert session._cuda.replays == 0


def _text(session, prompts):
    with session:
        return list(generate(session, prompts, 6))


def test_an_engine_with_a_second_cache_is_refused(engines, monkeypatch):
    monkeypatch.setattr(Engine, "get_aliased_input_tensor", lambda _engine, _name: None)
    with pytest.raises(UserError, match=r"stem.engine does not update past_key_values.0.key in place"), engines():
        pass


@pytest.mark.parametrize("rest", ["drop", "shadow"])
def test_lossless_text_is_that_of_dense(engines, bundle, rest):
    """The engines of the sparse step verify too, with everything selected, in their prefill profile."""
    options = {"kind": "quantized-shadow", "rest": rest}
    with engines(bundle_options=options, max_kept=4) as ours, open_session(bundle(**options), "torch-dense") as theirs:
        assert ours.longest_draft == 3
        ours.set_budget(Budget(neurons=0.6, heads=0.75, rest="drop"))
        for prompts in (PROMPTS, PROMPTS[:1]):
            for length in (1, 3, 6):  # 6 are cut to 3
                lengths = DraftLength(length)
                found = generate(ours, prompts, 10, draft_length=lengths)
                texts = [[token for token in row if token is not None] for row in zip(*found, strict=True)]
                assert texts == [list(row) for row in zip(*generate(theirs, prompts, 10), strict=True)]
                assert 0 < lengths.record.accepted < lengths.record.drafted


def test_engines_without_verification_are_named(engines):
    with engines() as session:
        assert session.longest_draft == 0
        with pytest.raises(UserError, match=r"cannot verify drafts; .*again with --max-draft 8"):
            list(generate(session, PROMPTS, 4, draft_length=DraftLength(2)))
    with engines("opt", max_kept=2) as session:
        session.reset(2)
        session.prefill(PROMPTS)
        with pytest.raises(UserError, match=r"verify 1 drafted tokens at once, 2 are asked for.*--max-draft 2"):
            session.verify(np.ones((2, 3), dtype=np.int64))


def test_limits_of_the_engines_are_told(engines):
    with engines(capacity=12, max_seqlen=8, max_batch=2) as session:
        assert session.spec.max_seqlen == 12
        assert len(list(generate(session, [[1] * 8], 50))) == 5  # four in the free positions, one after them
        session.reset()
        with pytest.raises(
            UserError,
            match=r"a prompt of 9 tokens, the engines take 8.*--max-batch 2 --max-seqlen 9 --capacity 12 --max-draft 0",
        ):
            session.prefill([[1] * 9])
        with pytest.raises(UserError, match=r"3 sequences, the engines serve 2.*--max-batch 3"):
            session.reset(3)
        session.prefill([[1, 2]])
        with pytest.raises(UserError, match="11 more steps exceed"):
            session.decode_greedy(np.array([1]), 11)


def test_the_cache_is_one_buffer_and_hidden_states_are_shared(engines):
    with engines() as session:
        stem, body = (session._pieces[name]._contexts["decode"].addresses for name in ("stem", "body"))
        predictor = session._pieces["predictor"]._contexts["decode"].addresses
        assert stem["hidden"] == predictor["hidden"] == body["hidden"]
        assert predictor["head_indices"] == body["head_indices"]
        assert body["past_key_values.1.key"] == body["present.1.key"]
        prefill = session._pieces["body"]._contexts["prefill"].addresses
        assert prefill["present.1.key"] == body["present.1.key"]
        assert prefill["head_indices"] != body["head_indices"]
        assert session.memory.cache == 3 * 2 * 2 * 16 * 12 * 4  # layers, k and v, KV heads, capacity, head, float32
        assert session.memory.weights == sum(record.engine_bytes for record in session._records.values())
        assert str(session.memory).startswith("device memory: weights ")
        assert StepTimer(session).generate([5, 17], 3)["device_memory"] == vars(session.memory)  # for `bench`


def test_leaving_frees_everything(engines):
    with engines() as session:
        assert session._cuda.held
    assert session._cuda.closed
    assert not session._cuda.held
    assert session.memory is None
    session.set_budget(Budget())  # writes to no buffer


class TestKeptKernels:
    """Code that TensorRT-RTX compiles for one session is read by the next."""

    @staticmethod
    def compilations(session):
        """Number of compilations of all engines while a text is generated."""
        list(generate(session, PROMPTS, 3))
        return sum(piece._engine.compilations for piece in session._pieces.values())

    @staticmethod
    def again(session):
        cuda = HostCuda()
        folder = session._folder.parents[1]
        return TrtSession(folder, FLAVOUR, played(folder, cuda), lambda: cuda)

    def test_the_next_start_compiles_nothing(self, engines, tmp_path):
        first = engines()
        with first:
            decode = [piece._contexts["decode"].config for piece in first._pieces.values()]
            assert [config.dynamic_shapes_kernel_specialization_strategy for config in decode] == ["eager"] * 3
            assert self.compilations(first) == 8  # batches of 1 and 2: three graphs decode, two prefill one
        files = sorted((tmp_path / "cache" / "shadowllm").iterdir())
        digests = sorted(record.engine_sha256 for record in first._records.values())
        assert sorted(path.name for path in files) == [
            f"tensorrt_rtx-0.0.played-smNone-{digest}.kernels" for digest in digests
        ]
        before = [path.stat().st_mtime_ns for path in files]
        with self.again(first) as second:
            assert self.compilations(second) == 0
        assert [path.stat().st_mtime_ns for path in files] == before  # nothing new, nothing written

    def test_prompts_of_many_lengths_compile_a_few_graphs(self, engines):
        """Lengths are rounded up to 16, 32 and then the most that the engines take."""
        with engines(capacity=64, max_seqlen=40) as ours, reference(ours._folder.parents[1]) as theirs:
            ours.reset(), theirs.reset()
            stem = ours._pieces["stem"]._engine
            before = stem.compilations
            for length, compiled in ((3, 1), (1, 1), (16, 1), (17, 2), (32, 2), (29, 2), (33, 3), (40, 3)):
                prompt = [list(range(1, length + 1))]
                np.testing.assert_allclose(ours.prefill(prompt), theirs.prefill(prompt), atol=1e-4)
                assert stem.compilations - before == compiled
            for session in (ours, theirs):  # what padding left in the cache is not seen
                session.prefill([[5, 17, 42]])
            np.testing.assert_allclose(*(s.decode(np.array([7])) for s in (ours, theirs)), atol=1e-4)

    def test_a_damaged_file_is_replaced(self, engines, tmp_path):
        with engines() as first:
            pass
        files = list((tmp_path / "cache" / "shadowllm").iterdir())
        whole = [path.read_bytes() for path in files]
        for path in files:
            path.write_bytes(b"damaged")
        with self.again(first) as second:
            assert self.compilations(second) == 8
        assert all(path.read_bytes().startswith(b"played ") for path in files)
        assert [path.read_bytes() for path in files] != whole  # of a text too, and not of a start alone

    def test_where_nothing_can_be_kept_a_warning_says_so(self, engines, tmp_path):
        (tmp_path / "cache").write_text("a file")
        words = r"cannot keep compiled kernels in .*cache/shadowllm.*XDG_CACHE_HOME"
        with pytest.warns(RuntimeWarning, match=words), engines() as session:
            assert self.compilations(session) == 8


def test_what_is_played_is_there():
    """The real classes of TensorRT-RTX have every name that the fake ones define for a session."""
    trt = pytest.importorskip("tensorrt_rtx")
    pairs = {"IRuntimeCache": RuntimeCache, "IRuntimeConfig": RuntimeConfig, "IExecutionContext": Context}
    for name, ours in (*pairs.items(), ("ICudaEngine", Engine)):
        own = {"engine", "config", "profile", "scratch", "MAGIC", "compilations", "run"}
        used = {attribute for attribute in vars(ours) if not attribute.startswith("_")} - own
        assert used <= set(dir(getattr(trt, name))), name
    assert hasattr(trt.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(trt.ExecutionContextAllocationStrategy, "USER_MANAGED")


def test_engines_of_other_shapes_do_not_go_together(engines, bundle, tmp_path):
    session = engines()
    folder = session._folder.parents[1]
    write_engines(folder, read_manifest(folder), max_seqlen=4, pieces=("body",))
    with pytest.raises(UserError, match="built for different shapes"):
        TrtSession(folder, FLAVOUR, session._trt, HostCuda)


def test_engines_of_an_older_program_are_refused(engines, monkeypatch):
    monkeypatch.setattr("shadowllm.runtime.gpu.engine_buffers.OWN", {"prefill": {}, "decode": {}})
    with pytest.raises(UserError, match=r"has a tensor .* which is not known here; build the engine again"):
        engines().__enter__()


def test_no_engines_and_no_such_library(bundle, monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UserError, match=r"has no tensorrt_rtx engines; shadowllm build"):
        open_session(bundle(), "tensorrt_rtx")
    import tensorrt_rtx

    monkeypatch.setenv(PLUGINS_VARIABLE, "/no/such/library.so")
    with pytest.raises(UserError, match=rf"no plugin library /no/such/library.so; correct or unset {PLUGINS_VARIABLE}"):
        load_plugins.__wrapped__(tensorrt_rtx)
