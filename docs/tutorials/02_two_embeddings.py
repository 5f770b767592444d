# %% [markdown]
# # 02 Two embeddings from one forward pass
#
# **You will learn** to take a rewrite away or to exchange it, and what that does to the rank of the right
# target. This is the *rewrite ablation* that every run reports.
#
# **You need** `make train-cma`.
#
# **It takes** about 15 s of processor time.

# %%
import matplotlib.pyplot as plt
import torch
from lesson import COLOURS, corpus_of, read_pairs, trained_run, verdict

import rime_pl
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.metrics.derangement import derange
from rime_pl.metrics.retrieval import TIE, first_rows, retrieval_ranks
from rime_pl.modules.wrong_rewrites import empty_completions
from rime_pl.types import content_hash

# %% [markdown]
# ## 1. A gallery and some queries
#
# Each query shows a picture and asks for a change, such as another skin tone. The gallery holds each target
# once.

# %%
run = trained_run()
model = rime_pl.load(run.path)
backbone, processor = model.backbone, model.backbone.processor

pairs = read_pairs(corpus_of(run), "test", "composed", most=96)
content = torch.tensor([content_hash(pair.target.content_id) for pair in pairs])
kept = first_rows(content, torch.arange(len(pairs)))  # the first pair of each content
gallery = model.encode([pairs[row].target for row in kept.tolist()], "generative")
prompts = processor.prompts([pair.query for pair in pairs])
print(f"{len(pairs)} queries, {len(gallery)} targets")

# %% [markdown]
# ## 2. The rewrite as an input
#
# A forward pass takes the prompts and *any* completions. So the rewrite is an input that we can choose. We
# try four:
#
# - **own**: what the model writes by itself,
# - **reference**: what the corpus gives,
# - **shuffled**: the own rewrite of another query, with other content,
# - **empty**: no word at all.

# %%
written = write_rewrites(backbone, prompts).completions
partner = derange(content)  # for each query, another one that wants something else
rewrites = {
    "own": written,
    "reference": processor.completions([pair.query.rewrite for pair in pairs]),
    "shuffled": written.select(partner),
    "empty": empty_completions(len(pairs), 2, processor, torch.device("cpu")),
}
ranks, disc = {}, {}
with torch.no_grad():
    for name, completions in rewrites.items():
        out = backbone(prompts, completions)
        ranks[name] = retrieval_ranks(out.gen, gallery, content[kept], content)
        disc[name] = out.disc
for name, found in ranks.items():
    print(
        f"{name:10} recall@1 {float((found == 1).float().mean()):.3f}   mean rank {found.float().mean():.1f}"
    )
change = max(float((vectors - disc["own"]).abs().max()) for vectors in disc.values())
print(f"largest change of a number of d: {change:.1e}")

# %% [markdown]
# The queries are the same in all four rows. Only the text after the prompt differs. Three things to see:
#
# - A rewrite of another query leads to *its* target. So the model believes the rewrite.
# - Without a rewrite the model still sees the query, but it was trained to need the rewrite.
# - The difference between own and reference is what a better writer could still gain. We call it
#   *headroom*.
#
# The picture shows the rank of every query. Lower is better.

# %%
colours = {
    "own": COLOURS["gen"],
    "reference": COLOURS["right"],
    "shuffled": COLOURS["wrong"],
    "empty": "#56b4e9",
}
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(1, 1.6))
shares = [float((found == 1).float().mean()) for found in ranks.values()]
bars = left.bar(list(ranks), shares, color=[colours[name] for name in ranks])
left.bar_label(bars, fmt="%.2f")
left.set(ylabel="recall@1", ylim=(0, 1.1), title="the right target comes first")
for name, found in ranks.items():
    steps = found.sort().values
    right.plot(torch.arange(1, len(steps) + 1), steps, color=colours[name], label=name, lw=2)
right.set(
    yscale="log", xlabel="queries, sorted by rank", ylabel="rank of the right target", title="all ranks"
)
right.legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 3. By hand
#
# Now be the writer. We take one query and write three rewrites ourselves. Change the words and run the cell
# again. The tiny model knows only the words of its training.

# %%
number = 0
asked = pairs[number]
others = [pairs[row] for row in kept.tolist() if pairs[row].target.content_id != asked.target.content_id]
mine = [asked.query.rewrite, others[0].query.rewrite, "a picture."]
one = prompts.select(torch.tensor([number] * len(mine)))
with torch.no_grad():
    vectors = backbone(one, processor.completions(mine)).gen
found = retrieval_ranks(vectors, gallery, content[kept], content[number].repeat(len(mine)))
print(f"query: a picture and {asked.query.text!r}; wanted: {asked.target.content_id}")
for rewrite, vector, rank in zip(mine, vectors, found.tolist(), strict=True):
    nearest = pairs[int(kept[(gallery @ vector).argmax()])].target.content_id
    print(f"rank {rank:3}   first: {nearest:34} {rewrite!r}")

# %% [markdown]
# ## Exercise
#
# Write the rank by yourself. Two details decide whether a result can be trusted. A wrong target that scores
# *as high* as the right one counts as before it. Otherwise a model whose vectors are all equal would be
# perfect. And scores that differ by less than `TIE` are equal.


# %% tags=["exercise"]
def rank_of(query: torch.Tensor, gallery: torch.Tensor, right: int) -> int:
    """Return the rank of the right target, from 1; a tie counts against it.

    Args:
        query: (D,) float, normalised.
        gallery: (N, D) float, normalised.
        right: Row of the right target in the gallery.
    """
    raise NotImplementedError


def check(answer) -> None:
    """Compare with the function that every reported recall comes from."""
    generator = torch.Generator().manual_seed(0)
    gallery = torch.nn.functional.normalize(torch.randn(9, 4, generator=generator), dim=-1)
    gallery[5] = gallery[2]  # a tie
    queries = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator), dim=-1)
    for query in [*queries, gallery[2], torch.zeros(4)]:  # the last one ties with all
        for right in (0, 2, 5):
            wanted = retrieval_ranks(query[None], gallery, torch.arange(9), torch.tensor([right])).item()
            got = answer(query, gallery, right)
            assert got == wanted, f"the rank must be {wanted}, but is {got} (scores {gallery @ query})."


# %%
print(f"scores closer than {TIE:g} are equal")
print(verdict(check, rank_of))

# %% [markdown]
# The solution is in [solutions.py](solutions.py). Read on in [03 InfoNCE and SFT](03_info_nce_and_sft.py).
# The ablation of a whole run is in `summary.json` of its folder, and [metrics.md](../reference/metrics.md)
# explains it.
