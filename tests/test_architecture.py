"""Checks which file may import which, and how long files and functions are."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "shadowllm"
# Each row may import from itself and from the rows above it.
LAYERS = [
    {f"{PACKAGE}/{name}.py" for name in ("errors", "limits", "threads", "json_types", "progress", "malloc", "child")},
    {"models"},
    {f"{PACKAGE}/{name}.py" for name in ("config_fields", "config", "draft_config", "eval_config", "serve_config")},
    {"bundle"},
    {"plugins"},
    {"predictor"},
    {"exporter"},
    {"runtime"},
    {"evaluation"},
    {PACKAGE},  # the rest: the pipeline, the Python interface, the command line
    {"benchmarks"},
]
ROOMS = [name for layer in LAYERS for name in layer if not name.endswith(".py")]
MAX_LINES = 350
MAX_FUNCTION = 60
# With the reason why it is longer.
LONG_FUNCTIONS = {
    "shadowllm.plugins.tensorrt.creators.plugin_class": "holds a class, whose base is known only when it runs",
}


def name_of(path: Path) -> str:
    """The dotted name of a file in imports."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {
    name_of(path): path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*.py"))  # does not follow links
    if not (room == PACKAGE and path.relative_to(ROOT / room).parts[0] in ROOMS)  # Python before 3.13 does
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def imports(name: str) -> set[str]:
    """Files of the package that a file imports, also in functions and for types."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{SOURCES[name]}: imports are absolute here"
            base = node.module or ""
            submodules = {f"{base}.{alias.name}" for alias in node.names} & SOURCES.keys()
            named = submodules if len(submodules) == len(node.names) else submodules | {base}
            found |= named & SOURCES.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & SOURCES.keys()
    return found - {name}


IMPORTS = {name: imports(name) for name in SOURCES}


def layer_of(name: str) -> int:
    path = SOURCES[name].relative_to(ROOT)
    return next(i for i, layer in enumerate(LAYERS) if str(path) in layer or path.parts[0] in layer)


def functions(name: str) -> Iterator[tuple[str, int]]:
    """Each function of a file, and its number of lines without the docstring."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = len((ast.get_docstring(node, clean=False) or "").splitlines())
            yield f"{name}.{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1 - docstring


def test_every_source_is_looked_at():
    links = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_symlink()}
    assert links == set(ROOMS) - {PACKAGE}
    assert len(SOURCES) > 100


def test_rooms_import_in_one_direction():
    upward = [
        f"{SOURCES[name].relative_to(ROOT)} imports {target}"
        for name, targets in IMPORTS.items()
        for target in targets
        if layer_of(target) > layer_of(name)
    ]
    assert upward == []


def test_no_file_imports_itself_through_others():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_files_and_functions_are_short():
    files = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES.values()
    }
    long = {name for name, lines in files.items() if lines > MAX_LINES}
    assert not long
    long = {function for name in SOURCES for function, lines in functions(name) if lines > MAX_FUNCTION}
    assert long <= LONG_FUNCTIONS.keys()


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        # Running an engine must not need the packages that wrote it.
        ("shadowllm.runtime.gpu.trt_session", ("onnx", "onnx_ir", "onnxruntime")),
        # PyTorch takes 200 MB of memory.
        ("shadowllm.runtime.ort.session", ("torch", "transformers")),
        # Help and usage errors must not wait for slow imports.
        ("shadowllm.cli", ("torch", "onnx", "onnxruntime", "transformers")),
    ],
)
def test_modules_that_are_not_loaded(module, unwanted):
    script = f"import sys, {module}; print(*(name for name in {unwanted} if name in sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert found.stdout.split() == []
