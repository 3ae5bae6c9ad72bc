"""Bundles on disk: one data file, checks of names and hashes, and no incomplete bundles."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from shadowllm.bundle.certificate import best_weighting
from shadowllm.bundle.manifest import DATA_FILE, read_manifest, verify_files
from shadowllm.bundle.predictor_file import FINAL_SQUARES
from shadowllm.bundle.quantised_tensors import mean_square_errors
from shadowllm.bundle.weight_names import copy_weighting
from shadowllm.bundle.weights import map_copies, read_weights
from shadowllm.draft_config import TunedDrafts
from shadowllm.errors import UserError
from shadowllm.exporter.write_bundle import check_dtypes, write_bundle
from shadowllm.models.registry import load_model
from shadowllm.models.sparsity import Budget
from tests.bundles import BUDGET, make_bundle, make_predictor
from tests.conftest import VARIANTS


@pytest.mark.parametrize(
    ("variant", "kind"),
    [
        *product(VARIANTS, ["shadow", "layerwise", "quantized-shadow"]),
        *product(["llama-relu", "llama-blocks-relu", "opt"], ["relu"]),
    ],
)
def test_onnx_checker_accepts_every_piece(bundle, variant, kind):
    folder = bundle(variant, kind=kind)
    found = {path.stem for path in folder.glob("*.onnx")}
    assert found == {"dense", *read_manifest(folder).sparse_pieces}
    for piece in found:
        onnx.checker.check_model(str(folder / f"{piece}.onnx"))


@pytest.mark.parametrize(
    ("variant", "kind", "weight_dtype", "written"),
    [
        ("llama-gqa", "quantized-shadow", None, True),
        ("opt", "shadow", None, True),
        ("llama-gqa", "static", "int8", True),
        ("qwen3", "static", None, False),  # all heads are active in any case
    ],
)
def test_a_mixed_bundle_has_a_graph_for_all_heads(bundle, variant, kind, weight_dtype, written):
    folder = bundle(variant, kind=kind, rest="shadow", weight_dtype=weight_dtype)
    piece = folder / "body_all_heads.onnx"
    assert piece.exists() == written == read_manifest(folder).has_body_all_heads
    if written:
        onnx.checker.check_model(str(piece))
        graph = ir.load(piece).graph
        assert {node.op_type for node in graph if node.domain == "shadowllm"} == {"SparseMLP", "ShortlistLogits"}
        assert not any("head" in value.name for value in (*graph.inputs, *graph.outputs))


def test_the_selector_relu_is_refused_where_it_is_not_exact(checkpoint, tmp_path):
    with pytest.raises(UserError, match="needs an activation that is zero for many inputs, and the model has silu"):
        make_bundle(checkpoint("llama-gqa"), tmp_path, kind="relu")
    with pytest.raises(UserError, match="leave out --rest shadow"):
        make_bundle(checkpoint("opt"), tmp_path, kind="relu", rest="shadow")


def test_weights_lie_on_disk_once(bundle):
    folder = bundle()
    stored = sum(path.stat().st_size for path in folder.glob("*.onnx*"))
    spec = read_manifest(folder).spec
    assert stored < 4 * spec.n_parameters + 400_000  # float32, the predictor, page padding and four small graphs
    for piece in ("dense", "stem", "predictor", "body"):
        tensors = [value.const_value for value in ir.load(folder / f"{piece}.onnx").graph.initializers.values()]
        assert all(isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < 300 for tensor in tensors)


def test_weights_read_back(bundle, checkpoint):
    folder = bundle("llama-biases")
    weights = read_weights(folder, read_manifest(folder)).sparse
    original = load_model(checkpoint("llama-biases"))[1]
    assert all(torch.equal(weights[name], original[name]) for name in original)


def test_custom_ops_carry_their_layer(bundle):
    nodes = [node for node in ir.load(bundle() / "body.onnx").graph if node.domain == "shadowllm"]
    assert [(node.op_type, node.name) for node in nodes] == [
        (op, f"layers.{layer}.{part}")
        for layer in (1, 2)
        for op, part in (("SparseAttention", "attention"), ("SparseMLP", "mlp"))
    ]


def test_tensor_names_are_the_usual_ones(bundle):
    graph = ir.load(bundle() / "dense.onnx").graph
    assert [value.name for value in graph.inputs][:2] == ["input_ids", "position_ids"]
    assert {"past_key_values.0.key", "past_key_values.2.value"} <= {value.name for value in graph.inputs}
    assert {"logits", "present.0.key", "present.2.value"} <= {value.name for value in graph.outputs}


class TestManifest:
    @pytest.fixture
    def copy(self, bundle, tmp_path):
        shutil.copytree(bundle(), tmp_path / "bundle")
        return tmp_path / "bundle"

    def edit(self, folder, **changes):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def test_round_trip(self, copy):
        manifest = read_manifest(copy)
        manifest.write(copy)
        assert read_manifest(copy) == manifest

    def test_a_disk_that_is_full_leaves_the_old_one(self, copy, monkeypatch):
        before, names = (copy / "manifest.json").read_bytes(), set(copy.iterdir())

        def write_text(path, text):
            path.write_bytes(text[:9].encode())
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Path, "write_text", write_text)
        with pytest.raises(OSError, match="No space left") as raised:
            read_manifest(copy).write(copy)
        assert raised.value.filename == str(copy)
        assert set(copy.iterdir()) == names
        assert (copy / "manifest.json").read_bytes() == before

    @pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "..\\secret"])
    def test_a_path_cannot_leave_the_bundle(self, copy, name):
        self.edit(copy, files={name: "0" * 64})
        with pytest.raises(UserError, match="outside the bundle"):
            read_manifest(copy)

    @pytest.mark.parametrize("name", ["", ".", "./", "a\0b"])
    def test_a_name_must_be_one_of_a_file(self, copy, name):
        self.edit(copy, files={name: "0" * 64})
        with pytest.raises(UserError, match="is no file"):
            read_manifest(copy)

    def test_a_folder_is_no_file(self, copy):
        (copy / "folder").mkdir()
        with pytest.raises(UserError, match="folder is missing from the bundle, or is no file"):
            verify_files(copy, {"folder": "0" * 64})

    def test_a_link_out_of_the_bundle_counts_by_what_it_leads_to(self, copy, tmp_path):
        outside = tmp_path / "outside"
        shutil.move(copy / DATA_FILE, outside)
        (copy / DATA_FILE).symlink_to(outside)
        verify_files(copy, read_manifest(copy).files)
        outside.write_bytes(b"other contents")
        with pytest.raises(UserError, match="SHA-256 is not the one"):
            verify_files(copy, read_manifest(copy).files)

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"schema_version": 99}, "schema version 99, this program reads 2 and 3"),
            ({"schema_version": "3"}, r"damaged \(its schema version is '3'\)"),
            ({"schema_version": 3.0}, "damaged"),
            (
                {"op_domain_version": 2, "checksum": None},
                "has version 2 of the sparse ops, and this program has 1; export",
            ),
            ({"files": {}}, r"damaged \(it does not list model\.onnx\.data\)"),
            ({"spec": {}}, "not readable"),
            ({"files": None}, "damaged"),
            ({"unknown": 1}, "damaged"),
        ],
    )
    def test_unreadable(self, copy, changes, words):
        self.edit(copy, **changes)
        with pytest.raises(UserError, match=words):
            read_manifest(copy)

    @pytest.mark.parametrize("text", ["{", "[]", "null", "3", '"text"', "{}", "[" * 100_000])
    def test_not_a_manifest_at_all(self, copy, text):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(UserError, match="damaged"):
            read_manifest(copy)

    @pytest.mark.parametrize(
        ("place", "values"),
        [
            ("dtype", ["int3", None, 32]),
            ("weight_dtype", ["int3", "int6", 8, []]),
            ("selector", ["", None]),
            ("dense_layers", [None, "1", 1.0, True, 0, 3, -1]),
            ("budgets", [None, [], {}, 0.5, {"neurons": 0.5}, {"neurons": 0.5, "heads": "0.5"}]),
            ("budgets", [{"neurons": float("nan"), "heads": 1}, {"neurons": [0.5] * 9, "heads": 1}]),
            ("predictor", [None, [], {}, {"kind": "static", "rank": "16"}]),
            ("validation", [None, {"tolerance": 1}, {"tolerance": 1, "selection_agreement": 1, "errors": [3]}]),
            ("allocation", [{"target": {}}, {"target": {}, "measured": {"speedup": "fast"}}]),
            ("files", [None, [], {"stem.onnx": None}, {"stem.onnx": 3}]),
            ("spec", [None, [], 3]),
            ("model", [None, 3]),
        ],
    )
    def test_wrong_types_are_damage(self, copy, place, values):
        for value in values:
            self.edit(copy, **{place: value})
            with pytest.raises(UserError, match=r"manifest\.json is damaged"):
                read_manifest(copy)

    @pytest.mark.parametrize("wrong", [{"dense_ms": 0.0}, {"draft_ms": -1.0}, {"acceptance": 1.5}])
    def test_measurements_of_drafts_that_cannot_be_are_damage(self, copy, wrong):
        measured = {"acceptance": 0.9, "speedup": 1.2, "draft_ms": 9.0, "verify_ms": 30.0, "dense_ms": 20.0}
        record = {"budget": vars(Budget(neurons=0.1)), "draft_length": 4}
        self.edit(copy, drafting=record | {"measured": measured})
        assert read_manifest(copy).tuned_drafts == TunedDrafts(4, 0.9, 0.45, 1.5)
        self.edit(copy, drafting=record | {"measured": measured | wrong})
        with pytest.raises(UserError, match="drafts that cannot be"):
            read_manifest(copy)

    def test_a_part_that_is_missing_is_damage(self, copy):
        whole = json.loads((copy / "manifest.json").read_text())
        optional = {"weight_dtype", "selector", "rest", "allocation", "dense", "validation", "drafting"}
        optional |= {"adapter_fingerprint", "checksum"}
        for name in whole.keys() - optional:
            (copy / "manifest.json").write_text(json.dumps({k: v for k, v in whole.items() if k != name}))
            with pytest.raises(UserError, match=f"manifest.json is damaged .*{name}"):
                read_manifest(copy)

    def test_other_sizes_than_those_of_the_graphs_are_damage(self, copy):
        whole = json.loads((copy / "manifest.json").read_text())
        for name in ("vocab_size", "intermediate_size", "n_layers", "max_seqlen"):
            self.edit(copy, spec=whole["spec"] | {name: whole["spec"][name] + 1})
            with pytest.raises(UserError, match=r"manifest\.json is damaged \(its checksum"):
                read_manifest(copy)
        self.edit(copy, spec=whole["spec"], op_domain_version=0)
        with pytest.raises(UserError, match="its checksum"):
            read_manifest(copy)
        del whole["checksum"]  # as written by earlier versions
        (copy / "manifest.json").write_text(json.dumps(whole))
        assert read_manifest(copy).model == whole["model"]

    def test_more_layers_than_can_be(self, copy):
        spec = json.loads((copy / "manifest.json").read_text())["spec"]
        self.edit(copy, spec=spec | {"n_layers": 10**9})
        with pytest.raises(UserError, match=r"is damaged \(unsupported model: 1000000000 layers, more than 65536\)"):
            read_manifest(copy)

    def test_a_file_it_does_not_list(self, copy):
        self.edit(copy, files={DATA_FILE: "0" * 64})
        with pytest.raises(UserError, match="does not list stem"):
            read_manifest(copy).digests("stem.onnx")

    def test_missing_file(self, copy):
        (copy / "stem.onnx").unlink()
        with pytest.raises(UserError, match="missing"):
            verify_files(copy, read_manifest(copy).files)


def test_predictor_of_another_model(checkpoint, tmp_path):
    spec, _, _ = load_model(checkpoint("llama-gqa"))
    with pytest.raises(UserError, match="predictor of another model"):
        make_predictor(spec, "0" * 64).check_base(spec, load_model(checkpoint("llama-gqa"))[1].fingerprint())


def test_the_weighting_of_the_certificate_is_calibrated_if_there_was_text(checkpoint, tmp_path):
    spec, weights, files = load_model(checkpoint("llama-blocks"))
    table, stored = spec.output_table, {}
    predictor = make_predictor(spec, weights.fingerprint(), "quantized-shadow")
    squares = torch.rand(spec.hidden_size, generator=torch.Generator().manual_seed(5)) ** 4
    calibrated = replace(predictor, tensors=predictor.tensors | {FINAL_SQUARES: squares})
    for name, given in (("norm", predictor), ("text", calibrated)):
        folder = tmp_path / name
        folder.mkdir()
        manifest = write_bundle(folder, name, weights, files, given, budget=BUDGET, rest="shadow")
        stored[name] = map_copies(folder, manifest)[copy_weighting(table)].numpy()
    norm = weights["final_norm.weight"].square()
    for name, inputs in (("norm", norm), ("text", squares)):
        expected = best_weighting(inputs.numpy(), mean_square_errors(weights[table].numpy()))
        np.testing.assert_allclose(stored[name], expected, rtol=1e-6)


def test_the_same_export_twice_is_the_same(checkpoint, tmp_path):
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        hashes.append(make_bundle(checkpoint("opt"), tmp_path / name).files)
    assert hashes[0] == hashes[1]


def test_a_tokenizer_without_a_file_form_is_left_out_by_name(checkpoint, tmp_path, monkeypatch):
    spec, weights, opened = load_model(checkpoint("opt"))
    slow = SimpleNamespace(is_fast=False)
    monkeypatch.setattr(type(opened), "tokenizer", lambda self: slow)
    predictor = make_predictor(spec, weights.fingerprint())
    with pytest.warns(UserWarning, match=r"SimpleNamespace, cannot be written as tokenizer\.json: the bundle has none"):
        manifest = write_bundle(tmp_path, "slow", weights, opened, predictor, budget=BUDGET)
    assert not [name for name in manifest.files if name.startswith("tokenizer")]


class TestIntegerWeights:
    @pytest.mark.parametrize(
        ("variant", "dtype", "weight_dtype", "words"),
        [
            ("llama-gqa", "float32", "int4", "hidden size 48 is no multiple of 32"),
            ("llama-blocks", "float16", "int8", "float32 activations, not float16"),
            ("llama-blocks", "float32", "int3", "'int3' is not supported"),
        ],
    )
    def test_refused(self, checkpoint, variant, dtype, weight_dtype, words):
        with pytest.raises(UserError, match=words):
            check_dtypes(load_model(checkpoint(variant))[0], dtype, weight_dtype)

    def test_they_are_smaller(self, bundle):
        sizes = [(bundle("llama-blocks", weight_dtype=w) / DATA_FILE).stat().st_size for w in (None, "int8", "int4")]
        assert sizes[0] > 1.5 * sizes[1]  # o and down are stored twice, and the sizes are tiny
        assert sizes[1] > sizes[2]

    def test_a_copy_inside_them_costs_less_than_beside_them(self, bundle):
        """The copy alone is nearly as large as the residuals, and norms and bounds are all that it adds."""
        sizes = {
            (w, rest): (bundle("llama-blocks", weight_dtype=w, kind="quantized-shadow", rest=rest) / DATA_FILE).stat()
            for w, rest in (("int8", "drop"), ("int8", "shadow"), ("int6", "shadow"))
        }
        plain, nested, six = (found.st_size for found in sizes.values())
        assert six < nested < 1.1 * plain

    def test_a_copy_beside_them_is_refused(self, bundle, tmp_path):
        for weight_dtype, version in (("int8", 2), (None, 2), ("int8", 3)):
            folder = bundle("llama-blocks", weight_dtype=weight_dtype, kind="quantized-shadow", rest="shadow")
            record = json.loads((folder / "manifest.json").read_text()) | {"schema_version": version}
            (tmp_path / "manifest.json").write_text(json.dumps(record))
            if weight_dtype and version == 2:
                with pytest.raises(UserError, match="low-bit copy beside its int8 weights, not inside them"):
                    read_manifest(tmp_path)
            else:
                assert read_manifest(tmp_path).weight_dtype == weight_dtype

    def test_they_read_back_as_they_round(self, bundle, checkpoint):
        folder = bundle("llama-blocks", weight_dtype="int8")
        read, original = read_weights(folder, read_manifest(folder)), load_model(checkpoint("llama-blocks"))[1]
        for weights in (read.sparse, read.dense):
            for name in original:
                assert weights[name].shape == original[name].shape
                error = (weights[name] - original[name]).abs().max()
                assert error <= original[name].abs().max() / 100, name
        down = next(name for name in original if name.endswith("1.down_proj.weight"))
        assert not torch.equal(read.sparse[down], read.dense[down])
