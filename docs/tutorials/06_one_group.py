# %% [markdown]
# # 06 One group of rewrites, from sampling to gradient
#
# **You will learn** how stage 3 improves a rewriter without any reference rewrite: sample, reward, compare
# within the group, and take one step.
#
# **You need** `make train-cma`. The run that it leaves is our frozen reference.
#
# **It takes** about 10 s of processor time.

# %%
import textwrap

import matplotlib.pyplot as plt
import torch
from lesson import COLOURS, corpus_of, read_pairs, trained_run, verdict

from rime_pl.backbone.adapters import trained_values
from rime_pl.backbone.mllm import load_backbone
from rime_pl.generation.rollouts import score_rollouts
from rime_pl.losses.advantages import group_advantages
from rime_pl.losses.policy_gradient import policy_loss
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.modules.settings import AdvantageSettings, RewardSettings, RolloutSettings

# %% [markdown]
# ## 1. The stage, without a trainer
#
# We build the module of stage 3 and give it the trained model. The *policy* is what trains. The *reference*
# is a copy of its values from before. Only queries are rewritten here.

# %%
run = trained_run()
backbone = load_backbone(run.adapter)
stage = RefineRLModule(
    backbone.config,
    rollouts=RolloutSettings(num_generations=8, max_new_tokens=16, sides="query"),
    reward=RewardSettings(temperature=0.05, free_length=16),
    advantages=AdvantageSettings(scaling="fixed", scale=1.0, min_spread=0.05),
)
stage.backbone, stage.reference = backbone, trained_values(backbone)
pairs = read_pairs(corpus_of(run), "train", "composed", most=40)
batch = backbone.processor.training_batch(pairs[:4])
print("\n".join(f"{pair.query.text!r}, wanted: {pair.target.content_id}" for pair in pairs[:4]))

# %% [markdown]
# ## 2. Anchors
#
# A rewrite is good if its embedding finds the target. The embeddings that it is compared with are the
# **anchors**: the *discriminative* embeddings of the targets, made once by the reference. They do not move
# while the policy learns. Here 40 training pairs give the table of anchors.

# %%
everyone = backbone.processor.training_batch(pairs)
with torch.no_grad():
    discs = {
        side: backbone(rows.prompts).disc
        for side, rows in (("query", everyone.query), ("target", everyone.target))
    }
stage.scorer.add_anchors(everyone, discs)
print(f"{len(stage.scorer.tables['composed'].contents)} anchors for the task 'composed'")

# %% [markdown]
# ## 3. Sample a group
#
# The policy writes 8 rewrites of each query, by chance. One pass of the reference gives the embedding of
# each.

# %%
(part,), discs = stage.sample(batch)
texts = backbone.processor.decode(part.rollouts.completions)
size = stage.rollouts.num_generations
print("\n".join(f"{number}: {text}" for number, text in enumerate(texts[:size])))

# %% [markdown]
# ## 4. Reward
#
# The reward has two parts here. A rewrite that is not empty and ends by itself gets 1. Then it gets the
# logarithm of how much more likely than by chance its embedding picks the right anchor.
#
# ## 5. Compare within the group
#
# Only the difference to the other rewrites of the same query counts. That is the **advantage**: reward
# minus the mean of the group, divided by a fixed scale. A group whose rewards are nearly equal teaches
# nothing and is left out.

# %%
(rewards,) = stage.scorer.rewards([part], batch, discs)
advantages = stage.advantages_of(part, rewards, batch)
groups = rewards.total.view(-1, size)
for number, (group, signal) in enumerate(zip(groups, advantages.has_signal, strict=True)):
    used = "used" if signal else "left out: no signal"
    print(f"group {number}: rewards {group.min():.2f} to {group.max():.2f}, spread {group.std():.3f}, {used}")

# %%
chosen = int(groups.std(dim=1).argmax())  # the group with the largest differences
rows = slice(chosen * size, (chosen + 1) * size)
order = groups[chosen].argsort()
fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4), width_ratios=(1.2, 1))
names = [textwrap.shorten(texts[rows][number] or "(empty)", 46) for number in order.tolist()]
left.barh(range(size), groups[chosen][order], color=COLOURS["gen"])
left.axvline(groups[chosen].mean(), color="black", ls="--", lw=1, label="mean of the group")
left.set(yticks=range(size), yticklabels=names, xlabel="reward")
left.set_title(f"{pairs[chosen].query.text} (wanted: {pairs[chosen].target.content_id})", fontsize=9)
left.legend()
values = advantages.values[chosen][order]
right.barh(
    range(size), values, color=[COLOURS["right" if value > 0 else "wrong"] for value in values.tolist()]
)
right.axvline(0, color="black", lw=1)
right.set(yticks=[], xlabel="advantage")
plt.tight_layout()
plt.show()

# %% [markdown]
# Read the rewrites next to their rewards. A rewrite can be wrong in a word and still be rewarded highly.
# Then no anchor fits it better: we have only a few, and the temperature of 0.05 makes the nearest one win
# clearly. So training takes 256 anchors, and [Refine-RL, step by step](../explanation/refine-rl.md)
# discusses the temperature. The recipe of `make train-refine-rl` takes 0.2, and divides by the spread of the
# group in place of a fixed scale.
#
# ## 6. The loss, and one step
#
# Tokens of rewrites with a positive advantage become more likely, the others less likely. The ratio is 1 in
# the first update, so nothing is clipped yet. The last part of the loss keeps the policy near the
# reference. A run also holds its embeddings near those of the reference, which is left out here.

# %%
before = score_rollouts(backbone, part.prompts, part.rollouts, features=part.images)
loss = policy_loss(
    before.logprobs,
    before.logprobs.detach(),
    advantages.values.flatten(),
    part.rollouts.labels != -100,
    part.reference.logprobs,
    stage.count([part]),
    kl_coef=0.04,
)
print(f"loss {loss.loss:.4f}, sum of k3 {abs(loss.kl_sum):.4f}, clipped tokens {int(loss.clipped_sum)}")

trained = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
loss.loss.backward()
norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
optimizer.step()
print(f"gradient norm {norm:.3f} over {sum(p.numel() for p in trained):,} numbers")

# %% [markdown]
# Did it work? We score the same rewrites again. A point above zero has become more likely.

# %%
with torch.no_grad():
    after = score_rollouts(backbone, part.prompts, part.rollouts, features=part.images)
change = (after.logprobs - before.logprobs.detach()).sum(dim=1)  # of each rewrite, in nats
flat = advantages.values.flatten()
fig, ax = plt.subplots(figsize=(7, 3.6))
ax.axhline(0, color="grey", lw=1)
ax.axvline(0, color="grey", lw=1)
for group in range(len(groups)):
    own = slice(group * size, (group + 1) * size)
    ax.scatter(flat[own], change[own], s=28, label=f"query {group}")
ax.set(xlabel="advantage", ylabel="change of the log-probability (nats)", title="after one step")
ax.legend(fontsize=8)
plt.tight_layout()
plt.show()
better, worse = (float(change[sign].mean()) if bool(sign.any()) else 0.0 for sign in (flat > 0, flat < 0))
print(f"mean change: {better:+.4f} nats with a positive advantage, {worse:+.4f} with a negative one")

# %% [markdown]
# Rewrites of one query share many words, so a step moves them partly together. Only many groups tell which
# words matter. `make train-refine-rl` takes many such steps.
#
# ## Exercise
#
# Write the advantages with a fixed scale. A group counts as noise if the standard deviation of its rewards
# (unbiased, n - 1) is less than `min_spread * scale`. It also does if all rewards are equal. Then all its
# advantages are 0.


# %% tags=["exercise"]
def advantages_of(rewards: torch.Tensor, scale: float, min_spread: float) -> torch.Tensor:
    """Return the advantages of N groups of G rewrites, (N, G).

    Args:
        rewards: (N, G) float32.
        scale: Divisor of the centred rewards.
        min_spread: Share of ``scale`` below which a group is noise.
    """
    raise NotImplementedError


def check(answer) -> None:
    """Compare with the function that stage 3 uses."""
    rewards = torch.tensor([[1.0, 3.0, 2.0], [2.0, 2.01, 2.0], [0.0, 0.0, 0.0], [0.3, -0.3, 0.6]])
    for scale, min_spread in ((1.0, 0.05), (2.0, 0.0), (0.5, 0.2)):
        right = group_advantages(rewards, "fixed", scale, min_spread).values
        got = answer(rewards, scale, min_spread)
        assert torch.allclose(right, got), f"must be {right.tolist()}, but is {got.tolist()}."


# %%
print(verdict(check, advantages_of))

# %% [markdown]
# The solution is in [solutions.py](solutions.py). Read on in [07 QLoRA, memory and `rime
# plan`](07_qlora_and_memory.py), or in [Refine-RL, step by step](../explanation/refine-rl.md).
