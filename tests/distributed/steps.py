"""The same training step on a whole batch, or on a rank's part of it. Run by one process and by two.

`python -m tests.distributed.steps RANK FOLDER BASE CORPUS` is one of two processes of the tests beside it; it
writes what it saw to FOLDER/<rank>.pt.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from datamodules.plan import rank_slice
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.distributed.gather import (
    all_gather_completions,
    all_gather_rows,
    all_reduce_sum,
    rank,
    world_size,
)
from rime_pl.distributed.objects import gather_objects
from rime_pl.distributed.sharding import shard_backbone
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.sft import SFTModule
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

STAGES: dict[str, type[RimeModule]] = {"sft": SFTModule, "cma": CMAModule}


def global_batch(corpus: Path) -> list[Pair]:
    """8 pairs: texts and pictures, twins across the ranks' border, rewrites missing on one rank only."""
    pairs = mixed(read_pairs(corpus, "train"), 8)
    pairs[6] = replace(pairs[6], target=replace(pairs[6].target, content_id=pairs[1].target.content_id))
    for row in (4, 5, 7):
        pairs[row] = replace(pairs[row], target=replace(pairs[row].target, rewrite=None))
    return pairs


def micro_module(stage: str, base: Path) -> RimeModule:
    """A stage whose adapter is not at its start, where half of the gradients are zero."""
    backbone = build_backbone(micro_config(base))
    randomise_adapter(backbone.peft, scale=0.05)
    module = STAGES[stage](backbone.config)
    module.backbone = backbone
    module.log = lambda *_, **__: None  # type: ignore[assignment]
    return module


def local_batch(module: RimeModule, pairs: list[Pair]) -> Batch:
    """This rank's part, cut and tokenised as the data module does it."""
    mine = rank_slice(range(len(pairs)), rank(), world_size())
    return module.model.processor.training_batch([pairs[n] for n in mine])


def step(stage: str, base: Path, corpus: Path) -> dict[str, Any]:
    """Loss and parameter gradients of one step; over several ranks their means, as DDP takes them."""
    module = micro_module(stage, base)
    loss = module.training_step(local_batch(module, global_batch(corpus)), 0)
    loss.backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.requires_grad and p.grad is not None}
    mean = {name: all_reduce_sum(gradient) / world_size() for name, gradient in gradients.items()}
    return {"loss": float(all_reduce_sum(loss) / world_size()), "gradients": mean}


def refine_rl_step(base: Path, corpus: Path) -> dict[str, Any]:
    """One Refine-RL step of both sides; what it logged as means over ranks, and the mean gradients."""
    pairs = [replace(pair, dataset="one") for pair in global_batch(corpus)]
    backbone = build_backbone(micro_config(base))
    module: Any = refine_rl_module(backbone)
    randomise_adapter(backbone.peft, seed=3, scale=0.02)  # away from the reference, so that there is a KL
    module.prepare(RewardPairs(backbone.processor, pairs))
    gradients: dict[str, Tensor] = {}

    def keep(optimizer: Any) -> None:
        gradients.update({n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad})

    module.max_grad_norm = 1e9  # what is clipped here is the mean over ranks in a real run
    optimizer = module.optimizers()
    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: keep(optimizer))
    rolled = []
    roll_out = module.roll_out
    module.roll_out = lambda batch, side: rolled.extend(roll_out(batch, side)) or [rolled[-1]]
    module.training_step(local_batch(module, pairs), 0)
    values = {
        name: all_reduce_sum(torch.tensor(value)) / world_size()
        for name, value in module.logged_values.items()
    }
    return {
        "logged": {name: float(value) for name, value in values.items()},
        "gradients": {name: all_reduce_sum(g) / world_size() for name, g in gradients.items()},
        "texts": gather_objects([backbone.processor.decode(part.rollouts.completions) for part in rolled]),
    }


def sharded_step(base: Path, corpus: Path) -> dict[str, Any]:
    """One CMA step and a greedy rewrite with the backbone sharded by FSDP2."""
    module = micro_module("cma", base)
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
    with torch.no_grad():
        module.model(batch.query.prompts)
    rewrites = write_rewrites(module.model, batch.query.prompts, max_new_tokens=4, synced=True)
    return {
        "loss": float(all_reduce_sum(loss) / world_size()),
        "gradients": gradients,
        "before": before,
        "after": _packed(module.model),
        "share": local / whole,
        "rewrites": gather_objects(module.model.processor.decode(rewrites.completions)),
    }


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _packed(backbone: Backbone) -> dict[str, Tensor]:
    """The packed bytes of each 4-bit layer, all-gathered where they are sharded."""
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


def main(number: int, folder: Path, base: Path, corpus: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2, timeout=timedelta(seconds=300)
    )
    seen = {
        "gather": gathered_rows(),
        "sft": step("sft", base, corpus),
        "cma": step("cma", base, corpus),
        "refine_rl": refine_rl_step(base, corpus),
        "sharded": sharded_step(base, corpus),
    }
    torch.save(seen, folder / f"{number}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *(Path(argument) for argument in sys.argv[2:5]))
