"""Is the installation sound? Versions that belong together, 4-bit arithmetic, processor, GPU, our packages.

Called by `rime doctor`. Each check takes what it looks at as an argument, so that a test can hand it a bad
one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rime_pl.preflight.doctor.result import Check, ok, problem, warning

#: torch minor version -> torchvision minor version built against it.
PAIRS = {"2.11": "0.26", "2.12": "0.27", "2.13": "0.28", "2.14": "0.29"}
#: package -> releases that must not run, and why.
BAD = {
    "lightning": {"2.6.2": "a compromised release", "2.6.3": "a compromised release"},
    "pytorch-lightning": {"2.6.2": "a compromised release", "2.6.3": "a compromised release"},
}
OURS = ("rime_pl", "datamodules", "callbacks")
#: CUDA major version of the wheels -> oldest Linux driver that runs them (CUDA minor version compatibility).
DRIVERS = {12: 525, 13: 580}


def installed(names: tuple[str, ...]) -> dict[str, str]:
    """Version of each package, those that are missing left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def torch_pair(versions: Mapping[str, str]) -> Check:
    """torch and torchvision are built for each other: the wrong one fails at import."""
    name = "torch and torchvision"
    remedy = "Install the pair: make setup, or pip install -c constraints.txt torch torchvision."
    if "torch" not in versions or "torchvision" not in versions:
        return problem(
            name, f"installed: {dict(versions) or 'neither'}; Qwen3-VL's processor needs both", remedy
        )
    torch_minor, vision_minor = (_minor(versions[package]) for package in ("torch", "torchvision"))
    seen = f"{versions['torch']} with {versions['torchvision']}"
    if torch_minor not in PAIRS:
        return warning(name, f"{seen}: a torch that was not tested here", remedy)
    if PAIRS[torch_minor] != vision_minor:
        return problem(
            name, f"{seen}: torch {torch_minor} goes with torchvision {PAIRS[torch_minor]}", remedy
        )
    return ok(name, seen)


def bad_versions(versions: Mapping[str, str]) -> Check:
    """Releases that are known to be harmful."""
    for package, version in versions.items():
        if version in BAD.get(package, {}):
            why = BAD[package][version]
            remedy = f"pip install -c constraints.txt --upgrade {package}; change this machine's secrets."
            return problem("known-bad versions", f"{package} {version}: {why}", remedy)
    return ok("known-bad versions", "none installed")


def four_bit(device: torch.device) -> Check:
    """An NF4 layer, forward and backward, against the same product with its unpacked weight."""
    name = f"4-bit layers on {device.type}"
    remedy = "pip install -c constraints.txt bitsandbytes; until then --model.backbone.load_in_4bit false."
    try:
        error = four_bit_error(device)
    except Exception as failure:
        return problem(name, f"{type(failure).__name__}: {failure}", remedy)
    if not error <= 1e-4:
        return problem(name, f"forward or backward is off by {error:.1e} (relative)", remedy)
    return ok(
        name, f"bitsandbytes {metadata.version('bitsandbytes')}, forward and backward agree to {error:.0e}"
    )


def four_bit_error(device: torch.device) -> float:
    """Largest relative difference of output and input gradient."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import dequantize_4bit

    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict(nn.Linear(128, 64, bias=False).state_dict())
    layer.support_avx512bf16_for_cpu = False
    layer.to(device)
    given = torch.randn(4, 128, device=device, requires_grad=True)
    again = given.detach().clone().requires_grad_()
    packed = layer(given)
    weight: Any = layer.weight  # Params4bit, which knows its scales
    plain = again @ dequantize_4bit(weight.data, weight.quant_state).T.to(again.dtype)
    packed.square().sum().backward()
    plain.square().sum().backward()
    assert given.grad is not None and again.grad is not None
    pairs = ((packed, plain), (given.grad, again.grad))
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def processor_features(capability: str) -> Check:
    """What the CPU's matrix products are compiled for.

    Args:
        capability: From ``torch.backends.cpu.get_cpu_capability()``, e.g. "AVX2".
    """
    if capability in ("AVX2", "AVX512", "DEFAULT") and capability != "DEFAULT":
        return ok("CPU features", capability)
    remedy = "Training works and is slow; use a CPU with AVX2 or newer, or a GPU."
    return warning("CPU features", f"{capability}: no vector instructions that torch uses", remedy)


def gpu(available: bool, wanted: bool, cuda_built: str | None, driver: str | None = None) -> Check:
    """A GPU where the settings ask for one, and a driver that runs torch's CUDA.

    Args:
        available: ``torch.cuda.is_available()``.
        wanted: Whether trainer.accelerator is "gpu" or "cuda".
        cuda_built: ``torch.version.cuda``; None for a build without CUDA.
        driver: Its version, if the machine has one.
    """
    if available:
        return ok("GPU", f"{torch.cuda.get_device_name(0)}, CUDA {cuda_built}, driver {driver or 'unknown'}")
    oldest = DRIVERS.get(int(cuda_built.split(".")[0])) if cuda_built else None
    if driver and oldest and int(driver.split(".")[0]) < oldest:
        remedy = f"Update the driver to {oldest} or newer, or install a torch for an older CUDA."
        return problem("GPU", f"driver {driver} is too old for torch's CUDA {cuda_built}", remedy)
    if wanted:
        remedy = (
            "Run on a machine with a GPU, or --trainer.accelerator cpu with a tiny recipe (configs/tiny)."
        )
        return problem("GPU", "the settings ask for a GPU and torch sees none", remedy)
    return ok("GPU", "none: the tiny recipes need none")


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Version of NVIDIA's kernel driver, None without one."""
    if not file.is_file():
        return None
    return next((word for word in file.read_text().split() if word[:1].isdigit() and "." in word), None)


def shadowing(names: tuple[str, ...], root: Path) -> Check:
    """`callbacks` and `configs` exist as packages elsewhere: ours must be the ones that Python finds.

    Args:
        names: Packages.
        root: The folder that holds ours.
    """
    remedy = f"Remove or rename it, or install this project with pip install --editable {root}."
    for name in names:
        spec = importlib.util.find_spec(name)
        where = None if spec is None or spec.origin is None else Path(spec.origin).parent
        if where is None or where.resolve() != (root / name).resolve():
            return problem(
                "packages", f"Python finds {name!r} in {where or 'no place'}, not in {root}", remedy
            )
    return ok("packages", f"{', '.join(names)} come from {root}")


def check_installation(wants_gpu: bool) -> list[Check]:
    """All of the above on this machine."""
    versions = installed(("torch", "torchvision", "lightning", "pytorch-lightning"))
    pair = {name: version for name, version in versions.items() if name in ("torch", "torchvision")}
    available = torch.cuda.is_available()
    devices = [torch.device("cpu"), *([torch.device("cuda")] if available else [])]
    return [
        torch_pair(pair),
        bad_versions(versions),
        *(four_bit(device) for device in devices),
        processor_features(torch.backends.cpu.get_cpu_capability()),
        gpu(available, wants_gpu, torch.version.cuda, driver_version()),
        shadowing(OURS, Path(__file__).parents[2]),
    ]


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])
