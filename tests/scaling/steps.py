"""The same training step on a whole batch, or on the part of one rank. Run by one process and by two.

`python -m tests.scaling.steps RANK FOLDER BASE CORPUS CASES` is one of the two processes that
test_two_processes.py starts. It writes its results to FOLDER/<rank>.pt. CASES is `fast` or `long`, or both
with a comma.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import linear_4bit_modules, packed_digests
from rime_pl.datamodules.ranks import rank_slice
from rime_pl.errors import RimeError
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.settings import MicroBatchSettings
from rime_pl.modules.sft import SFTModule
from rime_pl.scaling import sharding
from rime_pl.scaling.gather import (
    all_gather_completions,
    all_gather_rows,
    all_reduce_sum,
    any_rank,
    gather_objects,
    rank,
    world_size,
)
from rime_pl.scaling.micro_batches import micro_batches
from rime_pl.scaling.sharding import shard_backbone
from rime_pl.types import Batch, Completions, Pair
from tests.micro import (
    RewardPairs,
    build_backbone,
    micro_config,
    mixed,
    randomise_adapter,
    read_pairs,
    refine_rl_module,
)

#: Name -> stage, rows with further targets, tokens of a micro-batch. Rank 0 has the rows 0 to 3.
FURTHER: dict[str, tuple[str, list[int], int | None]] = {
    "sft": ("sft", [0, 1, 2, 5], None),
    "cma, on one rank only": ("cma", [1, 3], None),
    "cma, cached": ("cma", [0, 2, 5, 6], 60),
}
STAGES: dict[str, type[RimeModule]] = {"sft": SFTModule, "cma": CMAModule}


def global_batch(corpus: Path) -> list[Pair]:
    """8 pairs: texts and pictures, duplicates on different ranks, rewrites missing on one rank only."""
    pairs = mixed(read_pairs(corpus, "train"), 8)
    pairs[6] = replace(pairs[6], target=replace(pairs[6].target, content_id=pairs[1].target.content_id))
    for row in (4, 5, 7):
        pairs[row] = replace(pairs[row], target=replace(pairs[row].target, rewrite=None))
    return pairs


def apart(pairs: list[Pair]) -> list[Pair]:
    """The same pairs, ordered so that one rank has queries with only text and the other with pictures."""
    return [*pairs[::2], *pairs[1::2]]


def micro_module(
    stage: str, base: Path, micro_batch_tokens: int | None = None, **backbone_settings: Any
) -> RimeModule:
    """A stage with random adapter values, because at the start half of the gradients are 0."""
    backbone = build_backbone(micro_config(base, **backbone_settings))
    randomise_adapter(backbone.peft, scale=0.05)
    micro_batches = MicroBatchSettings(tokens=micro_batch_tokens)
    module = STAGES[stage](backbone.config, micro_batches=micro_batches)  # type: ignore[call-arg]
    module.backbone = backbone
    module.log = lambda *_, **__: None  # type: ignore[assignment]
    return module


def local_batch(module: RimeModule, pairs: list[Pair], further: bool = False) -> Batch:
    """The part of this rank, selected and tokenised like in the data module."""
    mine = rank_slice(range(len(pairs)), rank(), world_size())
    return module.model.processor.training_batch([pairs[n] for n in mine], further=further)


def with_further(pairs: list[Pair], rows: Sequence[int]) -> list[Pair]:
    """The pairs at some rows with hard negatives and further positives: an uneven number on each rank."""
    found = list(pairs)
    for number, row in enumerate(rows):
        others = [
            replace(pairs[(row + 1 + n) % len(pairs)].target, content_id=f"further {n}") for n in range(3)
        ]
        negatives = (others[0], replace(others[1], rewrite=None), pairs[row].target)[: 1 + number]
        found[row] = replace(pairs[row], hard_negatives=negatives, positives=(others[2],) * (number % 2))
    return found


def step(
    stage: str, base: Path, corpus: Path, further: Sequence[int] | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """Loss and parameter gradients of one step; on several ranks their means, as DDP computes them.

    Args:
        stage, base, corpus: See above.
        further: Rows of the global batch with further targets.
        tokens: Size of a micro-batch, with the gradient cache.
    """
    module, pairs = micro_module(stage, base, tokens), global_batch(corpus)
    batch = local_batch(
        module, pairs if further is None else with_further(pairs, further), further is not None
    )
    loss = module.training_step(batch, 0)
    module.backward(loss)
    gradients = {n: p.grad for n, p in module.named_parameters() if p.requires_grad and p.grad is not None}
    mean = {name: all_reduce_sum(gradient) / world_size() for name, gradient in gradients.items()}
    return {"loss": float(all_reduce_sum(loss) / world_size()), "gradients": mean}


def refine_rl_start(base: Path, pairs: list[Pair], settings: dict[str, Any], **groups: Any) -> Any:
    """Return the module, ready for a step.

    Args:
        base, pairs: The model, and the global batch.
        settings: Of the backbone.
        groups: Other settings.
    """
    backbone = build_backbone(micro_config(base, **settings))
    # no clipping: a real run clips the mean over ranks
    module: Any = refine_rl_module(backbone, policy={"max_grad_norm": 1e9}, **groups)
    randomise_adapter(
        backbone.peft, seed=3, scale=0.02
    )  # other values than the reference, so that there is a KL divergence
    module.prepare(RewardPairs(backbone.processor, pairs))
    return module


def of_one_task(corpus: Path) -> list[Pair]:
    return [replace(pair, dataset="one") for pair in global_batch(corpus)]


def refine_rl_step(base: Path, pairs: list[Pair], **settings: Any) -> dict[str, Any]:
    """One Refine-RL step of both sides: logged values and gradients, each as the mean over ranks."""
    module = refine_rl_start(base, pairs, settings)
    gradients: dict[str, Tensor] = {}

    def keep(optimizer: Any) -> None:
        gradients.update({n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad})

    optimizer = module.optimizers()
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: keep(optimizer))
    rolled = []
    sample = module.sample
    module.sample = lambda batch: rolled.append(sample(batch)) or rolled[-1]
    module.training_step(local_batch(module, pairs), 0)
    values = {
        name: all_reduce_sum(torch.tensor(value)) / world_size()
        for name, value in module.logged_values.items()
    }
    return {
        "logged": {name: float(value) for name, value in values.items()},
        "gradients": {name: all_reduce_sum(g) / world_size() for name, g in gradients.items()},
        "texts": gather_objects(
            [
                module.model.processor.decode(part.rollouts.completions)
                for parts, _ in rolled
                for part in parts
            ]
        ),
    }


class Exchanges(L.Callback):
    """Counts the numbers that DDP exchanges, and keeps the gradients of the update."""

    def __init__(self) -> None:
        self.exchanged = 0
        self.gradients: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def counted(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
            self.exchanged += bucket.buffer().numel()
            return allreduce_hook(None, bucket)

        model: Any = trainer.model
        model.register_comm_hook(None, counted)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        named = pl_module.named_parameters()
        self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}


def refine_rl_under_ddp(base: Path, pairs: list[Pair], **settings: Any) -> dict[str, Any]:
    """The same step by Lightning under DDP, in one part for each item on each rank."""
    module = refine_rl_start(base, pairs, settings, rollouts={"items_per_pass": 1})
    for name in ("backward_part", "optimizers", "lr_schedulers", "log"):
        delattr(module, name)  # the stand-ins for a trainer
    module.on_fit_start = lambda: None
    os.environ["LOCAL_RANK"] = str(rank())
    seen = Exchanges()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size(),
        strategy=DDPStrategy(cluster_environment=LightningEnvironment()),
        use_distributed_sampler=False,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[seen],
    )
    trainer.fit(module, DataLoader([local_batch(module, pairs)], batch_size=None))  # type: ignore[arg-type]
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    return {"gradients": seen.gradients, "exchanged": seen.exchanged, "trained": trained}


def sharded_step(base: Path, corpus: Path, dtype: str = "float32") -> dict[str, Any]:
    """One CMA step and a greedy rewrite with the backbone sharded by FSDP2."""
    module = micro_module("cma", base, dtype=dtype)
    before = _packed(module.model)
    whole = sum(p.numel() for p in module.parameters())
    shard_backbone(module.model, init_device_mesh("cpu", (world_size(),)))
    local = sum(_local(p).numel() for p in module.parameters())
    batch = local_batch(module, global_batch(corpus))
    loss = module.training_step(batch, 0)
    loss.backward()
    gradients = {
        n: _full(p.grad) for n, p in module.named_parameters() if p.requires_grad and p.grad is not None
    }
    module.eval()
    goes_on = partial(any_rank, device=torch.device("cpu"))
    rewrites = write_rewrites(module.model, batch.query.prompts, max_new_tokens=4, goes_on=goes_on)
    return {
        "loss": float(all_reduce_sum(loss) / world_size()),
        "gradients": gradients,
        "before": before,
        "after": _packed(module.model),
        "share": local / whole,
        "rewrites": gather_objects(module.model.processor.decode(rewrites.completions)),
    }


@dataclass(frozen=True)
class Case:
    """A CMA step with the gradient cache on several processes, under DDP or FSDP2."""

    strategy: Literal["ddp", "fsdp"]
    load_in_4bit: bool = True
    shard_base: bool = True
    gradient_checkpointing: bool = False

    def settings(self) -> dict[str, bool]:
        return {
            "load_in_4bit": self.load_in_4bit,
            "shard_base": self.shard_base,
            "gradient_checkpointing": self.gradient_checkpointing,
        }


CASES: dict[str, dict[str, Case]] = {
    "fast": {"ddp nf4": Case("ddp"), "fsdp nf4": Case("fsdp")},
    "long": {
        "ddp fp32": Case("ddp", load_in_4bit=False),
        "ddp nf4 checkpointed": Case("ddp", gradient_checkpointing=True),
        "fsdp fp32": Case("fsdp", load_in_4bit=False),
        "fsdp nf4 checkpointed": Case("fsdp", gradient_checkpointing=True),
        "fsdp nf4 whole base": Case("fsdp", shard_base=False),
        "fsdp fp32 whole base": Case("fsdp", load_in_4bit=False, shard_base=False),
    },
}
#: Tokens of a micro-batch on rank 0 and on rank 1, so that their numbers of micro-batches differ.
BUDGETS = (100, 1)


class Forwarded(nn.Module):
    """The training step as ``forward``, which DDP needs; Lightning does the same."""

    def __init__(self, module: RimeModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Batch) -> Tensor:
        return self.module.training_step(batch, 0)


def cached_step(case: Case, base: Path, corpus: Path) -> dict[str, Any]:
    """Loss, gradients and number of forwards of two steps; their gradients are added and halved."""
    budget = BUDGETS[rank()]
    module = micro_module("cma", base, budget, **case.settings())
    whole = _frozen_in_layers(module)
    step: nn.Module = Forwarded(module)
    if case.strategy == "ddp":
        step = DistributedDataParallel(step)
    else:
        shard_backbone(module.model, init_device_mesh("cpu", (world_size(),)))
    batch = local_batch(module, apart(global_batch(corpus)))
    own = len(micro_batches(batch.query.lengths().sum(1), None, budget))
    forwards: list[int] = []
    module.model.register_forward_hook(lambda m, args, out: forwards.append(len(out.disc)))
    for _ in range(2):
        loss = step(batch)
        module.backward(loss)
    gradients = {
        n: _full(p.grad) / 2 for n, p in module.named_parameters() if p.requires_grad and p.grad is not None
    }
    return {
        "loss": float(all_reduce_sum(loss) / world_size()),
        "gradients": gradients,
        "micro_batches": own,
        "forwards": len(forwards),
        "share": _frozen_in_layers(module) / whole,
    }


def _frozen_in_layers(module: RimeModule) -> int:
    """How many frozen numbers of the decoder layers this process holds."""
    layers = module.model.language_model.model.language_model.layers
    return sum(_local(p).numel() for p in layers.parameters() if not p.requires_grad)


def nan_patterns(dtype: str, base: Path) -> dict[str, list[dict[str, str]]]:
    """Digests before and after of packed weights that are NaN, quiet and signalling, in the storage dtype."""
    backbone = build_backbone(micro_config(base, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    for module in linear_4bit_modules(backbone).values():
        data = module.weight.data.view(torch.uint8)
        data.copy_(torch.randint(256, data.shape, generator=generator, dtype=torch.uint8))
        values = module.weight.data.flatten().view(torch.int32)
        values[:4] = torch.tensor([0x7FC00001, 0x7F800001, -1, 0x7FC17FC1], dtype=torch.int32)
        assert module.weight.data.isnan().any()
    before = [packed_digests(backbone)]
    shard_backbone(backbone, init_device_mesh("cpu", (world_size(),)))  # also checks the bytes itself
    layers = backbone.language_model.model.language_model.layers
    for layer in layers:
        layer.unshard()
    after = packed_digests(backbone)
    for layer in layers:
        layer.reshard()
    return {"before": before, "after": [after]}


def damaged(base: Path) -> str:
    """The error message if the all-gather does not return the same bytes."""
    backbone = build_backbone(micro_config(base))
    seen = iter([packed_digests(layer) for layer in backbone.language_model.model.language_model.layers])
    sharding.packed_digests = lambda layer: next(seen, {})  # type: ignore[assignment]
    try:
        shard_backbone(backbone, init_device_mesh("cpu", (world_size(),)))
    except RimeError as error:
        return str(error)
    finally:
        sharding.packed_digests = packed_digests
    return "nothing"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _packed(backbone: Backbone) -> dict[str, Tensor]:
    """The packed bytes of each 4-bit layer, gathered if they are sharded."""
    modules = linear_4bit_modules(backbone).items()
    return {name: _full(module.weight.detach()).view(torch.uint8).clone() for name, module in modules}


def gathered_rows() -> dict[str, Any]:
    """Rank r holds rows r+1; each rank weights the gathered rows differently."""
    local = torch.full((2, 3), float(rank() + 1), requires_grad=True)
    rows = all_gather_rows(local)
    weight = torch.arange(rows.numel(), dtype=torch.float32).view_as(rows) * (rank() + 1)
    (rows * weight).sum().backward()
    ids = torch.full((1, 2 + rank()), 7 + rank())
    completions = all_gather_completions(Completions(ids, torch.ones_like(ids)))
    numbers = all_gather_rows(torch.tensor([rank()]))
    return {
        **{"rows": rows.detach(), "grad": local.grad, "numbers": numbers},
        **{"ids": completions.ids, "mask": completions.mask},
    }


def main(number: int, folder: Path, base: Path, corpus: Path, cases: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2, timeout=timedelta(seconds=300)
    )
    seen: dict[str, Any] = {}
    for group in cases.split(","):
        for name, case in CASES[group].items():
            seen[name] = cached_step(case, base, corpus)
    if "fast" in cases:
        seen |= {
            "gather": gathered_rows(),
            "sft": step("sft", base, corpus),
            "cma": step("cma", base, corpus),
            **{f"further {name}": step(stage, base, corpus, *how) for name, (stage, *how) in FURTHER.items()},
            "refine_rl": refine_rl_step(base, of_one_task(corpus)),
            "refine_rl ddp": refine_rl_under_ddp(base, of_one_task(corpus)),
            "sharded": sharded_step(base, corpus),
            "sharded bfloat16": sharded_step(base, corpus, "bfloat16"),
            "nan": {dtype: nan_patterns(dtype, base) for dtype in ("float32", "bfloat16")},
            "damaged": damaged(base),
        }
    torch.save(seen, folder / f"{number}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *(Path(argument) for argument in sys.argv[2:5]), sys.argv[5])
