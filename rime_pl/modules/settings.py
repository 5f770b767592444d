"""The settings of the stages, in groups: ``model.optimizer``, ``model.rollouts``, ``model.reward`` and so on.

A stage takes only the groups that it uses. Each group checks its own values; what concerns two groups is
checked by the stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rime_pl.bounds import at_least, greater_than_0
from rime_pl.errors import RimeError
from rime_pl.losses.advantages import Scaling
from rime_pl.losses.policy_gradient import LossType

RewardForm = Literal["anchored", "rank_margin"]
AnchorKind = Literal["discriminative", "greedy", "rollouts"]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with linear warm-up and cosine decay to 0.

    Args:
        learning_rate: Peak learning rate, reached after the warm-up.
        warmup_steps: Number of warm-up steps, at most half of the run.
        weight_decay: Weight decay of the LoRA matrices; the token rows have none.
    """

    learning_rate: float = 1e-4
    warmup_steps: int = 20
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        at_least(0, "model.optimizer", self, "learning_rate", "warmup_steps", "weight_decay")


@dataclass(frozen=True)
class MicroBatchSettings:
    """Micro-batches: batch, negatives and gradients stay the same (docs/how-to/large-batches.md).

    Args:
        size: Micro-batch size in rows on each process (default: the whole batch).
        tokens: Micro-batch size in tokens, visual ones included; in place of ``size``.
        gradient_cache: Whether micro-batches run twice and keep nothing in between. If false they run once
            and keep their activations. That takes less time, and saves memory only with gradient
            checkpointing: a layer is then computed again for one micro-batch at a time.
        reuse_vision: Whether features of a frozen vision tower are kept between the two passes: faster, but
            the memory for them grows with the batch. A tower that trains runs in both passes.
    """

    size: int | None = None
    tokens: int | None = None
    gradient_cache: bool = True
    reuse_vision: bool = True

    def __post_init__(self) -> None:
        if self.size is not None and self.tokens is not None:
            raise RimeError(
                f"model.micro_batches.size={self.size} and model.micro_batches.tokens={self.tokens} cannot "
                "both be set. Give one of them."
            )
        for name, value in (("size", self.size), ("tokens", self.tokens)):
            if value is not None and value < 1:
                raise RimeError(
                    f"model.micro_batches.{name} must be 1 or more, but is {value}. Leave it out (null) to "
                    "take the whole batch at once."
                )

    @property
    def whole_batch(self) -> bool:
        """Return whether each side goes through the model in one forward."""
        return self.size is None and self.tokens is None


@dataclass(frozen=True)
class NegativeSettings:
    """How negatives count in the contrastive losses of SFT and CMA; data.hard_negatives adds some.

    Args:
        hardness: Weight of a negative by its cosine s: it counts exp(hardness * s) times; 0 counts all alike.
        false_negative_margin: A negative whose cosine is greater than that of the right answer by more than
            this is left out, because it is probably right, too; null leaves out none.
    """

    hardness: float = 0.0
    false_negative_margin: float | None = None

    def __post_init__(self) -> None:
        at_least(0, "model.negatives", self, "hardness")


@dataclass(frozen=True)
class RolloutSettings:
    """How rewrites are sampled.

    Args:
        num_generations: Number of rewrites sampled for each item (G).
        max_new_tokens: Token budget of a sampled rewrite (default: prompt.max_rewrite_tokens).
        temperature: Divisor of the logits in sampling and in every log-probability.
        sides: Sides that are rewritten and rewarded: queries only, or both.
        items_per_pass: Items of one side that are read and scored together, to save memory (default: the
            whole batch). The results are the same up to rounding. Image features of all items are kept until
            the step ends.
        passes_per_sampling: Passes whose rewrites are written together, to save memory (default: all of both
            sides). Their keys and values are kept meanwhile. More are faster, with the same results up to
            rounding.
    """

    num_generations: int = 8
    max_new_tokens: int | None = None
    temperature: float = 1.0
    sides: Literal["query", "both"] = "both"
    items_per_pass: int | None = None
    passes_per_sampling: int | None = None

    def __post_init__(self) -> None:
        sizes = ("max_new_tokens", "items_per_pass", "passes_per_sampling")
        greater_than_0("model.rollouts", self, "temperature", *sizes)
        if self.num_generations < 2:
            raise RimeError(
                f"model.rollouts.num_generations must be 2 or more, but is {self.num_generations}: a reward "
                "is compared with those of the same item's other rewrites."
            )


@dataclass(frozen=True)
class RewardSettings:
    """What a sampled rewrite is rewarded for.

    Args:
        form: Form of the embedding reward: ``anchored`` (log-probability of the right anchor) or
            ``rank_margin`` (as in UME-R1).
        anchors: What a rewrite's embedding is compared with: ``discriminative`` embeddings of the other
            side by the reference (of the batch and of a table), the generative ones of its ``greedy``
            rewrites instead (a control), or the other side's ``rollouts`` (as in UME-R1; needs
            ``model.rollouts.sides: both``).
        embedder: Model that embeds the rewrites: the frozen ``reference``, or the ``policy`` in training.
        num_anchors: Number of training pairs of each task in the table of anchors; 0 for no table.
        temperature: Divisor of the cosines in the reward.
        weight_format: Weight of the reward for a rewrite that is not empty and ends by itself.
        weight_embedding: Weight of the embedding reward.
        weight_length: Weight of the penalty for tokens beyond ``free_length``.
        free_length: Number of tokens without a penalty.
        shuffle: Whether rewards are shuffled within each group. This is a control: they then say nothing.
    """

    form: RewardForm = "anchored"
    anchors: AnchorKind = "discriminative"
    embedder: Literal["reference", "policy"] = "reference"
    num_anchors: int = 256
    temperature: float = 0.05
    weight_format: float = 1.0
    weight_embedding: float = 1.0
    weight_length: float = 0.0
    free_length: int = 128
    shuffle: bool = False

    def __post_init__(self) -> None:
        greater_than_0("model.reward", self, "temperature", "free_length")
        weights = ("weight_format", "weight_embedding", "weight_length")
        at_least(0, "model.reward", self, "num_anchors", *weights)


@dataclass(frozen=True)
class AdvantageSettings:
    """How rewards of a group become advantages.

    Args:
        scaling: Divisor of the centred rewards: a ``fixed`` scale, or the ``std`` of the group.
        scale: The fixed divisor, in units of the reward.
        min_spread: Groups with a standard deviation below this share of ``scale`` give no signal.
    """

    scaling: Scaling = "fixed"
    scale: float = 1.0
    min_spread: float = 0.05

    def __post_init__(self) -> None:
        greater_than_0("model.advantages", self, "scale")
        at_least(0, "model.advantages", self, "min_spread")


@dataclass(frozen=True)
class PolicySettings:
    """The clipped policy-gradient loss and its updates.

    Args:
        loss_type: How the loss of the tokens is averaged: grpo, dr_grpo or dapo.
        clip_low: The probability ratio is clipped to at least 1 - clip_low.
        clip_high: The probability ratio is clipped to at most 1 + clip_high.
        kl_coef: Weight of the KL divergence (k3) from the reference.
        drift_coef: Weight of the penalty on embeddings of the policy that move away from the reference's, of
            the sides in ``model.rollouts.sides``. It leaves the words free.
        max_kl: Mean KL divergence per token, in nats, above which the run stops. It is compared with the
            estimator k2 (``train/k2``), because a single token can make k3 as high as this.
        num_updates: Optimizer steps for each batch of rollouts; with 1 the ratio is 1 and nothing is clipped.
        max_grad_norm: Gradient norm above which gradients are scaled down to it.
    """

    loss_type: LossType = "dapo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    kl_coef: float = 0.04
    drift_coef: float = 0.0
    max_kl: float = 10.0
    num_updates: int = 1
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        greater_than_0("model.policy", self, "max_kl", "num_updates", "max_grad_norm")
        at_least(0, "model.policy", self, "clip_low", "clip_high", "kl_coef", "drift_coef")
