"""The checks of `rime doctor`: the installation, and the settings, the corpus and the adapter of a run.

A check of the installation takes what it looks at as an argument, so that a test can hand it a bad one. For
the settings, the model is built without weights.
"""

from __future__ import annotations

import json
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

from rime_pl.backbone.adapters import load_adapter_weights, read_contract
from rime_pl.backbone.base_path import find_base
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.precision import check_precision
from rime_pl.datamodules.faults import listed
from rime_pl.datamodules.pair_check import Checked
from rime_pl.errors import RimeError
from rime_pl.preflight.plan.weightless import (
    WeightlessBackbone,
    local_folder,
    read_architecture,
    read_processor,
)
from rime_pl.processing import CONTRACT_FILE, RimeProcessor
from rime_pl.run_folder import RunFolder

#: Releases that were published by an attacker.
COMPROMISED = {"lightning": ("2.6.2", "2.6.3"), "pytorch-lightning": ("2.6.2", "2.6.3")}
#: Packages whose requirements are checked.
STACK = ("rime_pl", "torch", "torchvision", "lightning", "transformers", "peft", "bitsandbytes")
#: CUDA major version of torch -> oldest Linux driver that runs it.
DRIVERS = {12: 525, 13: 580}
#: Weights that share a scale in NF4.
BLOCK = 64
Level = Literal["ok", "warning", "problem"]
_INSTALL = "pip install -c constraints.txt"
_AGAIN = "Copy the folder again, or train the stage again."


@dataclass(frozen=True)
class Check:
    """The result of one check: a line of `rime doctor`."""

    name: str
    level: Level
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
        *(check for device in devices for check in (four_bit(device), four_bit_weights(device))),
        cpu_features(torch.backends.cpu.get_cpu_capability()),
        gpu(available, wants_gpu, torch.version.cuda, driver_version()),
    ]


def versions(installed: Mapping[str, str], requires: Mapping[str, Sequence[str]]) -> Check:
    """Report requirements that are not met, as `pip check` does, and a torchvision for another torch."""
    unmet = []
    needs = [(package, Requirement(line)) for package, lines in requires.items() for line in lines]
    for package, need in needs:
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
    return max((ours - plain).norm().item() / plain.norm().item() for ours, plain in (outputs, gradients))


def four_bit_weights(device: torch.device) -> Check:
    """Report weights that are read back otherwise than they were rounded, because of their width.

    bitsandbytes 0.50.2 does so on CPUs with AVX512: it starts a new block of 64 weights with each row.
    """
    name, remedy = f"4-bit weights on {device.type}", f"Run `{_INSTALL} bitsandbytes`."
    try:
        whole, cut = (reading_error(width, device) for width in (2 * BLOCK, 2 * BLOCK + 32))
    except Exception as failure:
        return Check(name, "problem", f"{type(failure).__name__}: {failure}", remedy)
    if not whole <= 0.15:
        return Check(name, "problem", f"they are read back with an error of {whole:.2f}, not 0.09", remedy)
    if not cut <= 0.15:
        seen = f"rows that are no multiple of {BLOCK} wide are read back with an error of {cut:.2f}, not 0.09"
        remedy = (
            "Checkpoints of the Qwen-VL family are not concerned. Tiny base models are: on a GPU or another "
            "CPU they give other vectors. Train, use and export them on machines of one kind."
        )
        return Check(name, "warning", seen, remedy)
    return Check(name, "ok", f"they are read back with an error of {whole:.2f}, which is that of rounding")


def reading_error(width: int, device: torch.device) -> float:
    """Return the relative error of normal weights, ``width`` in a row, after NF4; 0.09 is right."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0)).to(device)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=BLOCK)
    return float((dequantize_4bit(packed, state) - weight).norm() / weight.norm())


def cpu_features(capability: str) -> Check:
    """Report a CPU without vector instructions, from what torch says it can use, e.g. "AVX2"."""
    if capability != "DEFAULT":
        return Check("CPU features", "ok", capability)
    remedy = "Training works, but it is slow. Use a CPU with AVX2 or newer, or a GPU."
    return Check("CPU features", "warning", "torch finds no vector instructions that it can use", remedy)


def gpu(available: bool, wanted: bool, cuda_built: str | None, driver: str | None = None) -> Check:
    """Report a missing GPU if one is ``wanted``, or a ``driver`` too old for torch's CUDA, if it has any."""
    if available:
        return Check("GPU", "ok", f"{torch.cuda.get_device_name(0)}, CUDA {cuda_built}, driver {driver}")
    oldest = DRIVERS.get(int(cuda_built.split(".")[0])) if cuda_built else None
    if driver and oldest and int(driver.split(".")[0]) < oldest:
        remedy = f"Update the driver to {oldest} or newer, or install a torch for an older CUDA."
        return Check("GPU", "problem", f"driver {driver} is too old for torch's CUDA {cuda_built}", remedy)
    if wanted:
        remedy = "Use a machine with a GPU, or a recipe of configs/tiny with --trainer.accelerator cpu."
        return Check("GPU", "problem", "the settings ask for a GPU, but torch finds none", remedy)
    return Check("GPU", "ok", "none; the recipes of configs/tiny need none")


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """Return the version of NVIDIA's kernel driver; None if there is none."""
    if not file.is_file():
        return None
    return next((word for word in file.read_text().split() if word[:1].isdigit() and "." in word), None)


def check_backbone(config: BackboneConfig) -> list[Check]:
    """Check the checkpoint and the LoRA targets."""
    try:
        architecture = read_architecture(config.name_or_path)
    except RimeError as error:
        return [Check("checkpoint", "problem", str(error), "Correct --model.backbone.name_or_path.")]
    found = [Check("checkpoint", "ok", f"{config.name_or_path}: {architecture.model_type}")]
    try:
        backbone = WeightlessBackbone(config, architecture, read_processor(config, architecture))
    except RimeError as error:
        remedy = (
            "Leave model.backbone.lora_targets and lora_tower out. The default is every linear layer of the "
            "decoder, and none of the vision tower."
        )
        return [*found, Check("LoRA targets", "problem", str(error), remedy)]
    layers = [name for name, _ in backbone.peft.named_modules() if name.endswith("lora_A.default")]
    tower = sum(".visual." in name for name in layers)
    seen = f"{len(layers) - tower} linear layers of the language model, {tower} of the vision tower"
    return [*found, Check("LoRA targets", "ok", seen)]


def precision(trainer_precision: str | int | None, sharded: bool, load_in_4bit: bool) -> Check:
    """Report what the stage's own check of `trainer.precision` says."""
    name, remedy = "trainer.precision", "Set --trainer.precision 32-true."
    try:
        doubt = check_precision(trainer_precision, sharded, load_in_4bit)
    except RimeError as error:
        return Check(name, "problem", str(error), remedy)
    return Check(name, "warning", doubt, remedy) if doubt else Check(name, "ok", "Lightning casts nothing")


def batch(batch_size: int, processes: int) -> Check:
    """Every process needs the same number of pairs, and every query at least one negative."""
    if batch_size < 2 or batch_size % processes:
        seen = f"data.batch_size is {batch_size}, on {processes} process(es)"
        remedy = f"Set --data.batch_size to 2 or more, and to a multiple of {processes}."
        return Check("batch", "problem", seen, remedy)
    each = f"{batch_size // processes} pairs on each of {processes} process(es)"
    return Check("batch", "ok", f"{each}, {batch_size - 1} negatives per query")


def corpus(found: Checked, path: str) -> list[Check]:
    """Report what a run's corpus has, as `rime shards check` found it."""
    remedy = f"Correct the settings or the corpus. `rime shards check --path {path}` lists all its faults."
    levels: tuple[Level, ...] = ("problem", "warning")
    checks = []
    for level in levels:
        if faults := [fault for fault in found.faults if fault.level == level]:
            checks.append(Check("corpus", level, listed(faults, 10), remedy))
    seen = f"{path}: {found.pairs('train')} training pairs, and every sample can be read"
    return checks or [Check("corpus", "ok", seen)]


def check_adapter(folder: Path, base: str | None = None) -> Check:
    """Load the adapter onto its base model, without 4 bits, by the code that a run uses.

    ``folder`` is an adapter, a run, or lies above one run. ``base`` is the model in place of its own.
    """
    try:
        own = (folder / CONTRACT_FILE).is_file()
        adapter = folder if own else RunFolder.with_adapter(folder).adapter
        contract = read_contract(adapter)
        processor = RimeProcessor.from_adapter(adapter)
        config = BackboneConfig(**contract["backbone"] | {"load_in_4bit": False, "prompt": processor.prompt})
    except (RimeError, json.JSONDecodeError, KeyError, TypeError) as error:
        remedy = f"Give --adapter the folder of a finished run. If it is one: {_AGAIN.lower()}"
        return Check("adapter", "problem", f"{folder} cannot be read: {error}", remedy)
    try:
        named = find_base(adapter, contract, base)
        if (on_disk := local_folder(named)) is None:
            raise RimeError(f"The base model {named} is not on this machine.")
        config.name_or_path = on_disk
        backbone = Backbone(config, processor)
    except RimeError as error:
        remedy = "Name the folder of the base model with --config and --model.backbone.name_or_path."
        return Check("adapter", "warning", f"not compared with its base model. {error}", remedy)
    try:
        load_adapter_weights(backbone.peft, adapter, processor, backbone.base_hash, backbone.old_base_hash)
    except RimeError as error:
        return Check("adapter", "problem", str(error), _AGAIN)
    names = processor.prompt
    tokens = f"{names.disc_token} {processor.disc_id}, {names.gen_token} {processor.gen_id}"
    return Check("adapter", "ok", f"unchanged since it was saved; fits {named}; ids: {tokens}")
