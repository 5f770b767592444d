"""Stage 3, Refine-RL: the rewrite is improved by what it retrieves, measured against standing anchors.

Reading order: training_step here, then rl/rewards.py, rl/advantages.py and losses/policy_gradient.py; how
rewrites are drawn is in generation/rollouts.py, what they are compared with in modules/yardstick.py.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from rime_pl.backbone.adapters import adapter_values, state_hash, trained_values
from rime_pl.backbone.config import BackboneConfig
from rime_pl.errors import DivergedError, RimeError
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.generation.rollouts import random_numbers, sample_rollouts, score_rollouts
from rime_pl.losses.advantages import Scaling, group_advantages
from rime_pl.losses.policy_gradient import Divisors, LossType, policy_loss
from rime_pl.modules.base import RimeModule
from rime_pl.modules.scoring import AnchorKind, Part, RewardForm, RewardSettings, Yardstick, cut_parts
from rime_pl.scaling.gather import all_reduce_sum, gather_objects, rank, world_size
from rime_pl.types import Batch, Completions, EvalBatch, EvalOutput, RewardData, RewriteChange, Side

_SAMPLES = 12  # held-out queries in the table of rewrites


class RefineRLModule(RimeModule):
    """``L = - mean_tokens [ min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) - kl_coef k3 ]``

    The frozen reference is the adapter of ``init_adapter_from``, kept as a second set of values.

    Args:
        num_generations: Rewrites drawn for each item (G).
        max_new_tokens: Most tokens of a drawn rewrite; null takes prompt.max_rewrite_tokens.
        sampling_temperature: Divisor of the logits in drawing and in every log-probability.
        sides: Whether targets are rewritten and rewarded too, or queries alone.
        reward: Form of the embedding's part: anchored, or rank_margin (that of UME-R1).
        anchors: What a rewrite is compared with: discriminative embeddings of the reference for the other
            side (batch and table), or the other side's rollouts (the ancestor's; needs sides=both).
        embedder: Who embeds the rewrites: the reference (the yardstick stands still) or the policy.
        num_anchors: Size of the table of anchors of each task; 0 for none.
        reward_temperature: Divisor of the cosines in the reward.
        weight_format: Weight of the reward's part for a rewrite that is not empty and ends by itself.
        weight_embedding: Weight of the part for what its embedding is nearest to.
        weight_length: Weight of the part against tokens beyond ``free_length``.
        free_length: Tokens of a rewrite that cost nothing; below the budget, or there is nothing to pay.
        scaling: Divisor of the advantages: fixed (``reward_scale``) or std of the group.
        reward_scale: The fixed divisor, in units of the reward.
        min_spread: Groups whose std is below this share of ``reward_scale`` give no signal.
        shuffle_rewards: Control: rewards are shuffled within each group, so that they say nothing.
        loss_type: How tokens are summed up: grpo, dr_grpo or dapo.
        clip_low: The ratio is clipped to 1 - clip_low or more.
        clip_high: The ratio is clipped to 1 + clip_high or less.
        kl_coef: Weight of the divergence from the reference.
        max_kl: Mean divergence per token, in nats, above which the run stops. Of k2 (``train/k2``), since k3,
            the penalty, can be as high from a single token.
        num_updates: Optimiser steps for each batch of rollouts; with 1 the ratio is 1 and nothing is clipped.
        items_per_pass: Items of a pass, against memory; null takes the batch at once. Changes no result.
        max_grad_norm: Gradients are scaled down to this norm.
    """

    may_diverge = True
    sides: tuple[Side, ...]
    reference: dict[str, Tensor]  # values of the frozen adapter
    before: list[tuple[Batch, list[str], Tensor]]  # held-out queries, as the reference writes, and rewards
    seed: int  # of the run

    def __init__(
        self,
        backbone: BackboneConfig,
        init_adapter_from: str | None = None,
        num_generations: int = 8,
        max_new_tokens: int | None = None,
        sampling_temperature: float = 1.0,
        sides: Literal["query", "both"] = "both",
        reward: RewardForm = "anchored",
        anchors: AnchorKind = "discriminative",
        embedder: Literal["reference", "policy"] = "reference",
        num_anchors: int = 256,
        reward_temperature: float = 0.05,
        weight_format: float = 1.0,
        weight_embedding: float = 1.0,
        weight_length: float = 0.0,
        free_length: int = 128,
        scaling: Scaling = "fixed",
        reward_scale: float = 1.0,
        min_spread: float = 0.05,
        shuffle_rewards: bool = False,
        loss_type: LossType = "dapo",
        clip_low: float = 0.2,
        clip_high: float = 0.28,
        kl_coef: float = 0.04,
        max_kl: float = 10.0,
        num_updates: int = 1,
        items_per_pass: int | None = None,
        max_grad_norm: float = 1.0,
        learning_rate: float = 3e-5,
        warmup_steps: int = 5,
        weight_decay: float = 0.0,
    ) -> None:
        rates = {"learning_rate": learning_rate, "warmup_steps": warmup_steps, "weight_decay": weight_decay}
        super().__init__(backbone, init_adapter_from, **rates)  # type: ignore[arg-type]
        self.automatic_optimization = False  # several updates per batch of rollouts
        self.num_generations, self.max_new_tokens = num_generations, max_new_tokens
        self.sampling_temperature = sampling_temperature
        self.sides = ("query",) if sides == "query" else ("query", "target")
        self.embedder, self.num_anchors, self.shuffle_rewards = embedder, num_anchors, shuffle_rewards
        self.scaling, self.reward_scale, self.min_spread = scaling, reward_scale, min_spread
        self.loss_type, self.clip_low, self.clip_high = loss_type, clip_low, clip_high
        self.kl_coef, self.max_kl, self.max_grad_norm = kl_coef, max_kl, max_grad_norm
        self.num_updates, self.items_per_pass = num_updates, items_per_pass
        weights = (weight_format, weight_embedding, weight_length)
        form = RewardSettings(reward, anchors, reward_temperature, *weights, free_length)
        self.yardstick = Yardstick(form, num_generations)
        self.reference, self.before, self.seed = {}, [], 0
        self._check_settings()

    def _check_settings(self) -> None:
        positive = {
            "sampling_temperature": self.sampling_temperature,
            "reward_temperature": self.yardstick.settings.temperature,
            "reward_scale": self.reward_scale,
            "max_kl": self.max_kl,
            "num_updates": self.num_updates,
            "free_length": self.yardstick.settings.free_length,
            "max_new_tokens": self.max_new_tokens,
            "items_per_pass": self.items_per_pass,
            "max_grad_norm": self.max_grad_norm,
        }
        for name, value in positive.items():
            if value is not None and value <= 0:
                raise RimeError(f"model.{name}={value} must be > 0.")
        others = ("clip_low", "clip_high", "kl_coef", "min_spread", "num_anchors")
        for name in others:
            if getattr(self, name) < 0:
                raise RimeError(f"model.{name}={getattr(self, name)} must be 0 or more.")
        if self.num_generations < 2:
            raise RimeError(
                f"model.num_generations={self.num_generations}: a group needs 2 rewrites or more."
            )
        if self.yardstick.settings.anchors == "rollouts" and "target" not in self.sides:
            raise RimeError("model.anchors=rollouts compares with the other side's; set model.sides=both.")
        form, budget = self.yardstick.settings, self.config.prompt.budget(self.max_new_tokens)
        if form.weight_length and form.free_length >= budget:
            raise RimeError(
                f"model.weight_length={form.weight_length}: no rewrite is longer than {budget} tokens, and "
                f"model.free_length={form.free_length} of them cost nothing. Lower model.free_length."
            )
        if self.config.lora_dropout:
            raise RimeError(
                f"model.backbone.lora_dropout={self.config.lora_dropout} must be 0 in Refine-RL: ratio and "
                "divergence compare the distribution that was drawn from."
            )

    # -- building -------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.backbone is not None:
            return
        if not self.init_adapter_from:
            raise RimeError(
                "model.init_adapter_from is missing: Refine-RL starts from, and is measured against, the "
                "adapter of stage 2. Give its folder, e.g. RUN/adapter."
            )
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise RimeError(
                "trainer.strategy: Refine-RL runs on one process or under DDP (configs/overlays/ddp.yaml); "
                "sharded rollouts are not supported."
            )
        super().configure_model()
        self.reference = trained_values(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference_hash"] = state_hash(self.reference)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "reference_hash" not in checkpoint:
            raise RimeError("--ckpt_path: this checkpoint is of another stage; give one of a Refine-RL run.")
        if checkpoint["reference_hash"] != state_hash(self.reference):
            raise RimeError(
                f"model.init_adapter_from={self.init_adapter_from} is another adapter than the one this run "
                "was started with. Give the old one, or start a new run folder."
            )

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """The table of anchors and the held-out rewrites of the reference: both functions of the seed."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.prepare(data)

    @torch.no_grad()
    def prepare(self, data: RewardData) -> None:
        self.seed = data.seed
        with adapter_values(self.model, self.reference):
            if self.num_anchors:
                for batch in data.anchor_batches(self.num_anchors):
                    batch = batch.to(self.device)
                    disc: dict[Side, Tensor] = {
                        "query": self.model(batch.query.prompts).disc,
                        "target": self.model(batch.target.prompts).disc,
                    }
                    self.yardstick.add(batch, disc)
            self.before = []
            for batch in data.sample_batches(_SAMPLES):
                batch = batch.to(self.device)
                texts, reward = self.write_and_measure(batch)
                self.before.append((batch, texts, reward))

    # -- training -------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        parts = [part for side in self.sides for part in self.roll_out(batch, side)]
        self.yardstick.reward(parts, batch, self.other_discs(parts, batch))
        for part in parts:
            rewards = self.shuffled(part, batch) if self.shuffle_rewards else part.rewards
            groups = rewards.view(-1, self.num_generations)
            part.advantages = group_advantages(groups, self.scaling, self.reward_scale, self.min_spread)
        divisors = self.count(parts)

        for update in range(self.num_updates):
            sums = torch.zeros(6, device=self.device)  # loss, k3, k2, clipped, entropy, reward
            for part in parts:
                scores = score_rollouts(
                    self.model, part.prompts, part.rollouts, self.sampling_temperature, part.images
                )
                if update == 0:
                    part.old_logprobs = scores.logprobs.detach()
                out = policy_loss(
                    scores.logprobs,
                    part.old_logprobs,
                    part.advantages.values.flatten(),
                    part.rollouts.labels != -100,
                    part.reference.logprobs,
                    divisors,
                    self.loss_type,
                    self.clip_low,
                    self.clip_high,
                    self.kl_coef,
                )
                self.manual_backward(out.loss * world_size())  # DDP takes the mean of the ranks' gradients
                watched = (out.loss.detach(), out.kl_sum, out.k2_sum, out.clipped_sum, scores.entropy.sum())
                sums += torch.stack([*watched, part.rewards.sum()])
            self.step(batch, divisors, all_reduce_sum(sums), update)
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        self.log_rollouts(parts, len(batch))

    @torch.no_grad()
    def roll_out(self, batch: Batch, side: Side) -> list[Part]:
        """Draw G rewrites of each item; one pass of the reference gives log-probabilities and embeddings."""
        prompts = (batch.query if side == "query" else batch.target).prompts
        steps = self.model.processor.prompt.budget(self.max_new_tokens) + 1
        parts = []
        for rows in cut_parts(len(batch), self.items_per_pass):
            part = prompts if len(rows) == len(batch) else prompts.select(rows.to(self.device))
            images = self.model.encode_images(part)
            names = [f"{side} {rank() * len(batch) + row}" for row in rows.tolist()]
            numbers = random_numbers(self.seed, batch.position, names, self.num_generations, steps)
            rollouts = sample_rollouts(self.model, part, numbers, self.sampling_temperature, images)
            with adapter_values(self.model, self.reference):
                reference = score_rollouts(self.model, part, rollouts, self.sampling_temperature, images)
            embeddings = reference.gen
            if self.embedder == "policy":
                embeddings = score_rollouts(self.model, part, rollouts, self.sampling_temperature, images).gen
            parts.append(Part(side, rows.to(self.device), part, images, rollouts, reference, embeddings))
        return parts

    @torch.no_grad()
    def other_discs(self, parts: list[Part], batch: Batch) -> dict[Side, Tensor]:
        """The reference's discriminative embeddings of both sides; free where a side was rolled out."""
        discs: dict[Side, Tensor] = {
            side: torch.cat([part.reference.disc for part in parts if part.side == side])
            for side in self.sides
        }
        if "target" not in discs:
            with adapter_values(self.model, self.reference):
                discs["target"] = self.model(batch.target.prompts).disc
        return discs

    def shuffled(self, part: Part, batch: Batch) -> Tensor:
        """The control: each group's rewards in another order."""
        first = rank() * len(batch)
        names = [f"shuffle {part.side} {first + row}" for row in part.rows.tolist()]
        order = random_numbers(self.seed, batch.position, names, 1, self.num_generations).argsort(dim=1)
        return part.rewards.view(order.shape).gather(1, order.to(self.device)).flatten()

    def count(self, parts: list[Part]) -> Divisors:
        """Rewrites and drawn tokens of the global batch."""
        rows = sum(len(part.rollouts) for part in parts)
        tokens = sum(int((part.rollouts.labels != -100).sum()) for part in parts)
        total = all_reduce_sum(torch.tensor([rows, tokens], device=self.device))
        budget = self.model.processor.prompt.budget(self.max_new_tokens)
        return Divisors(int(total[0]), int(total[1]), budget + 1)

    def step(self, batch: Batch, divisors: Divisors, sums: Tensor, update: int) -> None:
        """One step of the optimiser, unless something is out of bounds; equal on all ranks."""
        loss, *totals, reward = sums.tolist()
        kl, k2, clipped, entropy = (total / max(1, divisors.num_tokens) for total in totals)
        optimizer: Any = self.optimizers()
        parameters = [p for p in self.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        finite = torch.isfinite(sums).all() and torch.isfinite(norm)
        if not finite or k2 > self.max_kl:
            what = (
                f"mean divergence from the reference {k2:.3g} nats per token > model.max_kl={self.max_kl}"
                if finite
                else f"not finite: loss {loss}, divergence {kl}, reward {reward}, gradient norm {float(norm)}"
            )
            all_keys = [key for keys in gather_objects(batch.keys) for key in keys]
            raise DivergedError(
                f"Refine-RL stopped at step {self.global_step} (batch {batch.position}, update {update}): "
                f"{what}. Samples: {', '.join(all_keys)}. Lower model.learning_rate or raise model.kl_coef."
            )
        optimizer.step()
        optimizer.zero_grad()
        self.log_means(len(batch), {"loss": loss, "kl": kl, "k2": k2, "clip_fraction": clipped})
        self.log_means(len(batch), {"entropy": entropy, "grad_norm": float(norm)})

    def log_rollouts(self, parts: list[Part], size: int) -> None:
        """What a person watches; docs/reference/metrics.md says what each means."""
        for name, value in self.yardstick.watched(parts).items():
            self.log(f"train/{name}", value, sync_dist=world_size() > 1, batch_size=size)

    def log_means(self, size: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=size)

    # -- evaluation -----------------------------------------------------------------------------------

    def test_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> EvalOutput:  # type: ignore[override]
        """As in the other stages, and old and new rewriter crossed with old and new embedder."""
        output = self.evaluate(batch)
        output.crossed = self.crossed(batch, output.completions)
        return output

    @torch.no_grad()
    def crossed(self, batch: EvalBatch, new: Completions) -> dict[str, Tensor]:
        """Generative embeddings by "rewriter-embedder"; old is the reference, new-new is left out."""
        images = self.model.encode_images(batch.prompts)
        with adapter_values(self.model, self.reference):
            old = write_rewrites(self.model, batch.prompts).completions
            views = {
                "old-old": self.embed(batch, old, images),
                "new-old": self.embed(batch, new, images),
            }
        return views | {"old-new": self.embed(batch, old, images)}

    def embed(self, batch: EvalBatch, rewrites: Completions, images: Any | None) -> Tensor:
        gen = self.model(batch.prompts, rewrites, image_features=images).gen
        assert gen is not None, "a forward with completions reads both modes"
        return gen

    @torch.no_grad()
    def write_and_measure(self, batch: Batch) -> tuple[list[str], Tensor]:
        """Greedy rewrites of the queries by whoever's values are in place, and the reference's reward."""
        training = self.model.training
        self.model.eval()
        written = write_rewrites(self.model, batch.query.prompts)
        with adapter_values(self.model, self.reference):
            out = self.model(batch.query.prompts, written.completions)
            target = self.model(batch.target.prompts).disc
        self.model.train(training)
        assert out.gen is not None, "a forward with completions reads both modes"
        reward = self.yardstick.of_pairs(batch, out.gen, target, written.well_formed, written.lengths)
        return self.model.processor.decode(written.completions), reward

    def rewrite_changes(self) -> list[RewriteChange]:
        """The held-out queries with the reference's rewrite and the present one."""
        changes = []
        for batch, before, reward_before in self.before:
            after, reward_after = self.write_and_measure(batch)
            columns = zip(
                batch.keys,
                [batch.dataset] * len(batch),
                batch.query_texts,
                self.model.processor.decode(batch.query.completions),
                before,
                after,
                reward_before.tolist(),
                reward_after.tolist(),
                strict=True,
            )
            changes += [RewriteChange(*column) for column in columns]
        return changes
