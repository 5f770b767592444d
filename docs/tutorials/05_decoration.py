# %% [markdown]
# # 05 Why a rewrite becomes decoration, and the decisive term
#
# **You will learn** how a model can solve the alignment without reading its rewrite, and which term in the
# loss prevents it.
#
# **You need** `make train-cma`.
#
# **It takes** about 30 s of processor time.

# %%
import matplotlib.pyplot as plt
import torch
from lesson import COLOURS, corpus_of, read_pairs, train_steps, trained_run, verdict

from rime_pl.backbone.mllm import Backbone, load_backbone
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.losses.alignment import cross_mode_alignment, decisive_rewrite
from rime_pl.metrics.derangement import derange
from rime_pl.metrics.retrieval import first_rows, recall_at, retrieval_ranks
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.wrong_rewrites import empty_completions
from rime_pl.types import ModeEmbeddings, content_hash

# %% [markdown]
# ## 1. The shortcut
#
# `<gen_emb>` stands behind `<disc_emb>` and sees it. So a network can copy: g = d. Then the alignment asks
# for nothing more than d can do already, and no word of the rewrite matters. We make up embeddings in which
# d is good, and g says nothing, and compare that with the copy.

# %%
generator = torch.Generator().manual_seed(0)


def near(vectors: torch.Tensor, noise: float) -> torch.Tensor:
    """Return vectors of length 1 near the given ones."""
    return torch.nn.functional.normalize(
        vectors + noise * torch.randn(vectors.shape, generator=generator), dim=-1
    )


meaning = near(torch.zeros(16, 32), 1.0)
d_query, d_target = near(meaning, 0.05), near(meaning, 0.05)
random = ModeEmbeddings(d_query, near(torch.zeros(16, 32), 1.0))
copied = ModeEmbeddings(d_query, d_query)
targets = ModeEmbeddings(d_target, d_target)
print(f"alignment, g says nothing: {cross_mode_alignment(random, targets, 0.05):.3f}")
print(f"alignment, g copies d:     {cross_mode_alignment(copied, targets, 0.05):.3f}")

# %% [markdown]
# The copy is a perfect solution for the alignment.
#
# ## 2. The decisive term
#
# We ask for more: with a *wrong* rewrite, the query has to be farther from its target than with its own.
#
# ```
# L_dec = mean_i  sum over x in {g_t, d_t} of  softplus( (g(q_i, wrong) . x_i - g(q_i, own) . x_i) / tau + m )
# ```
#
# A copy gives the same g for every rewrite. Then the difference is 0, and the term stays at 2 softplus(m),
# however good d is. The margin m is 1 here, and 4 in the recipe of OpenMoji (`model.margin_dec`). The only
# way down is to use the words.

# %%
wrong = near(torch.zeros(16, 32), 1.0)
for name, other in (
    ("the copy, g is the same with a wrong rewrite", d_query),
    ("g follows the rewrite", wrong),
):
    print(f"{name}: decisive term {decisive_rewrite(d_query, other, targets, 0.05):.3f}")

# %% [markdown]
# ## 3. Train both ways, from the same start
#
# We take the adapter after stage 1 and train it twice for the same few steps of stage 2: once by plain
# alignment (`lambda_dec` 0), once with the decisive term. In each batch, half of the queries get the
# rewrite of another pair, and half get an empty one.

# %%
start = trained_run("sft")
corpus = corpus_of(start)
size, steps = 16, 20
pairs = read_pairs(corpus, "train", "composed", most=size * steps)
models: dict[str, Backbone] = {"after SFT": load_backbone(start.adapter)}
logged = {}
for name, weight in (("plain alignment", 0.0), ("with the decisive term", 1.0)):
    backbone = load_backbone(start.adapter)
    stage = CMAModule(backbone.config, temperature=0.05, lambda_dec=weight)
    parts = [pairs[first : first + size] for first in range(0, len(pairs) - size + 1, size)]
    batches = [backbone.processor.training_batch(part, number) for number, part in enumerate(parts)]
    backbone.train()
    logged[name] = train_steps(stage, backbone, batches, learning_rate=1e-3)
    models[name] = backbone.eval()
    last = {key: value for key, value in logged[name][-1].items() if "loss" in key}
    print(f"{name}:", *(f"{key.removeprefix('train/')} {value:.3f}" for key, value in last.items()))

# %% [markdown]
# ## 4. Take the rewrite away
#
# The rewrite ablation of [tutorial 02](02_two_embeddings.py), for all three models. The targets keep their
# own rewrites.

# %%
held = read_pairs(corpus, "test", "composed", most=64)
content = torch.tensor([content_hash(pair.target.content_id) for pair in held])
kept = first_rows(content, torch.arange(len(held)))
results: dict[str, dict[str, float]] = {}
for name, backbone in models.items():
    processor = backbone.processor
    asked = processor.prompts([pair.query for pair in held])
    shown = processor.prompts([held[row].target for row in kept.tolist()])
    with torch.no_grad():
        gallery = backbone(shown, write_rewrites(backbone, shown).completions).gen
        own = write_rewrites(backbone, asked).completions
        choices = {
            "own": own,
            "shuffled": own.select(derange(content)),
            "empty": empty_completions(len(held), 2, processor, torch.device("cpu")),
        }
        vectors = {kind: backbone(asked, choice).gen for kind, choice in choices.items()}
    ranks = {kind: retrieval_ranks(g, gallery, content[kept], content) for kind, g in vectors.items()}
    results[name] = {kind: float(recall_at(found, 1).float().mean()) for kind, found in ranks.items()}
    print(f"{name:24}" + "  ".join(f"{kind} {value:.2f}" for kind, value in results[name].items()))

# %%
fig, ax = plt.subplots(figsize=(9, 3.6))
bars = {"own": COLOURS["gen"], "shuffled": COLOURS["wrong"], "empty": "#56b4e9"}
for number, (kind, colour) in enumerate(bars.items()):
    places = [place + 0.26 * (number - 1) for place in range(len(results))]
    drawn = ax.bar(
        places, [one[kind] for one in results.values()], 0.24, color=colour, label=f"{kind} rewrite"
    )
    ax.bar_label(drawn, fmt="%.2f", fontsize=8)
ax.set(xticks=range(len(results)), xticklabels=list(results), ylabel="recall@1, gen-gen", ylim=(0, 1.1))
ax.legend(ncols=3, loc="upper center")
plt.tight_layout()
plt.show()

# %% [markdown]
# Read the bar *empty*. It says how far the model comes without a word. Plain alignment lets it rise or
# stay, because the model learns to do without. The decisive term presses it down, and *own* keeps its
# height. These are a few steps on few pairs: `make compare` trains both to the end and adds intervals.
#
# ## Exercise
#
# Write the decisive term. The target counts in both of its modes.


# %% tags=["exercise"]
def decisive(
    own: torch.Tensor, wrong: torch.Tensor, targets: ModeEmbeddings, temperature: float, margin: float
) -> torch.Tensor:
    """Return the mean over the B queries of the sum over both modes of the target, a scalar.

    Args:
        own: (B, D), generative embeddings of the queries with their own rewrites.
        wrong: (B, D), the same queries with wrong rewrites.
        targets: Both embeddings of the B targets.
        temperature: Divisor of the differences.
        margin: What is added to each difference.
    """
    raise NotImplementedError


def check(answer) -> None:
    """Compare with the function that stage 2 uses."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.nn.functional.normalize(torch.randn(4, 6, 8, generator=generator), dim=-1)
    own, wrong, targets = vectors[0], vectors[1], ModeEmbeddings(vectors[2], vectors[3])
    for temperature, margin in ((0.1, 1.0), (0.5, 0.0)):
        right = decisive_rewrite(own, wrong, targets, temperature, margin)
        got = answer(own, wrong, targets, temperature, margin)
        assert torch.allclose(right, got), f"the term must be {right:.4f}, but is {got:.4f}."


# %%
print(verdict(check, decisive))

# %% [markdown]
# The solution is in [solutions.py](solutions.py). Read on in [06 One group of rewrites](06_one_group.py),
# or in [where a rewrite pays](../explanation/alignment-scenes.md).
