"""Steps with a vision tower that is frozen, trained or sharded, where one rank has only text.

`python -m tests.scaling.tower_steps RANK FOLDER BASES CASES` is one of the two processes that
test_tower_on_two_processes.py starts. It writes its results to FOLDER/<rank>.pt. BASES holds a folder for
each family of models. CASES is `fast` or `long`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from rime_pl.generation.decoding import prefill
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.scaling.gather import all_reduce_sum, any_rank, gather_objects, rank, world_size
from rime_pl.scaling.sharding import shard_backbone
from tests.families import FAMILIES, apart_pairs, tower_calls
from tests.scaling.batches import local_batch
from tests.scaling.rl_steps import refine_rl_step, refine_rl_under_ddp
from tests.scaling.steps import Forwarded, _full, _local, micro_module

#: Seconds after which a collective that a rank does not join ends with an error: that is a hang.
PATIENCE = 120


@dataclass(frozen=True)
class Case:
    """One step of SFT or CMA on two processes."""

    family: str
    tower: Literal["none", "merger", "all"] = "none"
    sharded: Literal["nothing", "decoder", "tower"] = "nothing"  # "tower": with the decoder
    cached: bool = False
    stage: str = "sft"
    load_in_4bit: bool = False
    gradient_checkpointing: bool = False

    def settings(self) -> dict[str, Any]:
        """Return the settings of the backbone."""
        return {
            "lora_tower": self.tower,
            "shard_tower": self.sharded == "tower",
            "load_in_4bit": self.load_in_4bit,
            "gradient_checkpointing": self.gradient_checkpointing,
        }

    @property
    def calls(self) -> int | None:
        """How often each process runs the tower in a step; None if those without media need not.

        Each side of a batch is one forward, or 3 micro-batches. Only a frozen tower's features are kept
        between the two passes of the gradient cache.
        """
        if self.tower == "none" and self.sharded != "tower":
            return None
        passes = 1 if self.tower == "none" or not self.cached else 2
        return 2 * (3 if self.cached else 1) * passes


def named(*cases: Case) -> dict[str, Case]:
    """Return cases by a name that says what differs from the default."""

    def name(case: Case) -> str:
        words = [case.family, case.stage, f"tower {case.tower}", f"{case.sharded} sharded"]
        for setting in ("cached", "load_in_4bit", "gradient_checkpointing"):
            words += [setting] if getattr(case, setting) else []
        return ", ".join(words)

    return {name(case): case for case in cases}


FAST = named(
    Case("qwen2_vl"),
    Case("qwen2_5_vl", cached=True, stage="cma"),
    Case("qwen3_vl", cached=True),
    *(Case(family, "all", cached=True, stage="cma") for family in FAMILIES),
    *(Case(family, "all") for family in FAMILIES),
    *(Case(family, "all", "tower", cached=True) for family in FAMILIES),
    Case("qwen3_vl", "none", "tower"),
    Case("qwen3_vl", "none", "tower", cached=True, stage="cma"),
    Case("qwen3_vl", "merger", "decoder", cached=True),
    Case(
        "qwen2_vl", "all", "tower", load_in_4bit=True, gradient_checkpointing=True, cached=True, stage="cma"
    ),
)
LONG = {
    name: case
    for name, case in named(
        *(
            Case(family, tower, sharded, cached, stage)  # type: ignore[arg-type]
            for family in FAMILIES
            for tower in ("none", "merger", "all")
            for sharded in ("nothing", "decoder", "tower")
            for cached in (False, True)
            for stage in ("sft", "cma")
        )
    ).items()
    if name not in FAST
}
CASES = {"fast": FAST, "long": LONG}
#: Family and trained part of the tower of a Refine-RL step: under DDP if a part trains, or else by its means.
REINFORCED = [*((family, "none") for family in FAMILIES), ("qwen2_5_vl", "all"), ("qwen3_vl", "all")]
#: Tokens of a micro-batch on rank 0 and on rank 1, so that their numbers of micro-batches differ.
BUDGETS = (1000, 1)


def one_process(case: Case, bases: Path) -> dict[str, Any]:
    """Loss and gradients of the whole batch, by plain autograd without micro-batches."""
    module = micro_module(case.stage, bases / case.family, **case.settings())
    loss = module.training_step(local_batch(module, apart_pairs()), 0)
    loss.backward()
    return {"loss": float(loss), "gradients": _gradients(module), "evaluated": evaluated(module)}


def step_of_a_rank(case: Case, bases: Path) -> dict[str, Any]:
    """The same for the part of this rank, twice, with the mean of both gradients.

    ``calls`` holds the patches of each call of the tower, of both times.
    """
    budget = BUDGETS[rank()] if case.cached else None
    module = micro_module(case.stage, bases / case.family, budget, **case.settings())
    whole = _numbers(module.model.language_model.model.visual)
    step: nn.Module = Forwarded(module)
    if case.sharded == "nothing":
        step = DistributedDataParallel(step)
    else:
        shard_backbone(module.model, init_device_mesh("cpu", (world_size(),)))
    batch = local_batch(module, apart_pairs())
    calls: list[list[int]] = []
    for _ in range(2):
        with tower_calls(module.model) as of_this_step:
            loss = step(batch)
            module.backward(loss)
        calls.append(of_this_step)
    return {
        "loss": float(all_reduce_sum(loss) / world_size()),
        "gradients": {name: gradient / 2 for name, gradient in _gradients(module).items()},
        "calls": calls,
        "media": sum(int(side.prompts.num_media.sum()) for side in batch.sides),
        "share": _numbers(module.model.language_model.model.visual) / whole,
        "evaluated": gather_objects(evaluated(module)),
    }


@torch.no_grad()
def evaluated(module: Any) -> tuple[Tensor, list[str]]:
    """Return the embeddings of this rank's queries and their rewrites, as an evaluation makes them."""
    module.eval()
    prompts = local_batch(module, apart_pairs()).query.prompts
    read = prefill(module.model, prompts, 1)
    goes_on = partial(any_rank, device=torch.device("cpu"))
    written = write_rewrites(module.model, prompts, max_new_tokens=3, goes_on=goes_on, state=read)
    return module.model(prompts).disc, module.model.processor.decode(written.completions)


def _gradients(module: nn.Module) -> dict[str, Tensor]:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    grads = {name: p.grad for name, p in trained.items()}
    return {name: _full(grad) for name, grad in grads.items() if grad is not None}


def _numbers(module: nn.Module) -> int:
    """How many frozen numbers of a module this process holds."""
    return sum(_local(p).numel() for p in module.parameters() if not p.requires_grad)


def main(number: int, folder: Path, bases: Path, cases: str) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=number, world_size=2, timeout=patience
    )
    seen: dict[str, Any] = {name: step_of_a_rank(case, bases) for name, case in CASES[cases].items()}
    if cases == "fast":
        for family, tower in REINFORCED:
            settings = {"lora_tower": tower, "load_in_4bit": False}
            step = refine_rl_step if tower == "none" else refine_rl_under_ddp
            seen[f"refine_rl {family} {tower}"] = step(bases / family, apart_pairs(), **settings)
    torch.save(seen, folder / f"{number}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *(Path(argument) for argument in sys.argv[2:4]), sys.argv[4])
