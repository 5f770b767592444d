# %% [markdown]
# # 03 InfoNCE by hand, then SFT
#
# **You will learn** the contrastive loss on a matrix of four by four, what the temperature does, and the
# terms of stage 1. Then you run some of its training steps.
#
# **You need** `make train-cma`.
#
# **It takes** about 20 s of processor time.

# %%
import matplotlib.pyplot as plt
import torch
from lesson import corpus_of, read_pairs, train_steps, trained_run, verdict

import rime_pl
from rime_pl.backbone.mllm import Backbone
from rime_pl.losses.contrastive import info_nce
from rime_pl.modules.sft import SFTModule
from rime_pl.processing import RimeProcessor

# %% [markdown]
# ## 1. Four queries, four targets
#
# We embed four names and four pictures. A row of the matrix is a query, a column is a target, and a number
# is the cosine of the two. The right answers stand on the diagonal.

# %%
run = trained_run()
model = rime_pl.load(run.path)
corpus = corpus_of(run)
four = read_pairs(corpus, "test", "name_to_picture", most=4)
queries = model.encode([pair.query for pair in four])  # (4, D)
targets = model.encode([pair.target for pair in four])  # (4, D)
cosines = queries @ targets.T
torch.set_printoptions(precision=3, sci_mode=False)
print(cosines)

# %% [markdown]
# ## 2. From cosines to a loss
#
# Divide by the **temperature**, and take the softmax of each row: the probability that the query picks this
# target. The loss of a query is minus the logarithm of the probability of the right one. Then the same for
# the columns, because a target should also pick its query. InfoNCE is the mean of both directions.

# %%
temperature = 0.05
by_query = (cosines / temperature).log_softmax(dim=1)
by_target = (cosines / temperature).log_softmax(dim=0)
print("loss of each query: ", -by_query.diagonal())
print("loss of each target:", -by_target.diagonal())
by_hand = -0.5 * (by_query.diagonal().mean() + by_target.diagonal().mean())
print(f"by hand {by_hand:.6f}, info_nce {info_nce(queries, targets, temperature):.6f}")

# %% [markdown]
# A small temperature makes small differences of the cosine count more. With a large one, all targets are
# nearly equally likely, and even a good model has a high loss.

# %%
fig, axes = plt.subplots(1, 3, figsize=(11, 3.4))
for ax, tau in zip(axes, (1.0, 0.2, 0.05), strict=True):
    chances = (cosines / tau).softmax(dim=1)
    ax.imshow(chances, vmin=0, vmax=1, cmap="Blues")
    for row in range(len(four)):
        for column in range(len(four)):
            value = float(chances[row, column])
            ink = "white" if value > 0.5 else "black"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)
    ax.set(title=f"temperature {tau}: loss {info_nce(queries, targets, tau):.3f}", xlabel="target")
    ax.set(xticks=range(len(four)), yticks=range(len(four)))
axes[0].set_ylabel("query")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 3. The wrong answers come from the batch
#
# By default nobody collects wrong answers: each query is compared with the targets of the other pairs. A
# larger batch has more of them and is harder. If all embeddings are equal, each of B targets has
# probability 1/B, so the loss is log B. That is the number to beat.

# %%
for size in (2, 8, 32):
    equal = torch.ones(size, 3) / 3**0.5
    loss = info_nce(equal, equal, temperature)
    print(f"batch {size:2}: loss of equal embeddings {loss:.3f}, log B {torch.tensor(size).log():.3f}")

# %% [markdown]
# ## 4. Stage 1: the sum of three terms
#
# ```
# L_SFT = NCE(g_q, g_t) + NCE(d_q, d_t) + lambda_ce (CE_q + CE_t)
# ```
#
# The first two are what you just computed, once for each mode. The third is the loss of a language model:
# it teaches to write the reference rewrite. All come from one forward pass of each side.
#
# We attach a *new* adapter to the frozen base model, as `make train-sft` does at its start. Then we run a
# few steps of the stage's own `training_step`. The base model has only learned to caption pictures.

# %%
config = model.backbone.config
torch.manual_seed(0)
fresh = Backbone(config, RimeProcessor.from_pretrained(config.name_or_path, config.prompt))
trained = sum(p.numel() for p in fresh.parameters() if p.requires_grad)
print(f"{trained:,} numbers train")

size, steps = 16, 24
pairs = read_pairs(corpus, "train", "name_to_picture", most=size * steps)
parts = [pairs[start : start + size] for start in range(0, len(pairs) - size + 1, size)]
batches = [fresh.processor.training_batch(part, position) for position, part in enumerate(parts)]
logged = train_steps(SFTModule(config, temperature=temperature), fresh, batches, learning_rate=2e-3)
first, last = logged[0], logged[-1]
print("\n".join(f"{name:26} {first[name]:6.3f} -> {last[name]:6.3f}" for name in first))

# %%
fig, ax = plt.subplots(figsize=(8, 3.4))
lines = {
    "train/loss_info_nce_disc": "discriminative",
    "train/loss_info_nce_gen": "generative",
    "train/loss_ce": "writing",
}
for name, label in lines.items():
    ax.plot([step[name] for step in logged], label=label, lw=2)
ax.axhline(torch.tensor(size).log(), color="grey", ls="--", lw=1, label="log B: all embeddings equal")
ax.set(xlabel="step", ylabel="nats", title="the three terms of stage 1")
ax.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# The generative term starts lower than the discriminative one. In training both sides carry their reference
# rewrites. These share words, so g has an easy task from the beginning. It gets harder when the model has
# to write by itself, and for that there is the third term. The figure shows its sum over both sides.
#
# ## Exercise
#
# Write the loss yourself, from the matrix of cosines. Both directions count.


# %% tags=["exercise"]
def symmetric_loss(cosines: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the InfoNCE loss of both directions, a scalar.

    Args:
        cosines: (B, B), row = query, column = target, right answers on the diagonal.
        temperature: Divisor of the cosines.
    """
    raise NotImplementedError


def check(answer) -> None:
    """Compare loss and gradient with the function that trains the stages."""
    generator = torch.Generator().manual_seed(1)
    for size, temperature in ((4, 0.05), (7, 0.5)):
        vectors = torch.nn.functional.normalize(torch.randn(2, size, 6, generator=generator), dim=-1)
        vectors.requires_grad_()
        right, got = info_nce(*vectors, temperature), answer(vectors[0] @ vectors[1].T, temperature)
        assert torch.allclose(right, got, atol=1e-5), f"the loss must be {right:.4f}, but is {got:.4f}."
        wanted, found = (torch.autograd.grad(loss, vectors)[0] for loss in (right, got))
        assert torch.allclose(wanted, found, atol=1e-4), "the loss is right, but its gradient is not."


# %%
print(verdict(check, symmetric_loss))

# %% [markdown]
# The solution is in [solutions.py](solutions.py). Read on in [04 Why the modes do not
# meet](04_why_modes_do_not_meet.py), or in
# [`rime_pl/losses/contrastive.py`](../../rime_pl/losses/contrastive.py), which also leaves out false
# negatives, and in [`rime_pl/modules/sft.py`](../../rime_pl/modules/sft.py).
