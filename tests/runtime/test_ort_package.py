"""ONNX Runtime is installed once, from one of its two packages."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from shadowllm.errors import UserError
from shadowllm.runtime.ort_package import PACKAGES, check_package

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def pretend_installed(folder: Path, package: str) -> None:
    """Write the metadata of a package, as pip leaves it."""
    name = package.replace("-", "_")
    metadata = folder / f"{name}-1.32.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.32.0\n")


def test_one_package_is_right():
    check_package()


def test_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"not installed; .*shadowllm\[onnxruntime\].*shadowllm\[onnxruntime-gpu\]"):
        check_package()


def test_both_packages(monkeypatch, tmp_path):
    for package in PACKAGES:
        pretend_installed(tmp_path, package)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"both installed, .*; pip uninstall onnxruntime onnxruntime-gpu, then"):
        check_package()


def test_the_command_line_says_it_in_one_line(tmp_path, bundle):
    for package in PACKAGES:
        pretend_installed(tmp_path, package)
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from shadowllm.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "run", str(bundle()), "--prompt", "Hello", "--backend", "ort"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "onnxruntime and onnxruntime-gpu are both installed" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_extras():
    """Each package has its own extra, no extra has both, and nothing installs one of them unasked."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]

    def packages(needs: list[str]) -> set[str]:
        names = {re.split(r"[\[<>=;~ ]", need)[0] for need in needs}
        own = [name for need in needs if need.startswith("shadowllm[") for name in need[10:-1].split(",")]
        return names.union(*(packages(extras[name]) for name in own))

    assert packages(project["dependencies"]).isdisjoint(PACKAGES)
    assert [packages(extras[package]) for package in PACKAGES] == [{package} for package in PACKAGES]
    assert "onnxruntime" in packages(extras["dev"])
    assert not [name for name, needs in extras.items() if packages(needs) >= set(PACKAGES)]
