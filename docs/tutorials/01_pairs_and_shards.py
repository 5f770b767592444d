# %% [markdown]
# # 01 Pairs and shards
#
# **You will learn** what a training sample is, how it lies on disk, and what keeps a test fair.
#
# **You need** `make train-cma`, which builds the corpus. No model is loaded here.
#
# **It takes** about 5 s of processor time.

# %%
import json
import tarfile
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lesson import corpus_of, read_pairs, trained_run, verdict
from PIL import Image, ImageDraw

from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.datamodules.texts import TextReader, read_texts
from rime_pl.losses.contrastive import same_content
from rime_pl.types import Item, Pair, content_hash

# %% [markdown]
# ## 1. What a corpus consists of
#
# A corpus is a folder. `corpus.json` says what is in it: splits, tasks, and how many samples each has.

# %%
corpus = corpus_of(trained_run())
about = read_corpus(corpus)
print(f"{about['name']}, {about['licence']}")
for split, facts in about["splits"].items():
    print(f"{split:12} {facts['samples']:6} samples in {len(facts['shards']):2} shards")

# %% [markdown]
# A **shard** is an ordinary tar file. The members of one sample have the same name with different endings,
# and they stand next to each other. Any WebDataset program can read it.

# %%
shard = sorted((corpus / "train").glob("*.tar"))[0]
with tarfile.open(shard) as tar:
    members = tar.getmembers()
    first = members[0].name.partition(".")[0]
    sample = [member for member in members if member.name.partition(".")[0] == first]
    for member in sample:
        print(f"{member.name:40} {member.size:6} bytes")
    text = next(member for member in sample if member.name.endswith(".json"))
    print(json.dumps(json.load(tar.extractfile(text)), indent=1)[:900])

# %% [markdown]
# ## 2. From a shard to a pair
#
# An index beside the shards says at which byte each sample begins. So `ShardReader` reads any sample by its
# number, and nobody has to read a tar from the start. It returns a `Pair`: a query and its target, each an
# `Item`.

# %%
reader = ShardReader(read_split(corpus, "train"))
pair = reader.read(0)
for side, item in (("query", pair.query), ("target", pair.target)):
    print(f"{side}: {item.kinds}\n  instruction {item.instruction!r}, text {item.text!r}")
    print(f"  rewrite {item.rewrite!r}\n  content id {item.content_id!r}")

# %% [markdown]
# Each **task** is a kind of question. A training batch holds pairs of one task only. Otherwise the model
# could tell a wrong target by its kind, because a name is never the answer to "find the picture".

# %%
tasks = sorted(about["splits"]["test"]["tasks"])
fig, axes = plt.subplots(len(tasks), 2, figsize=(8, 1.5 * len(tasks)))
for row, task in zip(axes, tasks, strict=True):
    shown = read_pairs(corpus, "test", task, most=1)[0]
    for ax, side, item in zip(row, ("query", "target"), (shown.query, shown.target), strict=True):
        ax.set(xlim=(0, 10), ylim=(0, 3))
        ax.axis("off")
        if item.media:
            ax.imshow(item.media[0], extent=(0, 2.6, 0.2, 2.8), aspect="auto")
        words = "\n".join(filter(None, (item.text, f"→ {item.rewrite}")))
        ax.text(3, 1.5, words, va="center", fontsize=8)
        ax.set_title(f"{task}: {side}", fontsize=9, loc="left")
plt.tight_layout()
plt.show()

# %% [markdown]
# The text behind the arrow is the reference rewrite. Query and target have one each, in different words.
# The rewrite of a query states the answer, but only as far as the query itself tells it.
#
# ## 3. Content ids
#
# In a batch, the targets of the other pairs are the wrong answers. But two pairs may ask for the same
# thing. Then the other target is right as well, and it would be a mistake to push it away. Its bytes do not
# tell, because the words or the pixels differ. So each item has a **content id**: equal ids mean equal
# content.

# %%
batch = [*read_pairs(corpus, "train", "name_to_picture", most=5)]
batch.append(replace(batch[1], key="again"))  # the second pair once more, as another wording would be
queries, targets = (
    torch.tensor([content_hash(item.content_id) for item in items])
    for items in ([one.query for one in batch], [one.target for one in batch])
)
print("false negatives, row = query, column = target:")
print(same_content(queries, targets).int())

# %% [markdown]
# `same_content` is what the loss uses: these places are left out. The same ids make sure that a gallery
# holds each content once, so that one right answer cannot be hidden by its double.
#
# ## 4. Is the test fair?
#
# The test asks for *combinations* that training never shows as a target, although training shows the parts.
# A model that only remembers its training cannot pass it. We can check that without opening a picture:
# `TextReader` skips them.

# %%
contents = {}
for split in ("train", "test"):
    named = read_split(corpus, split, ["name_to_picture"])
    contents[split] = Counter(one.target.content_id for one in read_texts(TextReader(named)))
both = contents["train"].keys() & contents["test"].keys()
print(f"train: {len(contents['train'])} contents, test: {len(contents['test'])}, in both: {len(both)}")
asked = next(iter(contents["test"]))
base, _, tone = asked.partition(" ")
near = sorted(one for one in contents["train"] if one.startswith(f"{base} "))
print(f"the test asks for {asked!r}; training has {near}")

# %% [markdown]
# ## 5. Your own shards
#
# `write_corpus` is what all builders call. Here it writes six pairs that we draw ourselves. [Tutorial
# 08](08_your_own_data.py) shows the shorter way from a table.


# %%
def drawn(colour: str) -> Image.Image:
    """Return a picture of a disc."""
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((12, 12, 52, 52), fill=colour)
    return picture


colours = ["red", "green", "blue", "orange", "purple", "black"]
made = [
    Pair(
        key=f"disc-{number}",
        dataset="colour_to_picture",
        gallery="pictures",
        query=Item(text=colour, content_id=colour, instruction="Find it.", rewrite=f"A disc, {colour}."),
        target=Item(media=(drawn(colour),), content_id=colour, rewrite=f"A {colour} disc."),
    )
    for number, colour in enumerate(colours)
]
own = Path(tempfile.mkdtemp(prefix="rime-tutorial-")) / "discs"
write_corpus(own, "discs", "CC0", {"train": made}, {"train": len(made)}, seed=0)
back = read_pairs(own, "train")
print([one.query.text for one in back] == colours, back[0].key)

# %% [markdown]
# ## Exercise
#
# Write the check of section 4 for any two lists of pairs. If it returns an empty list, no test target was a
# training target.


# %% tags=["exercise"]
def seen_before(train: list[Pair], test: list[Pair]) -> list[str]:
    """Return the content ids of test targets that are also targets in training: sorted, each once."""
    raise NotImplementedError


def check(answer) -> None:
    """Try it on pairs whose content ids are known."""

    def pairs_of(*contents: str) -> list[Pair]:
        # the query has an id of its own: only the target decides
        return [Pair(c, "t", "g", Item("?", (), f"query {c}"), Item(c, (), c)) for c in contents]

    cases = [
        (("cat", "dog"), ("dog", "owl", "dog"), ["dog"]),
        (("cat",), ("owl",), []),
        (("owl", "cat"), ("owl", "cat"), ["cat", "owl"]),
    ]
    for train, test, right in cases:
        got = answer(pairs_of(*train), pairs_of(*test))
        assert got == right, f"train {train}, test {test}: must be {right}, but is {got}."


# %%
print(verdict(check, seen_before))

# %% [markdown]
# The solution is in [solutions.py](solutions.py). Read on in [02 Two embeddings from one forward
# pass](02_two_embeddings.py), or in [the format of a corpus](../reference/data-format.md).
