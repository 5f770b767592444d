"""What all stages share: build the backbone, optimise, save checkpoints, evaluate.

``ContrastiveModule`` (contrastive.py) adds what SFT and CMA share. Reading order: this file, contrastive.py,
sft.py, cma.py, refine_rl.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from rime_pl.backbone.adapters import load_adapter_weights, read_contract
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.lora import merged
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.precision import check_precision
from rime_pl.backbone.quantization import describe
from rime_pl.checkpoints import unlike
from rime_pl.errors import RimeError
from rime_pl.generation.decoding import DecodingState, embed_completions, prefill
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.modules.settings import OptimizerSettings
from rime_pl.modules.wrong_rewrites import completions_of, empty_completions
from rime_pl.processing import RimeProcessor
from rime_pl.scaling.gather import any_rank
from rime_pl.scaling.sharding import check_sharding, shard_backbone
from rime_pl.types import EvalBatch, EvalOutput, RewriteChange, Written


class RimeModule(L.LightningModule):
    """Base class of the stages. A subclass adds ``training_step``.

    Args:
        backbone: Checkpoint, quantization, adapters and prompt layout.
        init_adapter_from: Adapter folder of an earlier stage to start from (default: a new adapter).
            This does not resume a run: start the same command again for that.
        optimizer: Learning rate, warm-up and weight decay.
    """

    restoring = False  # whether the parts of a checkpoint are being restored
    takes_latent_tokens = False  # whether the stage trains with latent tokens in place of rewrites
    may_diverge = False  # whether the stage checks for divergence, and stops with a DivergedError

    def __init__(
        self,
        backbone: BackboneConfig,
        init_adapter_from: str | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(),
    ) -> None:
        super().__init__()
        if backbone.prompt.num_latent_tokens and not self.takes_latent_tokens:
            raise RimeError(
                "model.backbone.prompt.num_latent_tokens must be null here, because latent tokens are a "
                f"control of SFT only, but is {backbone.prompt.num_latent_tokens}."
            )
        self.config = backbone
        self.init_adapter_from = init_adapter_from
        self.optimizer_settings = optimizer
        # Lightning's checkpoints hold what trains; the frozen base model is read from its own folder.
        self.strict_loading = False
        self.backbone: Backbone | None = None
        self.start_hash: str | None = None  # of the adapter in init_adapter_from, once it is loaded

    # -- building -------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the backbone on this rank's device, and shard it when the strategy asks for that."""
        if self.backbone is not None:
            return
        strategy = self.trainer.strategy
        sharded = isinstance(strategy, ModelParallelStrategy)
        check_precision(self.trainer.precision, sharded, self.config.load_in_4bit)
        check_sharding(self.config, sharded)
        processor = RimeProcessor.from_pretrained(self.config.name_or_path, self.config.prompt)
        with seeded(self.run_seed, strategy.root_device):  # not self.device, which is still the CPU here
            backbone = Backbone(self.config, processor, strategy.root_device)
        if self.init_adapter_from:
            hashes = (backbone.base_hash, backbone.old_base_hash)
            load_adapter_weights(backbone.peft, self.init_adapter_from, processor, *hashes)
            self.start_hash = read_contract(self.init_adapter_from)["weights_hash"]
        if self.trainer.is_global_zero:
            print(describe(backbone), flush=True)
        if isinstance(strategy, ModelParallelStrategy):
            if strategy._save_distributed_checkpoint:
                raise RimeError(
                    "trainer.strategy.init_args.save_distributed_checkpoint=true: checkpoints hold what "
                    "trains, in one file for any number of processes. Set it to false."
                )
            assert self.device_mesh is not None, "ModelParallelStrategy sets it before configure_model"
            shard_backbone(backbone, self.device_mesh["data_parallel"])
        self.backbone = backbone

    @property
    def run_seed(self) -> int:
        """The seed of the run; 0 without a data module, as in a test."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return int(data.seed) if data is not None else 0

    @property
    def model(self) -> Backbone:
        """The backbone, once ``configure_model`` has run."""
        if self.backbone is None:
            raise RimeError("The backbone is not there yet: configure_model() builds it.")
        return self.backbone

    def configure_optimizers(self) -> Any:
        matrices = [p for n, p in self.named_parameters() if p.requires_grad and "lora" in n]
        rows = [p for n, p in self.named_parameters() if p.requires_grad and "lora" not in n]
        groups = [
            {"params": matrices, "weight_decay": self.optimizer_settings.weight_decay},
            {"params": rows, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.optimizer_settings.learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        warmup = min(self.optimizer_settings.warmup_steps, steps // 2)
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only what trains: the base model would make each checkpoint as large as itself."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in trained}
        checkpoint["base_hash"], checkpoint["start_hash"] = self.model.base_hash, self.start_hash
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):  # which numbers them so by itself
            states = zip(self.trainer.optimizers, checkpoint.get("optimizer_states", []), strict=False)
            checkpoint["optimizer_states"] = [_by_place(self, *both) for both in states]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with another base model: the frozen weights are not in the checkpoint.

        Raises:
            RimeError: If the base model at ``model.backbone.name_or_path`` or the adapter to start from has
                changed, or if the checkpoint holds other tensors than those that train.
        """
        self.restoring = True
        if checkpoint["base_hash"] not in (self.model.base_hash, self.model.old_base_hash):
            raise RimeError(
                f"model.backbone.name_or_path={self.config.name_or_path} is another base model than the one "
                "that this run was started with. Give the old base model, or start a new run folder."
            )
        resumed = self.trainer.state.fn == TrainerFn.FITTING  # a test reads all that trained from here
        if resumed and checkpoint.get("start_hash", self.start_hash) != self.start_hash:
            raise RimeError(
                f"model.init_adapter_from={self.init_adapter_from} is another adapter than the one that "
                "this run was started with. Give the old one, or start a new run folder."
            )
        if "state_dict" not in checkpoint:  # of a sharded run: its strategy has loaded the tensors before
            return
        trained = {name: tuple(p.shape) for name, p in self.named_parameters() if p.requires_grad}
        found = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        if trained != found:
            name = next(n for n in sorted(trained | found) if trained.get(n) != found.get(n))
            raise RimeError(
                f"{self.trainer.ckpt_path} must hold what trains in this run, but {name} has shape "
                f"{found.get(name)} there and {trained.get(name)} here. Use lora_r, lora_targets and "
                "lora_tower of the run that wrote it."
            )
        if resumed and (wrong := self._wrong_state(checkpoint)):
            raise RimeError(
                f"{self.trainer.ckpt_path} does not fit this run, or is damaged: {wrong}. Put an intact copy "
                "in its place, or remove it to train from the start."
            )

    def _wrong_state(self, checkpoint: dict[str, Any]) -> str:
        """Return what is wrong with the optimizer or the counters, and would show in the first step only."""
        shapes = sorted(tuple(p.shape) for p in self.parameters() if p.requires_grad)
        for state in checkpoint["optimizer_states"]:
            for name in ("exp_avg", "exp_avg_sq"):
                moments = [one[name] for one in state["state"].values()]
                if moments and sorted(tuple(one.shape) for one in moments) != shapes:
                    return f"{name} of the optimizer has other shapes than what trains"
                if not all(bool(one.isfinite().all()) for one in moments):
                    return f"{name} of the optimizer is not finite"
        for schedule in checkpoint.get("lr_schedulers", []):
            if place := unlike(schedule, {"last_epoch": 0, "_step_count": 0}):
                return f"lr_schedulers: {place} cannot be {schedule[place]!r:.60}"
        if "loops" not in checkpoint:  # the file itself was checked when it was read
            return ""
        place = unlike(checkpoint["loops"].get("fit_loop"), self.trainer.fit_loop.state_dict(), "fit_loop")
        return f"loops: {place} is no count" if place else ""

    def on_train_start(self) -> None:
        """Apply the typed learning rate and weight decay: a resumed optimizer brings its old ones along."""
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        self.restoring = False
        schedule.base_lrs = [self.optimizer_settings.learning_rate] * len(optimizer.param_groups)
        decays = (self.optimizer_settings.weight_decay, 0.0)
        for group, decay, share in zip(optimizer.param_groups, decays, schedule.lr_lambdas, strict=True):
            group["initial_lr"], group["weight_decay"] = self.optimizer_settings.learning_rate, decay
            group["lr"] = self.optimizer_settings.learning_rate * share(schedule.last_epoch)

    @property
    def negatives_per_query(self) -> dict[str, float] | None:
        """Return the mean number of negatives of a query, by mode; None without a contrastive loss."""
        return None

    # -- evaluation -----------------------------------------------------------------------------------

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> EvalOutput:  # type: ignore[override]
        """Embed items in the modes that the batch asks for; queries also for the rewrite ablation."""
        return self.evaluate(batch)

    def test_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> EvalOutput:  # type: ignore[override]
        return self.evaluate(batch)

    @torch.no_grad()
    def evaluate(self, batch: EvalBatch) -> EvalOutput:
        """Return the embeddings of each item; the seconds of each mode count from tokens to embedding.

        A prompt is read once. The generative mode needs it, too, so its seconds hold those of the reading.
        Without that mode, nothing is written.
        """
        start = time.perf_counter()
        if not batch.generative:
            with merged(self.model):
                disc = self.model(batch.prompts).disc
            return EvalOutput(disc, {"discriminative": time.perf_counter() - start})
        sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
        goes_on = partial(any_rank, device=self.device) if sharded else bool
        with merged(self.model):
            read = prefill(self.model, batch.prompts, 1)
            after_disc = time.perf_counter()
            own = write_rewrites(self.model, batch.prompts, goes_on=goes_on, state=read)
            gen = embed_completions(self.model, read, own.completions)
            after_gen = time.perf_counter()
            ablation = self.rewrite_ablation(batch, read) if batch.side == "query" else {}
        written = Written(
            gen=gen,
            completions=own.completions,
            ablation=ablation,
            rewrites=self.model.processor.decode(own.completions),
            lengths=own.lengths,
            well_formed=own.well_formed,
        )
        seconds = {"discriminative": after_disc - start, "generative": after_gen - start}
        return EvalOutput(read.disc, seconds, written)

    def rewrite_changes(self) -> list[RewriteChange]:
        """Return sample queries with rewrites before and after training; only Refine-RL has a before."""
        return []

    def rewrite_ablation(self, batch: EvalBatch, read: DecodingState) -> dict[str, Tensor]:
        """Return the queries' generative embeddings with rewrites other than the model's own.

        A rewrite of another query follows by :meth:`embed_rewritten`, once all queries have their own.

        Returns:
            (R, D) each: "reference", the annotated rewrite, without a meaning for items that have none;
            "empty", an empty rewrite.
        """
        rewrites = {
            "reference": batch.completions,
            "empty": empty_completions(len(batch), 2, self.model.processor, self.device),
        }
        return {name: embed_completions(self.model, read, c) for name, c in rewrites.items()}

    @torch.no_grad()
    def embed_rewritten(self, batch: EvalBatch, rewrites: Sequence[Sequence[int] | None]) -> Tensor:
        """Return the generative embeddings (R, D) of items with given rewrites, as tokens; None is empty."""
        completions = completions_of(rewrites, self.model.processor, self.device)
        with merged(self.model):
            gen: Tensor = self.model(batch.prompts, completions).gen
        return gen


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from ``seed`` on the CPU and on ``device``, and leave their random numbers as they were.

    LoRA's random start depends on the seed of the run then, and not on what ran before.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _by_place(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> dict[str, Any]:
    """Return an optimizer's state with each parameter numbered by its place in the module.

    Lightning can read this into a sharded run. A run on one process needs only the order of the groups.
    """
    place = {id(parameter): number for number, parameter in enumerate(module.parameters())}
    name = {
        old: place[id(parameter)]
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
        for parameter, old in zip(group["params"], saved["params"], strict=True)
    }
    return {
        "state": {name[old]: value for old, value in state["state"].items()},
        "param_groups": [
            {**saved, "params": [name[old] for old in saved["params"]]} for saved in state["param_groups"]
        ],
    }
