"""The environment of a measurement: hardware, software, commit and date. No host names, no paths."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "shadowllm",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx-ir",
    "torch",
    "numpy",
    "transformers",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


def environment(threads: int | None = None) -> dict[str, Any]:
    """Return CPU model, cores, RAM in 1e9 bytes, OS, Python, package versions, commit, date and threads, for JSON.

    Args:
        threads: threads of each session; None is recorded as the number of cores.
    """
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "ram_gb": ram_gb(),
        "os": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
        "commit": git_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": threads or os.cpu_count(),
    }


def cpu_model() -> str:
    """Return the name of the processor, from the operating system."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def ram_gb() -> float | None:
    """Return the physical memory in 1e9 bytes, or None if it is unknown."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)


def package_versions(names: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Return the commit of this source tree, with "-dirty" for local changes. None if this is an installed copy."""
    folder = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(folder)]
        done = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # An installed copy may be inside the repository of another project, whose commit means nothing here.
    return done.stdout.strip() or None if done.returncode == tracked.returncode == 0 else None
