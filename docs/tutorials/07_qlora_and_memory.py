# %% [markdown]
# # 07 QLoRA, memory and `rime plan`
#
# **You will learn** what 4-bit weights look like, what trains beside them, and how to predict whether a run
# fits into a GPU.
#
# **You need** `make train-cma`. No GPU is needed, and no weights of a large model.
#
# **It takes** about 90 s of processor time.

# %%
from pathlib import Path

import bitsandbytes.functional as bnb
import matplotlib.pyplot as plt
import torch
from lesson import COLOURS, ROOT, trained_run, verdict
from safetensors.torch import load_file

from rime_pl.backbone.mllm import load_backbone
from rime_pl.backbone.quantization import describe, linear_4bit_modules
from rime_pl.commands.settings import StageWords
from rime_pl.preflight.plan.planning import GIB, make_plan

# %% [markdown]
# ## 1. Sixteen values
#
# **NF4** stores a weight in 4 bits, so there are 16 values. Weights are about normally distributed, so the
# values lie close together near zero. Each block of 64 weights has its own scale: the largest absolute
# weight in it. We quantise one layer of the tiny base model and read it back.

# %%
backbone = load_backbone(trained_run().adapter)
base = Path(backbone.config.name_or_path)
weights = {name: one for file in base.glob("*.safetensors") for name, one in load_file(file).items()}
name = next(
    key for key in sorted(weights) if key.endswith("layers.0.mlp.down_proj.weight") and "visual" not in key
)
weight = weights[name].float()
packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
back = bnb.dequantize_4bit(packed, state)
error = (back - weight).norm() / weight.norm()
print(f"{name}: {tuple(weight.shape)}")
print(f"float32 {weight.numel() * 4:,} bytes, packed {packed.numel():,}, scales {state.absmax.numel() * 4:,}")
print(f"relative error {error:.3f}")

# %%
scaled = (weight.flatten().view(-1, 64) / state.absmax.view(-1, 1)).flatten()  # what is rounded
levels = state.code
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4))
left.hist(scaled, bins=120, color="#cccccc")
for level in levels.tolist():
    left.axvline(level, color=COLOURS["disc"], lw=0.8)
left.set(
    xlabel="weight / scale of its block",
    ylabel="weights",
    title=f"a layer, and the {len(levels)} values of NF4",
)
right.scatter(weight.flatten()[:4000], back.flatten()[:4000], s=3, color=COLOURS["gen"])
right.set(xlabel="weight", ylabel="weight read back", title="rounding, block by block")
plt.tight_layout()
plt.show()

# %% [markdown]
# ## 2. What trains
#
# The packed weights are frozen. Beside each of them, LoRA learns a correction B A of low rank, in float32.
# Also the two rows of the mode tokens train. Everything else stays as it was.

# %%
print(describe(backbone))
layer_name, layer = next(iter(linear_4bit_modules(backbone).items()))
rank = backbone.config.lora_r
print(
    f"\n{layer_name}\n{layer.in_features} x {layer.out_features} weights are frozen, "
    f"{rank} x (in + out) = {rank * (layer.in_features + layer.out_features):,} train"
)

# %% [markdown]
# The tiny model trains a large share, because its layers are narrow. The share of rank r in a square layer
# of width n is 2 r / n.

# %%
for width in (layer.in_features, 1536, 4096):
    print(f"width {width:5}: rank 16 trains {2 * 16 / width:.1%} of a square layer")

# %% [markdown]
# ## 3. Where the memory of a step goes
#
# `rime plan` predicts the peak before anything is downloaded. It runs the stage's own training step on a
# model whose tensors have a shape but no data, and counts. Here are three plans of stage 2 for Qwen2-VL-2B:
# the recipe, the recipe with twice the batch, and a base model in bfloat16 in the place of 4 bits.


# %%
def plan(*words: str) -> dict:
    """Return the plan of configs/cma.yaml, changed by some words of the command line."""
    recipe, *overlays = [
        ROOT / "configs/cma.yaml",
        *(ROOT / word for word in words if word.endswith(".yaml")),
    ]
    given = [word for word in words if not word.endswith(".yaml")]
    files = [recipe, *overlays]
    options = [part for file in files for part in ("--config", str(file))]
    settings = StageWords(tuple(files), "cma", (*options, *given), "rime plan").read()
    return make_plan(settings, memory=None, steps=1000, assumed=(256, 128))


plans = {
    "recipe 2b\n(4 bits, 32 pairs)": plan(),
    "64 pairs": plan("--data.batch_size", "64"),
    "bfloat16\nbase model": plan("configs/overlays/bf16.yaml"),
}
for title, one in plans.items():
    (peak,) = [stage["peak_bytes"] for stage in one["stages"] if stage["stage"] == one["stage"]]
    shown = title.replace("\n", " ")
    print(
        f"{shown:34} peak {peak / GIB:5.1f} GiB, {one['trained_parameters']:,} of {one['parameters']:,} train"
    )

# %%
parts = {
    title: next(stage["parts"] for stage in one["stages"] if stage["stage"] == one["stage"])
    for title, one in plans.items()
}
kinds = sorted(
    {kind for one in parts.values() for kind in one}, key=lambda k: -parts[next(iter(parts))].get(k, 0)
)
fig, ax = plt.subplots(figsize=(9, 4))
left_of = dict.fromkeys(parts, 0.0)
for number, kind in enumerate(kinds):
    sizes = [one.get(kind, 0) / GIB for one in parts.values()]
    if max(sizes) > 0.05:
        ax.barh(list(parts), sizes, left=list(left_of.values()), label=kind, color=plt.cm.tab20(number))
    left_of = {title: left_of[title] + size for title, size in zip(parts, sizes, strict=True)}
for limit in (12, 24):
    ax.axvline(limit, color="black", ls="--", lw=1)
    ax.text(limit, -0.55, f"{limit} GiB", va="bottom", ha="center")
ax.set(xlabel="GiB at the peak of a step (predicted)")
ax.invert_yaxis()
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
plt.tight_layout()
plt.show()

# %% [markdown]
# The weights are a matter of the base model, and activations one of the batch. On the command line:
#
# ```
# rime plan --config configs/cma.yaml --memory 12 --data.batch_size 64
# ```
#
# also says which single setting would help if it does not fit.
#
# ## Exercise
#
# How many bytes does a matrix take in NF4, without compressed scales? Two weights share a byte, and each
# block of 64 weights has a scale of 4 bytes. The last block may not be full, and needs its scale all the
# same.


# %% tags=["exercise"]
def nf4_bytes(rows: int, columns: int) -> int:
    """Return the bytes of the packed weights and their scales; the number of weights is even."""
    raise NotImplementedError


def check(answer) -> None:
    """Compare with what bitsandbytes allocates."""
    for rows, columns in ((64, 64), (160, 416), (3, 50)):
        packed, state = bnb.quantize_4bit(
            torch.randn(rows, columns), quant_type="nf4", blocksize=64, compress_statistics=False
        )
        right = packed.numel() * packed.element_size() + state.absmax.numel() * state.absmax.element_size()
        got = answer(rows, columns)
        assert got == right, f"{rows} x {columns} weights take {right} bytes, but the answer is {got}."


# %%
print(verdict(check, nf4_bytes))

# %% [markdown]
# The solution is in [solutions.py](solutions.py). Read on in [08 Your own data](08_your_own_data.py), or in
# [Plan a run](../how-to/plan-a-run.md).
