# %% [markdown]
# # 04 Why the two modes do not meet, and how alignment cures it
#
# **You will learn** why the two kinds of embeddings do not fit together after stage 1, and what stage 2
# does about it.
#
# **You need** `make train-cma`, which keeps the adapter of both stages.
#
# **It takes** about 15 s of processor time.

# %%
import matplotlib.pyplot as plt
import torch
from lesson import COLOURS, corpus_of, read_pairs, trained_run, verdict

import rime_pl
from rime_pl.losses.alignment import cross_mode_alignment
from rime_pl.losses.contrastive import info_nce
from rime_pl.metrics.retrieval import first_rows, recall_at, retrieval_ranks
from rime_pl.types import MODE_PAIRS, ModeEmbeddings, content_hash

# %% [markdown]
# ## 1. Embed the same items before and after stage 2
#
# We take the adapter after SFT and the one after CMA. Each embeds the same queries and targets in both
# modes.

# %%
pairs = read_pairs(corpus_of(trained_run()), "test", "name_to_picture", most=80)
content = torch.tensor([content_hash(pair.target.content_id) for pair in pairs])
kept = first_rows(content, torch.arange(len(pairs)))
pairs, content = [pairs[row] for row in kept.tolist()], content[kept]  # each content once

spaces: dict[str, tuple[ModeEmbeddings, ModeEmbeddings]] = {}
for stage in ("sft", "cma"):
    model = rime_pl.load(trained_run(stage).path)
    sides = ([pair.query for pair in pairs], [pair.target for pair in pairs])
    spaces[stage] = tuple(
        ModeEmbeddings(model.encode(side), model.encode(side, mode="generative")) for side in sides
    )
print(f"{len(pairs)} pairs, vectors of {spaces['sft'][0].disc.shape[1]} numbers")

# %% [markdown]
# ## 2. Look at them
#
# A vector has too many numbers to draw, so we project each stage's vectors onto the two directions in which
# they vary most (principal components). A line joins the two embeddings of the same picture.


# %%
def two_directions(vectors: torch.Tensor) -> torch.Tensor:
    """Return the projection of (R, D) vectors onto their first two principal components, (R, 2)."""
    centred = vectors - vectors.mean(dim=0)
    return centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T


fig, axes = plt.subplots(1, 2, figsize=(11, 4.6))
for ax, (stage, (_, targets)) in zip(axes, spaces.items(), strict=True):
    flat = two_directions(torch.cat([targets.disc, targets.gen]))
    disc, gen = flat.chunk(2)
    for one, two in zip(disc, gen, strict=True):
        ax.plot(*torch.stack([one, two]).T, color="#cccccc", lw=0.7, zorder=0)
    ax.scatter(*disc.T, color=COLOURS["disc"], s=18, label="discriminative")
    ax.scatter(*gen.T, color=COLOURS["gen"], s=18, label="generative")
    ax.set(title={"sft": "after SFT", "cma": "after CMA"}[stage], xticks=[], yticks=[])
axes[0].legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# Two numbers say the same without a projection: the mean cosine of the two embeddings of *one* item, and
# that of two *different* items. And the recall of all four mode pairs says what it means for a search.

# %%
for stage, (queries, targets) in spaces.items():
    cosines = targets.gen @ targets.disc.T
    same = cosines.diagonal().mean()
    different = cosines[~torch.eye(len(cosines), dtype=torch.bool)].mean()
    print(f"{stage}: cosine of g and d, same picture {same:.3f}, different pictures {different:.3f}")
    for name in MODE_PAIRS:
        asked, found = name.split("-")
        ranks = retrieval_ranks(getattr(queries, asked), getattr(targets, found), content, content)
        print(f"     {name}: recall@1 {recall_at(ranks, 1).float().mean():.3f}")

# %% [markdown]
# ## 3. Why? Nothing in stage 1 compares g with d
#
# The loss of stage 1 compares g with g, and d with d. So it would not notice if all g were turned by the
# same rotation. We try it: a random rotation of every generative vector, on both sides.

# %%
queries, targets = spaces["sft"]
generator = torch.Generator().manual_seed(0)
width = queries.gen.shape[1]
rotation = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
turned = [ModeEmbeddings(side.disc, side.gen @ rotation) for side in (queries, targets)]
for name, (query, target) in {"as trained": (queries, targets), "g rotated": turned}.items():
    gen, disc = (info_nce(getattr(query, m), getattr(target, m), 0.05) for m in ("gen", "disc"))
    cross = cross_mode_alignment(query, target, 0.05)
    print(f"{name:11} NCE gen-gen {gen:.3f}, NCE disc-disc {disc:.3f}; across the modes {cross:.3f}")

# %% [markdown]
# The two terms of stage 1 stay as they were. Only the last column changes. So stage 1 has no reason to
# choose one rotation rather than another. The modes still meet a little after it: both vectors come from
# one network, and `<gen_emb>` sees `<disc_emb>`.
#
# ## 4. The cure: compare across the modes
#
# ```
# L_CMA = NCE(g_q, d_t) + NCE(d_q, g_t)
# ```
#
# Stage 2 adds this. It needs no further forward pass, because the four vectors are there already.

# %%
for stage, (queries, targets) in spaces.items():
    print(f"{stage}: L_CMA of these pairs {cross_mode_alignment(queries, targets, 0.05):.3f}")

# %% [markdown]
# The purpose is the paper's. The formula is ours, because we worked without access to the equations in its
# body.
#
# ## Exercise
#
# Write the alignment with `info_nce`. Each term must take its query from one mode and its target from the
# other.


# %% tags=["exercise"]
def alignment(queries: ModeEmbeddings, targets: ModeEmbeddings, temperature: float) -> torch.Tensor:
    """Return the loss across the modes, a scalar. ``queries.gen`` and ``queries.disc`` are (B, D)."""
    raise NotImplementedError


def check(answer) -> None:
    """Compare with the function that stage 2 uses."""
    generator = torch.Generator().manual_seed(2)
    vectors = torch.nn.functional.normalize(torch.randn(4, 5, 8, generator=generator), dim=-1)
    queries, targets = ModeEmbeddings(vectors[0], vectors[1]), ModeEmbeddings(vectors[2], vectors[3])
    right, got = cross_mode_alignment(queries, targets, 0.1), answer(queries, targets, 0.1)
    assert torch.allclose(right, got), f"the loss must be {right:.4f}, but is {got:.4f}."


# %%
print(verdict(check, alignment))

# %% [markdown]
# The solution is in [solutions.py](solutions.py). Read on in [05 Why a rewrite becomes
# decoration](05_decoration.py), or in [what alignment changes](../explanation/alignment.md).
