# %% [markdown]
# # 00 RIME in ten minutes
#
# **You will learn** what a rewrite is, where the two embeddings are read, and why one forward pass gives
# both.
#
# **You need** PyTorch, and a trained model: run `make train-cma` once.
#
# **It takes** about 10 s of processor time.
#
# A word that you do not know is in the [glossary](../glossary.md).

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lesson import COLOURS, corpus_of, read_pairs, trained_run, verdict

import rime_pl
from rime_pl.backbone.pooling import first_position
from rime_pl.datamodules.builders.scenes import builder as scenes
from rime_pl.types import MODE_PAIRS, Mode

# %% [markdown]
# ## 1. A question that must be worked out
#
# A search engine turns a query and each target into a vector, and compares the vectors. That is easy when
# query and target look alike. Here they do not. We draw a few samples of the corpus `scenes`, and look at
# one whose query says how a picture has to be changed.

# %%
folder = Path(tempfile.mkdtemp(prefix="rime-tutorial-"))
few = {"train_per_task": 4, "val_per_task": 2, "test_per_task": 6, "captions": 2}
scenes.build(folder / "scenes", val_contents=12, test_contents=24, **few)
example = next(
    pair for pair in read_pairs(folder / "scenes", "test", "composed") if "swap" in pair.query.text
)

fig, axes = plt.subplots(1, 2, figsize=(7, 3))
axes[0].imshow(example.query.media[0])
axes[0].set_title(f"query: “{example.query.text}”")
axes[1].imshow(example.target.media[0])
axes[1].set_title("target: to be found")
for ax in axes:
    ax.set(xticks=[], yticks=[])
fig.suptitle(f"rewrite of the query: “{example.query.rewrite}”", y=0.04, color=COLOURS["gen"])
plt.show()

# %% [markdown]
# Neither the picture nor the words of the query show the answer. The **rewrite** does. It is a short text
# that states what the query asks for, in words that could also describe the target. RIME trains a model to
# write such a text first, and to embed the item after it.
#
# ## 2. The sequence of tokens
#
# Now we take the model that `make train-cma` trained. It knows emoji, not scenes. Its task `composed` is of
# the same kind: a picture, and a change.

# %%
run = trained_run()
model = rime_pl.load(run.path)
processor, tokenizer = model.backbone.processor, model.backbone.processor.tokenizer
pairs = read_pairs(corpus_of(run), "test", "composed", most=24)
pair = pairs[0]

prompts = processor.prompts([pair.query])  # up to where the model starts to write
completions = processor.completions([pair.query.rewrite])  # the rewrite, <gen_emb>, end of turn
sequence = torch.cat([prompts.input_ids[0], completions.ids[0]]).tolist()
print(f"{len(prompts.input_ids[0])} tokens of the prompt, {len(completions.ids[0])} of the completion")

# %% [markdown]
# The picture below shows every token. Grey ones are the frame of a chat, green ones are the picture. The
# item ends with `<disc_emb>`: the **discriminative embedding** d is the hidden state there. Then the model
# writes the rewrite and closes it with `<gen_emb>`: the **generative embedding** g is the hidden state
# there.
#
# Beside it is the causal mask. A dark square means that the token of this row sees the token of this
# column. The row of `<disc_emb>` ends before the rewrite begins, so the rewrite cannot change d.


# %%
def colour_of(token: int, place: int) -> str:
    """Return the colour of a token in the picture."""
    if token in (processor.disc_id, processor.gen_id):
        return COLOURS["disc" if token == processor.disc_id else "gen"]
    if token == processor.image_id:
        return "#b7e1cd"
    if token in processor.special_ids:
        return "#dddddd"
    return "#fbd9c3" if place >= len(prompts.input_ids[0]) else "#ffffff"


disc_at, gen_at = sequence.index(processor.disc_id), sequence.index(processor.gen_id)
a_row, y, places = 7, 0.0, []  # tokens in a line; where each one is drawn
for start in range(0, len(sequence), a_row):
    line = range(start, min(start + a_row, len(sequence)))
    places += [(place - start, y) for place in line]
    y -= 1.7 if disc_at in line or gen_at in line else 1.0  # room for an arrow

fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5.5), width_ratios=(1.5, 1))
for place, (token, at) in enumerate(zip(sequence, places, strict=True)):
    shown = tokenizer.decode([token]).strip(" ").replace("\n", "↵").replace("<|image_pad|>", "picture")
    box = {"boxstyle": "round,pad=0.3", "fc": colour_of(token, place), "ec": "#666666", "lw": 0.5}
    ink = "white" if place in (disc_at, gen_at) else "black"
    words = shown.replace("<|", "").replace("|>", "")
    left.text(*at, words, ha="center", va="center", fontsize=8, bbox=box, color=ink)
for place, name, mode in ((disc_at, "d is read here", "disc"), (gen_at, "g is read here", "gen")):
    x, y_of = places[place]
    arrow = {"arrowstyle": "->", "color": COLOURS[mode], "lw": 2}
    label = {"ha": "center", "va": "top", "color": COLOURS[mode], "arrowprops": arrow}
    left.annotate(name, (x, y_of - 0.25), (x, y_of - 0.75), **label)
left.set(xlim=(-0.7, a_row - 0.3), ylim=(y - 0.3, 0.7), title="the tokens, line by line")
left.axis("off")
right.imshow(torch.ones(len(sequence), len(sequence)).tril(), cmap="Greys", vmin=0, vmax=1.6)
for place, mode, name in ((disc_at, "disc", "<disc_emb>"), (gen_at, "gen", "<gen_emb>")):
    right.barh(place, place + 1, left=-0.5, height=1, color=COLOURS[mode])
    right.text(place + 1, place, f" {name}", va="center", color=COLOURS[mode])
right.set(title="the causal mask", xlabel="token that is seen", ylabel="token that sees")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 3. Two embeddings from one forward pass
#
# `model.backbone` is the network. Given prompts and completions it returns both embeddings. We run it with
# three completions of the same prompt, and compare.

# %%
with torch.no_grad():
    own = model.backbone(prompts, completions)
    other = model.backbone(prompts, processor.completions([pairs[-1].query.rewrite]))
    none = model.backbone(prompts, processor.completions([""]))
print(f"an embedding has {own.disc.shape[1]} numbers and length {own.disc.norm():.3f}")
for name, out in (("another query's rewrite", other), ("no rewrite", none)):
    same_d, same_g = float(own.disc[0] @ out.disc[0]), float(own.gen[0] @ out.gen[0])
    print(f"own rewrite against {name}: cosine of d {same_d:.3f}, of g {same_g:.3f}")

# %% [markdown]
# d stays the same, as the mask says, and g moves. [Tutorial 02](02_two_embeddings.py) asks whether it moves
# to the right place.
#
# ## 4. The model writes by itself
#
# Nobody gives the model a rewrite when it is used. It writes one, token by token.

# %%
for shown in pairs[:4]:
    print(f"{shown.query.text:40}  wanted: {shown.target.content_id:32}", end="  ")
    print(f"written: {model.rewrite(shown.query)}")

# %% [markdown]
# ## 5. Four ways to search
#
# Query and target each have two embeddings, so there are four mode pairs. After stage 2, all of them work,
# because both kinds of vectors lie in one space. That lets you choose: d costs one pass, g costs the
# writing of the rewrite.

# %%
gallery = {one.target.content_id: one.target for one in pairs}  # each target once
long: dict[str, Mode] = {"disc": "discriminative", "gen": "generative"}
queries = {short: model.encode([one.query for one in pairs], mode) for short, mode in long.items()}
targets = {short: model.encode(list(gallery.values()), mode) for short, mode in long.items()}
wanted = torch.tensor([list(gallery).index(one.target.content_id) for one in pairs])
for name in MODE_PAIRS:
    asked, found = name.split("-")
    first = (queries[asked] @ targets[found].T).argmax(dim=1)  # the most similar target of each query
    share = float((first == wanted).float().mean())
    print(f"{name}: {share:.2f} of {len(pairs)} queries find their target first, among {len(gallery)}")

# %% [markdown]
# These are few queries and a small gallery. The table of `make train-cma` has the whole test split.
#
# ## Exercise
#
# Write the function that says where g is read. A batch holds completions of unlike length, so there is
# padding on the right. A token in the padding must not count.


# %% tags=["exercise"]
def gen_column(ids: torch.Tensor, mask: torch.Tensor, gen_id: int) -> torch.Tensor:
    """Return the column of the first <gen_emb> of each row, (R,) int64; -1 where there is none.

    Args:
        ids: (R, C) int64, tokens of completions.
        mask: (R, C) int64, 0 at padding.
        gen_id: The token <gen_emb>.
    """
    raise NotImplementedError


def check(answer) -> None:
    """Compare with the function that the model uses."""
    ids = torch.tensor([[4, 9, 5, 0], [9, 4, 9, 5], [4, 4, 5, 9], [4, 4, 4, 4]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    at, found = first_position(ids, mask, 9)
    right = torch.where(found, at, -1).tolist()
    got = answer(ids, mask, 9).tolist()
    assert got == right, f"the columns must be {right}, but are {got}."


# %%
print(verdict(check, gen_column))

# %% [markdown]
# The solution is in [solutions.py](solutions.py). Read on in [01 Pairs and shards](01_pairs_and_shards.py),
# or in the code that builds the sequence: [`rime_pl/prompts.py`](../../rime_pl/prompts.py) and
# [`rime_pl/backbone/mllm.py`](../../rime_pl/backbone/mllm.py).
