"""Settings that got a new name: old name -> new name. An old settings file or option is refused with both.

Called by the parser before it reads the words. A row can go when nobody has such a file any more.
"""

from __future__ import annotations

RENAMED = {
    "data.written": "data.completion",
    "recall.trace": "recall.rewrite_ablation",
    "model.learning_rate": "model.optimizer.learning_rate",
    "model.warmup_steps": "model.optimizer.warmup_steps",
    "model.weight_decay": "model.optimizer.weight_decay",
    "model.micro_batch_size": "model.micro_batches.size",
    "model.micro_batch_tokens": "model.micro_batches.tokens",
    "model.gradient_cache": "model.micro_batches.gradient_cache",
    "model.reuse_vision": "model.micro_batches.reuse_vision",
    "model.num_generations": "model.rollouts.num_generations",
    "model.max_new_tokens": "model.rollouts.max_new_tokens",
    "model.sampling_temperature": "model.rollouts.temperature",
    "model.sides": "model.rollouts.sides",
    "model.items_per_pass": "model.rollouts.items_per_pass",
    "model.reward": "model.reward.form",  # a group has taken the name of the value
    "model.anchors": "model.reward.anchors",
    "model.embedder": "model.reward.embedder",
    "model.num_anchors": "model.reward.num_anchors",
    "model.reward_temperature": "model.reward.temperature",
    "model.weight_format": "model.reward.weight_format",
    "model.weight_embedding": "model.reward.weight_embedding",
    "model.weight_length": "model.reward.weight_length",
    "model.free_length": "model.reward.free_length",
    "model.shuffle_rewards": "model.reward.shuffle",
    "model.scaling": "model.advantages.scaling",
    "model.reward_scale": "model.advantages.scale",
    "model.min_spread": "model.advantages.min_spread",
    "model.loss_type": "model.policy.loss_type",
    "model.clip_low": "model.policy.clip_low",
    "model.clip_high": "model.policy.clip_high",
    "model.kl_coef": "model.policy.kl_coef",
    "model.max_kl": "model.policy.max_kl",
    "model.num_updates": "model.policy.num_updates",
    "model.max_grad_norm": "model.policy.max_grad_norm",
}
#: Values that got a new name together with their setting.
VALUES = {("data.written", "pause"): "filler"}


def new_name(name: str, value: object, known: set[str]) -> str | None:
    """Return what to write instead of a setting with an old name; None if the name is not an old one.

    Args:
        name: The setting as given, such as ``model.learning_rate``.
        value: Its value as given.
        known: The settings that the parser takes today.

    Example:
        >>> new_name("data.written", "pause", {"data.completion"})
        'data.completion (its value pause is now filler)'
        >>> new_name("model.reward", "anchored", {"model.reward", "model.reward.form"})
        'model.reward.form'
        >>> new_name("model.reward", {"form": "anchored"}, {"model.reward", "model.reward.form"}) is None
        True
    """
    new = RENAMED.get(name)
    if new not in known or (name in known and not (new.startswith(f"{name}.") and _one_word(value))):
        return None
    value_now = VALUES.get((name, str(value)))
    return f"{new} (its value {value} is now {value_now})" if value_now else new


def _one_word(value: object) -> bool:
    """Return whether a value is a plain word; a group is given as a mapping or as a file."""
    return isinstance(value, str) and value.isidentifier()
