"""From a stage's module and a batch to its plan: one real ``training_step`` on a backbone without weights.

Shallow models and small batches are simulated, and extrapolated to the whole. Nothing here repeats what a
stage computes: it is counted. Called by planning.py, tests/gpu and benchmarks/plan_error.py.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PretrainedConfig

from rime_pl.backbone.adapters import trained_values
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.generation import rollouts as sampling
from rime_pl.modules.base import RimeModule
from rime_pl.modules.contrastive import ContrastiveModule
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.preflight.plan.tracking import LiveBytes
from rime_pl.preflight.plan.weightless import WeightlessBackbone, read_processor
from rime_pl.processing import RimeProcessor
from rime_pl.scaling.micro_batches import micro_batches
from rime_pl.types import Batch, FurtherRows, Rows

#: Layers of the models that are simulated; a deeper one is extrapolated from them.
SHALLOW, DEEPER = 2, 4
#: Passes (micro-batches, or items_per_pass) of the batches that are simulated; a larger one is extrapolated.
FEW, MORE = 2, 4
#: Tokens of a rewrite that are sampled; the keys and values of those before are there without that.
LAST_TOKENS = 3
#: Bytes of each trained number, and of each of the optimizer's two moments: float32.
TRAINED_BYTES = 4
#: ("weights", part), ("peak", kind of work, number of the pass, part): bytes; ("flops",), ("trained",),
#: ("parameters",): counts. Each grows linearly with the number of layers; at another depth it is there too.
Numbers = dict[tuple[str, ...], float]


@dataclass(frozen=True)
class StagePlan:
    """What one step of a stage needs on one process."""

    stage: str
    parts: dict[str, int]  # bytes at the peak: the weights by part, then what the step adds
    flops: float  # of the step
    trained: int  # number of trained parameters
    parameters: int  # number of all parameters; a packed one counts as it was

    @property
    def peak(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())


def predict_stage(
    module: RimeModule, architecture: PretrainedConfig, batch: Batch, further: int = 0
) -> StagePlan:
    """Predict the memory and FLOPs of one training step of ``module`` on ``batch``, on one process.

    Args:
        module: A stage with its settings, without a backbone. It is not trained and can be used afterwards.
        architecture: The checkpoint's config, from ``read_architecture``.
        batch: What the data module would hand over. Only the shape of the pixel values is read.
        further: Hard negatives and further positives of each pair; they count as long as its target.

    Returns:
        Bytes at the peak, by part, and the FLOPs.
    """
    processor = read_processor(module.config, architecture)
    batch = rows_of(batch, torch.arange(len(batch)))
    shallow, deeper = _shallow(architecture)
    small, more = batch, batch
    size = rows_of_a_pass(module, batch)
    if len(batch) > (FEW + MORE) * size:  # or else the whole batch takes no longer
        small, more = longest(batch, FEW * size), longest(batch, FEW * size, (MORE - FEW) * size)
    base = simulate(module, shallow, processor, small, further)
    numbers = dict(base)
    for other, times in deeper:
        _extend(numbers, base, simulate(module, other, processor, small, further), times)
    numbers = _highest(numbers)
    if small is not batch:  # what a row keeps until the end of the step has nothing to do with depth
        few, several = _highest(base), _highest(simulate(module, shallow, processor, more, further))
        times = (num_tokens(batch) - num_tokens(small)) / (num_tokens(more) - num_tokens(small))
        flops = numbers["flops",] * (1 + times * (several["flops",] / few["flops",] - 1))
        _extend(numbers, few, several, times)
        numbers["flops",] = flops
    return _stage_plan(type(module).__module__.rpartition(".")[2], numbers)


def num_tokens(batch: Batch) -> int:
    """Return the tokens of a batch, without padding."""
    return sum(int(side.lengths().sum()) for side in batch.sides)


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
    peaks = ((key, size) for key, size in numbers.items() if key[0] == "peak" and best[key[1]] == key[2])
    return rest | {(*key[:2], key[3]): size for key, size in peaks}


def _shallow(architecture: PretrainedConfig) -> tuple[PretrainedConfig, list[tuple[PretrainedConfig, float]]]:
    """The same model with few layers; and with a few more, with how many such steps are missing."""
    text, vision = architecture.text_config.num_hidden_layers, architecture.vision_config.depth
    special = ("deepstack_visual_indexes", "fullatt_block_indexes")  # towers whose layers are not all alike
    whole_tower = vision <= DEEPER or any(getattr(architecture.vision_config, name, None) for name in special)
    low = SHALLOW if text > DEEPER else text, vision if whole_tower else SHALLOW
    steps = ((text, DEEPER, low[1], text > DEEPER), (vision, low[0], DEEPER, not whole_tower))
    return _with_depth(architecture, *low), [
        (_with_depth(architecture, *depths), (layers - SHALLOW) / (DEEPER - SHALLOW))
        for layers, *depths, missing in steps
        if missing
    ]


def _with_depth(architecture: PretrainedConfig, text: int, vision: int) -> PretrainedConfig:
    changed = copy.deepcopy(architecture)
    changed.text_config.num_hidden_layers, changed.vision_config.depth = text, vision
    if getattr(changed.text_config, "layer_types", None):
        changed.text_config.layer_types = changed.text_config.layer_types[:text]
    return changed


def longest(batch: Batch, count: int, others: int = 0) -> Batch:
    """Return the longest pairs of a batch, and some of the others, evenly chosen by length."""
    order = (batch.query.lengths() + batch.target.lengths()).sum(1).argsort(descending=True, stable=True)
    rest = order[count:]
    evenly = (torch.arange(others) + 0.5) * len(rest) / max(1, others)
    return rows_of(batch, torch.cat([order[:count], rest[evenly.long()]]))


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Return the pairs at ``rows``, repeats allowed; no two count as equal, so the loss compares all."""
    contents = torch.arange(len(rows))
    return Batch(batch.query.select(rows), batch.target.select(rows), contents, contents, batch.dataset)


def with_further(batch: Batch, count: int) -> Batch:
    """Return a batch whose pairs have ``count`` hard negatives each, as long as their targets."""
    if not count:
        return batch
    owner = torch.arange(len(batch)).repeat_interleave(count)
    rows = batch.target.select(owner)
    true = torch.ones(len(owner), dtype=torch.bool)
    content = torch.arange(len(owner)) - 2**62  # of no pair
    rows = replace(rows, annotated=~true)
    return replace(batch, further=FurtherRows(rows, owner, content, ~true, true, true))


def _stage_plan(stage: str, numbers: Numbers) -> StagePlan:
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
        flops=numbers["flops",],
        trained=trained,
        parameters=round(numbers["parameters",]),
    )


def rows_of_a_pass(module: RimeModule, batch: Batch) -> int:
    """Return how many rows go through the decoder together, at least: the longest ones."""
    if isinstance(module, ContrastiveModule):
        settings = module.micro_batches
        return len(micro_batches(batch.query.lengths().sum(1), settings.size, settings.tokens)[0])
    if not isinstance(module, RefineRLModule):
        return len(batch)
    rollouts = module.rollouts
    return (rollouts.items_per_pass or len(batch)) * (rollouts.passes_per_sampling or 1)


def simulate(
    module: RimeModule,
    architecture: PretrainedConfig,
    processor: RimeProcessor,
    batch: Batch,
    further: int = 0,
) -> Numbers:
    """Run one step and return its numbers."""
    step: Any = copy.deepcopy(module)
    backbone = step.backbone = WeightlessBackbone(module.config, architecture, processor)
    live = LiveBytes(backbone.tensors(), backbone.language_model.config.text_config.vocab_size)
    tower = backbone.language_model.model.visual
    for part in (tower, *tower.blocks):
        live.count_forward(part, "vision tower")
    backbone.language_model.model.language_model.register_forward_pre_hook(live.next_pass)
    _detach_from_trainer(step, live)
    with backbone.values:
        batch = replace(batch, query=without_values(batch.query), target=without_values(batch.target))
    batch = with_further(batch, further)
    with mock.patch.object(sampling, "decode", _last_tokens(sampling.decode, live)), live:
        if isinstance(module, RefineRLModule):
            with live.counting("reference adapter"):
                step.reference = trained_values(backbone)
        with live.counting("inputs"):
            inputs = batch.to("cpu", copy=True)
        del batch
        loss = step.training_step(inputs, 0)
        if step.automatic_optimization:
            with live.counting("backward"):
                step.backward(loss)
    numbers = static_numbers(backbone) | {("flops",): live.flops}
    for (*work, number), peak in live.peaks.items():
        numbers |= {("peak", str(work), str(number), part): size for part, size in peak.items()}
    return numbers


def _detach_from_trainer(step: Any, live: LiveBytes) -> None:
    """Replace what the module asks of Lightning's trainer."""

    def backward(loss: Tensor, *_: Any, **__: Any) -> None:
        with live.counting("backward"):
            loss.backward()

    nothing = lambda *_, **__: None  # noqa: E731
    step.log = step.log_dict = nothing
    step.backward_part = backward
    step.optimizers = lambda: SimpleNamespace(step=nothing, zero_grad=step.zero_grad)
    step.lr_schedulers = lambda: SimpleNamespace(step=nothing)


def without_values(rows: Rows) -> Rows:
    """Return rows with empty pixel values, made in the caller's context: on "meta", or under ``NoValues``."""
    pixels = rows.prompts.pixel_values
    empty = None if pixels is None else torch.empty(pixels.shape, dtype=pixels.dtype)
    return replace(rows, prompts=replace(rows.prompts, pixel_values=empty))


def _last_tokens(decode: Any, live: LiveBytes) -> Any:
    """Return ``decode`` of generation/decoding.py that runs the model only for the last tokens.

    Keys and values are there as if it had run for all, because most memory is in use at the end. The tokens
    that are left out count as many FLOPs as the last ones.
    """

    def decode_last(backbone: Any, state: Any, most: int, *choose: Any) -> Tensor:
        skipped = max(0, most - LAST_TOKENS)
        for layer in state.cache.layers:
            layer.keys, layer.values = (
                torch.cat([kept, kept[:, :, -1:].expand(-1, -1, skipped, -1)], dim=2)
                for kept in (layer.keys, layer.values)
            )
        state.mask = torch.cat([state.mask, torch.ones(len(state.mask), skipped, dtype=torch.int64)], dim=1)
        before = live.flops
        written = decode(backbone, state, most - skipped, *choose)
        live.flops += (live.flops - before) * skipped // (most - skipped)
        return torch.cat([torch.zeros(len(written), skipped, dtype=torch.int64), written], dim=1)

    return decode_last


def static_numbers(backbone: WeightlessBackbone) -> Numbers:
    """Bytes of the weights by part, and how many numbers there are and train."""
    sizes = {"4-bit weights": 0, "other frozen weights": 0, "trained weights": 0}
    packed = {id(layer.weight): layer.weight for layer in linear_4bit_modules(backbone).values()}
    unpacked = sum(weight.quant_state.shape.numel() - weight.numel() for weight in packed.values())
    frozen = dict.fromkeys(packed, "4-bit weights")
    if backbone.config.shard_tower:
        sizes |= {"vision tower weights": 0}
        frozen |= {id(p): "vision tower weights" for p in backbone.language_model.model.visual.parameters()}
    for tensor in backbone.tensors():
        part = frozen.get(id(tensor), "other frozen weights")
        sizes["trained weights" if tensor.requires_grad else part] += tensor.nbytes
    trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in backbone.parameters()) + unpacked
    weights: Numbers = {("weights", part): size for part, size in sizes.items()}
    return weights | {("trained",): trained, ("parameters",): parameters}
