"""Stage 3, Refine-RL: reinforcement learning of the rewrite, rewarded by what its embedding retrieves.

We worked from the paper's abstract, model card and its predecessor UME-R1 (arXiv 2511.00405), without access
to the equations in the paper's body. Deliberate differences:

- Paper: RL after alignment, with discriminative embeddings as stable anchors, is the paper's. The form of the
  reward is ours: the log-probability of the right anchor among all anchors of the batch and of a table.
  UME-R1 compares with the other side's rollouts and rewards rank times margin (``reward.form: rank_margin``).
- Paper: the frozen reference embeds the rewrites, so that the reward cannot move with the policy.
- Paper: advantages are divided by a fixed scale; the group's standard deviation is a setting.
- Paper: a penalty may hold both embeddings of the policy near those of the reference (``drift_coef``).
- Paper: the sampling mask and temperature apply to policy, old policy and reference alike.

Reading order: ``training_step`` here, then modules/scoring.py, losses/rewards.py, losses/advantages.py and
losses/policy_gradient.py. Sampling is in generation/rollouts.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from torch import Tensor

from rime_pl.backbone.adapters import adapter_values, state_hash, trained_values
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.lora import merged
from rime_pl.errors import DivergedError, RimeError
from rime_pl.generation.decoding import embed_completions, prefill
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.generation.rollouts import PromptPart, random_numbers, sample_rollouts, score_rollouts
from rime_pl.losses.advantages import Advantages, group_advantages
from rime_pl.losses.policy_gradient import Divisors, embedding_drift, policy_loss
from rime_pl.modules.anchors import anchor_vectors, anchors_of
from rime_pl.modules.base import RimeModule
from rime_pl.modules.scoring import Rewards, SampledPart, Scorer, cut_parts
from rime_pl.modules.settings import (
    AdvantageSettings,
    OptimizerSettings,
    PolicySettings,
    RewardSettings,
    RolloutSettings,
)
from rime_pl.scaling.gather import all_reduce_sum, gather_objects, rank, world_size
from rime_pl.types import (
    Batch,
    Completions,
    EvalBatch,
    EvalOutput,
    RewardData,
    RewriteChange,
    Rollouts,
    Side,
)

_SAMPLES = 12  # held-out queries in the table of rewrites


class RefineRLModule(RimeModule):
    """``L = - mean_tokens [ min(rho A, clip(rho, 1 - low, 1 + high) A) - kl_coef k3 ] + drift_coef D``

    The frozen reference is the adapter of ``init_adapter_from``, kept as a second set of values.

    Args:
        backbone: Checkpoint, quantization, adapters and prompt layout. LoRA's dropout must be 0.
        init_adapter_from: Adapter folder of stage 2: start and frozen reference.
        rollouts: How rewrites are sampled.
        reward: What a rewrite is rewarded for.
        advantages: How rewards of a group become advantages.
        policy: The clipped loss and its updates.
        optimizer: Learning rate, warm-up and weight decay.
    """

    may_diverge = True
    reference: dict[str, Tensor]  # values of the frozen adapter
    before: list[tuple[Batch, list[str], Tensor]]  # held-out queries, the reference's rewrites and rewards
    seed: int  # of the run

    def __init__(
        self,
        backbone: BackboneConfig,
        init_adapter_from: str | None = None,
        rollouts: RolloutSettings = RolloutSettings(),
        reward: RewardSettings = RewardSettings(),
        advantages: AdvantageSettings = AdvantageSettings(),
        policy: PolicySettings = PolicySettings(),
        optimizer: OptimizerSettings = OptimizerSettings(3e-5, 5),
    ) -> None:
        super().__init__(backbone, init_adapter_from, optimizer)
        self.automatic_optimization = False  # several updates for each batch of rollouts
        self.rollouts, self.reward, self.advantages, self.policy = rollouts, reward, advantages, policy
        self.sides: tuple[Side, ...] = ("query",) if rollouts.sides == "query" else ("query", "target")
        self.scorer = Scorer(reward, rollouts.num_generations)
        self.reference, self.before, self.seed = {}, [], 0
        self._check_settings()

    @property
    def max_new_tokens(self) -> int:
        """The token budget of a sampled rewrite; <gen_emb> is not counted."""
        return self.config.prompt.budget(self.rollouts.max_new_tokens)

    def _check_settings(self) -> None:
        """Refuse what concerns two groups of settings; each group checks its own values."""
        if self.reward.anchors == "rollouts" and "target" not in self.sides:
            raise RimeError(
                "model.reward.anchors=rollouts needs rollouts of both sides. Set model.rollouts.sides: both."
            )
        if self.reward.weight_length and self.reward.free_length >= self.max_new_tokens:
            raise RimeError(
                f"model.reward.free_length must be below the budget of {self.max_new_tokens} tokens, but is "
                f"{self.reward.free_length}: with model.reward.weight_length={self.reward.weight_length} no "
                "rewrite would ever be penalised."
            )
        if self.config.lora_dropout:
            raise RimeError(
                f"model.backbone.lora_dropout must be 0 in Refine-RL, but is {self.config.lora_dropout}: the "
                "ratio and the KL divergence need the distribution that was sampled from."
            )

    # -- building -------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        if self.backbone is not None:
            return
        if not self.init_adapter_from:
            raise RimeError(
                "model.init_adapter_from is missing: Refine-RL starts from the adapter of stage 2 and is "
                "measured against it. Give its folder, for example RUN/adapter."
            )
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise RimeError(
                "trainer.strategy: Refine-RL runs on one process or with DDP (configs/overlays/ddp.yaml); "
                "sharded sampling is not supported."
            )
        super().configure_model()
        self.reference = trained_values(self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["reference_hash"] = state_hash(self.reference)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "reference_hash" not in checkpoint:
            raise RimeError(
                "--ckpt_path: this checkpoint belongs to another stage. Give one of a Refine-RL run."
            )
        if checkpoint["reference_hash"] != state_hash(self.reference):
            raise RimeError(
                f"model.init_adapter_from={self.init_adapter_from} is another adapter than the one that "
                "this run was started with. Give the old one, or start a new run folder."
            )

    @torch.no_grad()
    def on_fit_start(self) -> None:
        """Make the table of anchors and the reference's sample rewrites: both depend on the seed only."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.prepare(data)

    @torch.no_grad()
    def prepare(self, data: RewardData) -> None:
        """Make them from any source of batches; tests and benchmarks have no trainer."""
        self.seed = data.seed
        with adapter_values(self.model, self.reference):
            if self.reward.num_anchors:
                for batch in data.anchor_batches(self.reward.num_anchors):
                    batch = batch.to(self.device)
                    with merged(self.model):
                        table = anchors_of(self.reward.anchors, self.model, batch, self.rollouts)
                    self.scorer.add_anchors(batch, table)
            self.before = []
            for batch in data.sample_batches(_SAMPLES):
                batch = batch.to(self.device)
                texts, reward = self.write_and_measure(batch)
                self.before.append((batch, texts, reward))

    # -- training -------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        if batch.further is not None:
            raise RimeError(
                "data.hard_negatives and data.positives must be 0 in Refine-RL, because a reward compares "
                "with anchors only. Leave them out, or use them in SFT and CMA."
            )
        parts, discs = self.sample(batch)
        rewards = self.scorer.rewards(parts, batch, discs, self.greedy_anchors(batch, parts))
        advantages = [self.advantages_of(*one, batch) for one in zip(parts, rewards, strict=True)]
        divisors = self.count(parts)
        old_logprobs: list[Tensor] = []  # (R * G, C) of each part, before the first update

        for update in range(self.policy.num_updates):
            sums = torch.zeros(7, device=self.device)  # loss, drift, k3, k2, clipped, entropy, reward
            for number, part in enumerate(parts):
                temperature, reference = self.rollouts.temperature, part.reference
                scores = score_rollouts(
                    self.model, part.prompts, part.rollouts, temperature, part.images, with_entropy=True
                )
                assert scores.entropy is not None, "it was asked for"
                if update == 0:
                    old_logprobs.append(scores.logprobs.detach())
                out = policy_loss(
                    scores.logprobs,
                    old_logprobs[number],
                    advantages[number].values.flatten(),
                    part.rollouts.labels != -100,
                    reference.logprobs,
                    divisors,
                    self.policy.loss_type,
                    self.policy.clip_low,
                    self.policy.clip_high,
                    self.policy.kl_coef,
                )
                drift = embedding_drift(scores.disc, scores.gen, reference.disc, reference.gen, divisors)
                loss = out.loss + self.policy.drift_coef * drift if self.policy.drift_coef else out.loss
                # DDP averages the gradients over the ranks
                self.backward_part(loss * world_size(), last=number + 1 == len(parts))
                terms = (out.loss.detach(), drift.detach(), out.kl_sum, out.k2_sum, out.clipped_sum)
                sums += torch.stack([*terms, scores.entropy.sum(), rewards[number].total.sum()])
            self.step(batch, divisors, all_reduce_sum(sums), update)
        self.lr_schedulers().step()  # type: ignore[union-attr,call-arg]
        means = self.scorer.means(parts, rewards, advantages)
        self.log_means(len(batch), means, sync_dist=world_size() > 1)

    @torch.no_grad()
    def sample(self, batch: Batch) -> tuple[list[SampledPart], dict[Side, Tensor]]:
        """Sample G rewrites of each item; one reference pass gives log-probabilities and embeddings.

        Returns:
            The sampled parts, and the reference's discriminative embeddings (B, D) of the sampled sides and,
            unless anchors are greedy, of targets.
        """
        model, temperature = self.model, self.rollouts.temperature
        cuts = cut_parts(len(batch), self.rollouts.items_per_pass)
        places = [(side, rows) for side in self.sides for rows in cuts]
        parts = [self.prompt_part(batch, side, rows) for side, rows in places]
        together = self.rollouts.passes_per_sampling or len(parts)
        with merged(model):
            rollouts: list[Rollouts] = []
            for first in range(0, len(parts), together):
                rollouts += sample_rollouts(model, parts[first : first + together], temperature)
        both = list(zip(parts, rollouts, strict=True))
        with adapter_values(model, self.reference), merged(model):
            references = [score_rollouts(model, p.prompts, r, temperature, p.images) for p, r in both]
            discs: dict[Side, Tensor] = {
                side: torch.cat([one.disc for one in references[first : first + len(cuts)]])
                for side, first in zip(self.sides, range(0, len(parts), len(cuts)), strict=True)
            }
            if "target" not in discs and self.reward.anchors != "greedy":
                discs |= anchors_of("discriminative", model, batch, self.rollouts, ("target",))
        embeddings = [reference.gen for reference in references]
        if self.reward.embedder == "policy":
            embeddings = [score_rollouts(model, p.prompts, r, temperature, p.images).gen for p, r in both]
        results = zip(places, both, references, embeddings, strict=True)
        sampled = [
            SampledPart(side, rows.to(self.device), part.prompts, part.images, written, reference, embedded)
            for (side, rows), (part, written), reference, embedded in results
        ]
        return sampled, discs

    def prompt_part(self, batch: Batch, side: Side, rows: Tensor) -> PromptPart:
        """Return some items of one side, with random numbers that depend on nothing but their names."""
        whole = batch.query if side == "query" else batch.target
        prompts = (whole if len(rows) == len(batch) else whole.select(rows.to(self.device))).prompts
        names = [f"{side} {rank() * len(batch) + row}" for row in rows.tolist()]
        group, steps = self.rollouts.num_generations, self.max_new_tokens + 1
        numbers = random_numbers(self.seed, batch.position, names, group, steps)
        if self.config.trains_tower:  # policy and reference see otherwise, and each update sees anew
            return PromptPart(prompts, numbers)
        return PromptPart(prompts, numbers, self.model.encode_media(prompts))

    def backward_part(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of one part; processes exchange gradients only with the last one."""
        strategy = self.trainer.strategy
        waiting = strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
        with nullcontext() if last else waiting:
            self.manual_backward(loss)

    def advantages_of(self, part: SampledPart, rewards: Rewards, batch: Batch) -> Advantages:
        """Return the advantages of one part: (R, G) rewards, centred in each group and divided."""
        total = self.shuffled(part, rewards.total, batch) if self.reward.shuffle else rewards.total
        groups = total.view(-1, self.rollouts.num_generations)  # (R, G)
        settings = self.advantages
        return group_advantages(groups, settings.scaling, settings.scale, settings.min_spread)

    @torch.no_grad()
    def greedy_anchors(self, batch: Batch, parts: list[SampledPart]) -> dict[Side, Tensor] | None:
        """Return embeddings (B, D) of the reference's greedy rewrites; None with other anchors."""
        if self.reward.anchors != "greedy":
            return None
        with adapter_values(self.model, self.reference), merged(self.model):
            compared: tuple[Side, ...] = self.sides if "target" in self.sides else ("target",)
            return anchors_of("greedy", self.model, batch, self.rollouts, compared, parts)

    def shuffled(self, part: SampledPart, rewards: Tensor, batch: Batch) -> Tensor:
        """Return the rewards of each group in another order: the control."""
        first = rank() * len(batch)
        names = [f"shuffle {part.side} {first + row}" for row in part.rows.tolist()]
        order = random_numbers(self.seed, batch.position, names, 1, self.rollouts.num_generations).argsort(
            dim=1
        )
        return rewards.view(order.shape).gather(1, order.to(self.device)).flatten()

    def count(self, parts: list[SampledPart]) -> Divisors:
        """Return the number of rewrites and of sampled tokens in the global batch."""
        rows = sum(len(part.rollouts) for part in parts)
        tokens = sum(int((part.rollouts.labels != -100).sum()) for part in parts)
        total = all_reduce_sum(torch.tensor([rows, tokens], device=self.device))
        return Divisors(int(total[0]), int(total[1]), self.max_new_tokens + 1)

    def step(self, batch: Batch, divisors: Divisors, sums: Tensor, update: int) -> None:
        """Take one optimizer step, or stop all ranks if something is out of bounds."""
        loss, drift, *totals, reward = sums.tolist()
        kl, k2, clipped, entropy = (total / max(1, divisors.num_tokens) for total in totals)
        optimizer: Any = self.optimizers()
        parameters = [p for p in self.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.policy.max_grad_norm)
        finite = torch.isfinite(sums).all() and torch.isfinite(norm)
        if not finite or k2 > self.policy.max_kl:
            what = (
                f"the mean KL divergence from the reference is {k2:.3g} nats per token, above "
                f"model.policy.max_kl={self.policy.max_kl}"
                if finite
                else f"not finite: loss {loss}, drift {drift}, KL {kl}, reward {reward}, norm {float(norm)}"
            )
            all_keys = [key for keys in gather_objects(batch.keys) for key in keys]
            raise DivergedError(
                f"Refine-RL stopped at step {self.global_step} (batch {batch.position}, update {update}): "
                f"{what}. Samples: {', '.join(all_keys)}. Lower "
                "model.optimizer.learning_rate or raise model.policy.kl_coef."
            )
        optimizer.step()
        optimizer.zero_grad()
        self.log_means(len(batch), {"loss": loss, "kl": kl, "k2": k2, "clip_fraction": clipped})
        self.log_means(len(batch), {"entropy": entropy, "drift": drift, "grad_norm": float(norm)})

    def log_means(self, size: int, values: dict[str, Any], sync_dist: bool = False) -> None:
        """Log values that docs/reference/metrics.md explains; ``sync_dist``: they differ between ranks."""
        for name, value in values.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", sync_dist=sync_dist, batch_size=size)

    # -- evaluation -----------------------------------------------------------------------------------

    def test_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> EvalOutput:  # type: ignore[override]
        """Evaluate as the other stages do, and cross old and new rewriter with old and new embedder."""
        output = self.evaluate(batch)
        if output.written is not None:
            output.written.crossed = self.crossed(batch, output.written.completions)
        return output

    @torch.no_grad()
    def crossed(self, batch: EvalBatch, new: Completions) -> dict[str, Tensor]:
        """Return (R, D) generative embeddings by "rewriter-embedder", old (reference) or new; not new-new."""
        with adapter_values(self.model, self.reference), merged(self.model):
            read = prefill(self.model, batch.prompts, 1)
            old = write_rewrites(self.model, batch.prompts, state=read).completions
            views = {
                "old-old": embed_completions(self.model, read, old),
                "new-old": embed_completions(self.model, read, new),
            }
        with merged(self.model):
            read = prefill(self.model, batch.prompts, 1)
            return views | {"old-new": embed_completions(self.model, read, old)}

    @torch.no_grad()
    def write_and_measure(self, batch: Batch) -> tuple[list[str], Tensor]:
        """Return greedy rewrites of the queries by the current adapter, and their reward by the reference."""
        training = self.model.training
        self.model.eval()
        with merged(self.model):
            written = write_rewrites(self.model, batch.query.prompts)
        with adapter_values(self.model, self.reference), merged(self.model):
            out = self.model(batch.query.prompts, written.completions)
            kind = self.reward.anchors
            target = anchor_vectors(kind, self.model, batch.target.prompts, self.rollouts)
        self.model.train(training)
        assert out.gen is not None, "a forward with completions reads both modes"
        reward = self.scorer.pair_rewards(batch, out.gen, target, written.well_formed, written.lengths)
        return self.model.processor.decode(written.completions), reward

    def rewrite_changes(self) -> list[RewriteChange]:
        """Return the held-out queries with the reference's rewrite and the present one."""
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
