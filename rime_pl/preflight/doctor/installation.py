"""Check the installation: package versions, 4-bit arithmetic, CPU, GPU. Called by `rime doctor`.

Each check takes what it looks at as an argument, so that a test can hand it a bad one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from torch import nn

#: Releases that were published by an attacker.
COMPROMISED = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
#: Packages whose requirements are checked.
STACK = ("rime_pl", "torch", "torchvision", "lightning", "transformers", "peft", "bitsandbytes")
#: CUDA major version of torch -> oldest Linux driver that runs it.
DRIVERS = {12: 525, 13: 580}
_INSTALL = "pip install -c constraints.txt"


@dataclass(frozen=True)
class Check:
    """The result of one check: a line of `rime doctor`."""

    name: str
    level: Literal["ok", "warning", "problem"]
    seen: str  # what was found
    remedy: str = ""  # what to do about it


def check_installation(wants_gpu: bool) -> list[Check]:
    """Return every check of this machine; `wants_gpu` says whether the settings ask for a GPU."""
    installed: dict[str, str] = {canonicalize_name(d.name): d.version for d in metadata.distributions()}
    requires = {name: metadata.requires(name) or [] for name in STACK if canonicalize_name(name) in installed}
    available = torch.cuda.is_available()
    devices = [torch.device("cpu"), *([torch.device("cuda")] if available else [])]
    return [
        versions(installed, requires),
        bad_versions(installed),
        *(four_bit(device) for device in devices),
        cpu_features(torch.backends.cpu.get_cpu_capability()),
        gpu(available, wants_gpu, torch.version.cuda, driver_version()),
    ]


def versions(installed: Mapping[str, str], requires: Mapping[str, Sequence[str]]) -> Check:
    """Report requirements that are not met, as `pip check` does, and a torchvision for another torch.

    Args:
        installed: Version of each package.
        requires: Requirements of some packages, from their metadata.
    """
    unmet = []
    for package, need in [
        (package, Requirement(line)) for package, lines in requires.items() for line in lines
    ]:
        found = installed.get(canonicalize_name(need.name), "")
        wanted = need.marker is None or need.marker.evaluate({"extra": ""})
        if wanted and not (found and need.specifier.contains(found, prereleases=True)):
            unmet.append(f"{package} needs {need.name}{need.specifier}, but {found or 'none'} is installed")
    torch_version, vision = (installed.get(name, "0.0") for name in ("torch", "torchvision"))
    pair = f"0.{Version(torch_version).minor + 15}"  # torchvision is built for one minor version of torch
    if not vision.startswith(f"{pair}."):
        unmet.append(f"torch {torch_version} needs torchvision {pair}, but {vision} is installed")
    if unmet:
        remedy = f"Run `make setup`, or `{_INSTALL} --editable .`"
        return Check("versions", "problem", "; ".join(unmet), remedy)
    return Check("versions", "ok", f"torch {torch_version}, torchvision {vision}; all requirements are met")


def bad_versions(installed: Mapping[str, str]) -> Check:
    """Report releases that are known to be harmful."""
    for package, releases in COMPROMISED.items():
        if installed.get(package) in releases:
            remedy = f"Run `{_INSTALL} --upgrade {package}`, and change this machine's passwords and keys."
            seen = f"{package} {installed[package]} is a compromised release"
            return Check("known-bad versions", "problem", seen, remedy)
    return Check("known-bad versions", "ok", "none is installed")


def four_bit(device: torch.device) -> Check:
    """Compare a 4-bit layer, forward and backward, with the same product by its unpacked weight."""
    name = f"4-bit layers on {device.type}"
    remedy = f"Run `{_INSTALL} bitsandbytes`. Until then, use --model.backbone.load_in_4bit false."
    try:
        error = four_bit_error(device)
    except Exception as failure:
        return Check(name, "problem", f"{type(failure).__name__}: {failure}", remedy)
    if not error <= 1e-4:
        return Check(name, "problem", f"the relative error of forward or backward is {error:.1e}", remedy)
    bnb = metadata.version("bitsandbytes")
    return Check(name, "ok", f"bitsandbytes {bnb}: the relative error of forward and backward is {error:.0e}")


def four_bit_error(device: torch.device) -> float:
    """Return the larger relative error of output and input gradient."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit

    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(nn.Linear(128, 64, bias=False).state_dict())
    layer.support_avx512bf16_for_cpu = False
    layer.to(device)
    weight: Any = layer.weight  # Params4bit, which knows its scales
    inputs = torch.randn(4, 128, device=device, requires_grad=True)
    outputs = layer(inputs), inputs @ dequantize_4bit(weight.data, weight.quant_state).T.float()
    gradients = [torch.autograd.grad(output.square().sum(), inputs)[0] for output in outputs]
    return max(float((packed - plain).norm() / plain.norm()) for packed, plain in (outputs, gradients))


def cpu_features(capability: str) -> Check:
    """Report a CPU without vector instructions, from what torch says it can use, e.g. "AVX2"."""
    if capability != "DEFAULT":
        return Check("CPU features", "ok", capability)
    remedy = "Training works, but it is slow. Use a CPU with AVX2 or newer, or a GPU."
    return Check("CPU features", "warning", "torch finds no vector instructions that it can use", remedy)


def gpu(available: bool, wanted: bool, cuda_built: str | None, driver: str | None = None) -> Check:
    """Report a missing GPU, or a driver that is too old.

    Args:
        available: ``torch.cuda.is_available()``.
        wanted: Whether trainer.accelerator is "gpu" or "cuda".
        cuda_built: ``torch.version.cuda``; None for a build without CUDA.
        driver: Version of NVIDIA's driver, if the machine has one.
    """
    if available:
        return Check("GPU", "ok", f"{torch.cuda.get_device_name(0)}, CUDA {cuda_built}, driver {driver}")
    oldest = DRIVERS.get(int(cuda_built.split(".")[0])) if cuda_built else None
    if driver and oldest and int(driver.split(".")[0]) < oldest:
        remedy = f"Update the driver to {oldest} or newer, or install a torch for an older CUDA."
        return Check("GPU", "problem", f"driver {driver} is too old for torch's CUDA {cuda_built}", remedy)
    if wanted:
        remedy = (
            "Run on a machine with a GPU, or use a recipe of configs/tiny with --trainer.accelerator cpu."
        )
        return Check("GPU", "problem", "the settings ask for a GPU, but torch finds none", remedy)
    return Check("GPU", "ok", "none; the recipes of configs/tiny need none")


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of NVIDIA's kernel driver; None if there is none."""
    if not file.is_file():
        return None
    return next((word for word in file.read_text().split() if word[:1].isdigit() and "." in word), None)
