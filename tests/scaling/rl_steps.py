"""The Refine-RL step of steps.py and tower_steps.py: by hand, and by Lightning under DDP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader

from rime_pl.scaling.gather import all_reduce_sum, gather_objects, rank, world_size
from rime_pl.types import Pair
from tests.micro import RewardPairs, build_backbone, micro_config, randomise_adapter, refine_rl_module
from tests.scaling.batches import local_batch


def refine_rl_start(base: Path, pairs: list[Pair], settings: dict[str, Any], **groups: Any) -> Any:
    """Return the module, ready for a step.

    Args:
        base, pairs: The model, and the global batch.
        settings: Of the backbone.
        groups: Other settings.
    """
    backbone = build_backbone(micro_config(base, **settings))
    # no clipping: a real run clips the mean over ranks
    module: Any = refine_rl_module(backbone, policy={"max_grad_norm": 1e9, "drift_coef": 0.5}, **groups)
    randomise_adapter(
        backbone.peft, seed=3, scale=0.02
    )  # other values than the reference, so that there is a KL divergence
    module.prepare(RewardPairs(backbone.processor, pairs))
    return module


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
