# %% [markdown]
# # 08 Your own data: from a folder to a search page
#
# **You will learn** the whole way with pictures of your own: a table, a check, a short training, an index,
# a search and a search page. Each step is one command, and this page runs the real ones.
#
# **You need** `make train-cma`, for its base model.
#
# **It takes** a few minutes of processor time, most of it for two short trainings.

# %%
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

import matplotlib.pyplot as plt
from lesson import trained_run, verdict
from PIL import Image, ImageDraw

from rime_pl.__main__ import main
from rime_pl.backbone.adapters import read_contract
from rime_pl.backbone.base_path import find_base
from rime_pl.run_folder import RunFolder

# %% [markdown]
# ## 1. A folder with pictures, and a table
#
# Put your pictures here. We draw some: 6 shapes in 8 colours, at a random place. The table has two columns.
# Each caption is also the reference rewrite of its picture.

# %%
adapter = trained_run().adapter
base = find_base(adapter, read_contract(adapter))
os.chdir(tempfile.mkdtemp(prefix="rime-tutorial-"))  # a workshop: nothing of yours is touched
folder = Path("shapes")
folder.mkdir()

COLOURS = ["red", "green", "blue", "yellow", "orange", "purple", "brown", "black"]
SHAPES = {
    "circle": 60,
    "square": 4,
    "triangle": 3,
    "pentagon": 5,
    "hexagon": 6,
    "ring": 0,
}  # number of corners


def drawn(colour: str, shape: str, rng: random.Random) -> Image.Image:
    """Return a picture of one shape."""
    picture = Image.new("RGB", (96, 96), "white")
    pen, size = ImageDraw.Draw(picture), rng.randint(20, 30)
    x, y = rng.randint(36, 60), rng.randint(36, 60)
    if shape == "ring":
        pen.ellipse((x - size, y - size, x + size, y + size), outline=colour, width=9)
    else:
        pen.regular_polygon((x, y, size), SHAPES[shape], fill=colour)
    return picture


rng = random.Random(0)
with (folder / "captions.csv").open("w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["image", "caption"])
    for colour in COLOURS:
        for shape in SHAPES:
            for number in range(2):
                name = f"{colour}_{shape}_{number}.png"
                drawn(colour, shape, rng).save(folder / name)
                table.writerow([name, f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}."])
print(*(folder / "captions.csv").read_text().splitlines()[:5], sep="\n")

# %%
fig, axes = plt.subplots(2, 8, figsize=(10, 2.8))
for ax, name in zip(axes.flat, rng.sample(sorted(folder.glob("*_0.png")), 16), strict=True):
    ax.imshow(Image.open(name))
    ax.set_title(name.stem.removesuffix("_0").replace("_", " "), fontsize=8)
    ax.axis("off")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 2. Check it
#
# The check lists every fault with its line, before any training. `main` is what the command `rime` calls.


# %%
def rime(*words: str) -> None:
    """Run a command, as a terminal would."""
    print("$ rime", *words)
    code = main(list(words))
    assert code == 0, f"the exit code must be 0, but is {code}"


rime("shards", "check", "--table", "shapes/captions.csv", "--batch_size", "16")

# %% [markdown]
# ## 3. Train, briefly
#
# One command builds the shards and trains both stages. We keep them short, and take the base model that is
# there already. A real run leaves out the settings behind `--base`.

# %%
short = [
    *("--sft.data.steps_per_epoch", "30", "--sft.trainer.max_epochs", "1", "--sft.data.batch_size", "16"),
    *("--data.steps_per_epoch", "12", "--trainer.max_epochs", "1", "--data.batch_size", "16"),
]
words = ["run", "cma", "--corpus", "shapes", "--base", base, *short]
print("$ rime run cma --corpus shapes --base", Path(base).name, *short)
done = subprocess.run([sys.executable, "-m", "rime_pl", *words], text=True, capture_output=True)
assert done.returncode == 0, done.stderr[-2000:]
run = RunFolder("runs/shapes-tiny-seed0/cma")
for pair, value in run.summary["after"]["recall@1"].items():
    print(f"{pair}: recall@1 {value:.2f}")
print(f"{run.manifest['steps']} steps of stage 2, {run.summary['seconds']['fit']:.0f} s")

# %% [markdown]
# The test asks for few pictures, and the training was short: do not read more into these numbers than that
# it works.
#
# ## 4. Index and search
#
# An index embeds a folder once, in both modes. A search then compares one query with all of it.

# %%
rime("index", "shapes", "--output", "shapes.index", "--run", str(run))

# %%
rime(
    "search",
    "a red ring",
    "--index",
    "shapes.index",
    "--run",
    str(run),
    "--top_k",
    "6",
    "--output",
    "search.png",
)
sheet = Image.open("search.png")
fig, ax = plt.subplots(figsize=(9, 9 * sheet.height / sheet.width))
ax.imshow(sheet)
ax.axis("off")
plt.show()

# %% [markdown]
# ## 5. A search page
#
# `rime demo` serves a page for the browser. We start it, ask as the page would, and stop it with Ctrl-C.

# %%
words = ["demo", "--index", "shapes.index", "--run", str(run), "--port", "0", "--top_k", "3"]
command = [sys.executable, "-m", "rime_pl", *words]
server = subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
address = None
for line in server.stdout:
    print(re.sub(r":\d+/", ":PORT/", line), end="")
    if found := re.search(r"http://\S+/", line):
        address = found.group()
        break
assert address, "the page must say where it is"
try:
    page = urllib.request.urlopen(address, timeout=60).read().decode()
    print(f"the page has {len(page):,} characters")
    question = urllib.parse.urlencode({"text": "a blue square"}).encode()
    with urllib.request.urlopen(f"{address}search", question, timeout=60) as reply:
        answer = json.load(reply)
    print(f"rewrite: {answer['rewrite']!r}")
    for column in answer["columns"]:
        print(f"{column['pair']:10}", *(result["name"] for result in column["results"]))
finally:
    server.send_signal(signal.SIGINT)
    code = server.wait(60)
print(f"{server.stdout.read().strip()} Exit code {code}.")

# %% [markdown]
# In a terminal it is `rime demo --index shapes.index`, and the browser shows all four mode pairs.
#
# ## Exercise
#
# Your folder has no table yet, but its files have good names, such as `dark-blue_ring_1.png`. Write the
# rows of the table.


# %% tags=["exercise"]
def rows_of(names: list[str]) -> list[dict[str, str]]:
    """Return the rows of a table with the columns ``image`` and ``caption``, sorted by file name.

    A name is ``<colour>_<shape>_<number>.png``. A dash in it stands for a space. The caption is such as
    "a dark blue ring.", with "an" before a vowel. Files with another ending are left out.
    """
    raise NotImplementedError


def check(answer) -> None:
    """Try some names."""
    got = answer(["red_ring_1.png", "dark-blue_ring_0.png", "captions.csv", "orange_square_0.png"])
    right = [
        {"image": "dark-blue_ring_0.png", "caption": "a dark blue ring."},
        {"image": "orange_square_0.png", "caption": "an orange square."},
        {"image": "red_ring_1.png", "caption": "a red ring."},
    ]
    assert got == right, f"the rows must be {right}, but are {got}."


# %%
print(verdict(check, rows_of))

# %% [markdown]
# The solution is in [solutions.py](solutions.py). This is the last tutorial. Go on with [your own
# data](../how-to/your-own-data.md), [search your own collection](../how-to/search-your-own-collection.md)
# or [the search page](../how-to/search-page.md).
