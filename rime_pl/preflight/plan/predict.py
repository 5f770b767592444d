"""From a stage's module and a batch to its plan: shallow models are simulated and extrapolated to full depth.

Called by planning.py, tests/gpu and benchmarks/plan_error.py.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from transformers import PretrainedConfig

from rime_pl.modules.base import RimeModule
from rime_pl.preflight.plan.arithmetic import TRAINED_BYTES, StagePlan
from rime_pl.preflight.plan.simulate import Numbers, rows_of_a_pass, simulate
from rime_pl.preflight.plan.tracking import Largest
from rime_pl.preflight.plan.weightless import read_processor
from rime_pl.types import Batch

#: Layers of the models that are simulated; a deeper one is extrapolated from them.
SHALLOW, DEEPER = 2, 4
#: Passes (micro-batches, or items_per_pass) of the batches that are simulated; a larger one is extrapolated.
FEW, MORE = 2, 6


def predict_stage(module: RimeModule, architecture: PretrainedConfig, batch: Batch) -> StagePlan:
    """Predict the memory and FLOPs of one training step of ``module`` on ``batch``, on one process.

    Args:
        module: A stage with its settings, without a backbone. It is not trained and can be used afterwards.
        architecture: The checkpoint's config, from ``read_architecture``.
        batch: What the data module would hand over. Only the shape of the pixel values is read.

    Returns:
        Bytes at the peak, by part, the largest tensor and the FLOPs.
    """
    processor = read_processor(module.config, architecture)
    # no two of equal content: the loss compares all, which is the most
    distinct = torch.arange(len(batch))
    batch = replace(batch, query_content=distinct, target_content=distinct)
    shallow, deeper = _shallow(architecture)
    small, more = batch, batch
    if len(batch) > MORE:
        size = rows_of_a_pass(module, shallow, processor, batch)
        if len(batch) > MORE * size:
            small, more = _longest(batch, FEW * size), _longest(batch, FEW * size, (MORE - FEW) * size)
    base = simulate(module, shallow, processor, small)
    numbers = dict(base.numbers)
    for other, times in deeper:
        _extend(numbers, base.numbers, simulate(module, other, processor, small).numbers, times)
    numbers = _highest(numbers)
    if small is not batch:  # what a row keeps until the end of the step has nothing to do with depth
        few, several = (
            _highest(found) for found in (base.numbers, simulate(module, shallow, processor, more).numbers)
        )
        times = (len(batch) - len(small)) / (len(more) - len(small))
        flops = 1 + times * (several["flops",] / few["flops",] - 1)
        deep = numbers["flops",]
        _extend(numbers, few, several, times)
        numbers["flops",] = deep * flops
    return _stage_plan(type(module).__module__.rpartition(".")[2], numbers, base.largest)


def _extend(numbers: Numbers, base: Numbers, other: Numbers, times: float) -> None:
    """Add ``times`` the difference of two simulations."""
    for key in base.keys() | other.keys():
        numbers[key] = numbers.get(key, 0) + times * (other.get(key, 0) - base.get(key, 0))


def _highest(numbers: Numbers) -> Numbers:
    """Of each kind of work, the pass with the highest peak; ("peak", kind, part)."""
    totals: dict[tuple[str, ...], float] = defaultdict(float)
    for key, size in numbers.items():
        if key[0] == "peak":
            totals[key[1:3]] += size
    ordered: Any = sorted(totals, key=lambda one: totals[one])
    best = dict(ordered)  # the last is the highest
    rest = {key: value for key, value in numbers.items() if key[0] != "peak"}
    peaks = {key: size for key, size in numbers.items() if key[0] == "peak" and best[key[1]] == key[2]}
    return rest | {(*key[:2], key[3]): size for key, size in peaks.items()}


def _shallow(architecture: PretrainedConfig) -> tuple[PretrainedConfig, list[tuple[PretrainedConfig, float]]]:
    """The same model with few layers; and with a few more, with how many such steps are missing."""
    text, vision = architecture.text_config.num_hidden_layers, architecture.vision_config.depth
    special = ("deepstack_visual_indexes", "fullatt_block_indexes")  # towers whose layers are not all alike
    whole_tower = vision <= DEEPER or any(getattr(architecture.vision_config, name, None) for name in special)
    low = SHALLOW if text > DEEPER else text, vision if whole_tower else SHALLOW
    deeper = []
    if text > DEEPER:
        deeper.append((_with_depth(architecture, DEEPER, low[1]), (text - SHALLOW) / (DEEPER - SHALLOW)))
    if not whole_tower:
        deeper.append((_with_depth(architecture, low[0], DEEPER), (vision - SHALLOW) / (DEEPER - SHALLOW)))
    return _with_depth(architecture, *low), deeper


def _with_depth(architecture: PretrainedConfig, text: int, vision: int) -> PretrainedConfig:
    changed = copy.deepcopy(architecture)
    changed.text_config.num_hidden_layers, changed.vision_config.depth = text, vision
    if getattr(changed.text_config, "layer_types", None):
        changed.text_config.layer_types = changed.text_config.layer_types[:text]
    return changed


def _longest(batch: Batch, count: int, others: int = 0) -> Batch:
    """The longest pairs of a batch, and some of the others, evenly chosen by length."""
    order = (batch.query.lengths() + batch.target.lengths()).sum(1).argsort(descending=True, stable=True)
    rest = order[count:]
    evenly = (torch.arange(others) + 0.5) * len(rest) / max(1, others)
    rows = torch.cat([order[:count], rest[evenly.long()]])
    return replace(
        batch,
        query=batch.query.select(rows),
        target=batch.target.select(rows),
        query_content=batch.query_content[rows],
        target_content=batch.target_content[rows],
        keys=[],
        query_texts=[],
    )


def _stage_plan(stage: str, numbers: Numbers, largest: Largest) -> StagePlan:
    trained = round(numbers["trained",])
    weights = {key[1]: round(size) for key, size in numbers.items() if key[0] == "weights"}
    peaks: dict[str, dict[str, int]] = {
        # the optimiser's own turn: all gradients, and as much again where it updates all at once (CUDA)
        "optimiser": {"backward": 2 * trained * TRAINED_BYTES}
    }
    for key, size in numbers.items():
        if key[0] == "peak":
            peaks.setdefault(key[1], {})[key[2]] = max(0, round(size))
    highest = max(peaks.values(), key=lambda parts: sum(parts.values()))
    return StagePlan(
        stage=stage,
        parts=weights | {"optimiser states": 2 * trained * TRAINED_BYTES} | highest,
        largest=largest.bytes,
        largest_operation=f"{largest.operation} {'x'.join(map(str, largest.shape))}",
        flops=numbers["flops",],
        trained=trained,
        parameters=round(numbers["parameters",]),
    )
