"""The same training step on a whole batch, or on the part of one rank. Run by one process and by two.

`python -m tests.scaling.steps RANK FOLDER BASE CORPUS CASES` is one of the two processes that
test_two_processes.py starts. It writes its results to FOLDER/<rank>.pt. CASES is `fast` or `long`, or both
with a comma.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import linear_4bit_modules, packed_digests
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
from rime_pl.types import Batch, Completions
from tests.micro import build_backbone, micro_config, randomise_adapter
from tests.scaling.batches import apart, global_batch, local_batch, of_one_task, with_further
from tests.scaling.rl_steps import refine_rl_step, refine_rl_under_ddp

#: Name -> stage, rows with further targets, tokens of a micro-batch. Rank 0 has the rows 0 to 3.
FURTHER: dict[str, tuple[str, list[int], int | None]] = {
    "sft": ("sft", [0, 1, 2, 5], None),
    "cma, on one rank only": ("cma", [1, 3], None),
    "cma, cached": ("cma", [0, 2, 5, 6], 60),
}
STAGES: dict[str, type[RimeModule]] = {"sft": SFTModule, "cma": CMAModule}


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
