"""Time of `encode` over 500 mixed items from files, against sentence-transformers in the same run.

`make bench` runs it, in an environment that has the peer. A third of the items are texts, a third JPEG
pictures with sides of 48 to 192 pixels, and a third have both. The peer has the same weights, with LoRA
merged and saved as an ordinary checkpoint, a chat template that ends at <disc_emb>, and last-token pooling.
The rounds are interleaved and the results are medians of their ratios, the peer's time over ours:

- one core: CPU time, with one thread each, pinned to one core.
- two cores: wall time, with two threads of torch each; ours opens pictures in one more thread.

The last line is JSON; it holds the lower of the
ratios of 4-bit and float32 weights.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText

from benchmarks.miniature import PICTURE_SIZE, WORDS, make_backbone, make_proportioned
from rime_pl.backbone.lora import merged, trained_table
from rime_pl.backbone.mllm import Backbone
from rime_pl.inference.retriever import Retriever
from rime_pl.inference.sources import Source
from rime_pl.types import Item

INSTRUCTION = "Find it."
Call = Callable[[], Tensor]
KINDS = ("texts", "pictures", "both")
#: The layout of prompts.py up to the token at which the embedding is read.
TEMPLATE = """
{%- for message in messages %}
{{- '<|im_start|>user\\n' }}
{%- for part in message.content if part.type == 'image' %}
{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- endfor %}
{{- 'Find it.' }}
{%- for part in message.content if part.type == 'text' %}{{ '\\n' + part.text }}{% endfor %}
{{- '\\n<disc_emb>' }}
{%- endfor %}"""


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=500, help="Number of items (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="Measured rounds (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="Kinds of items")
    args = parser.parse_args(words)
    ratios: dict[str, list[float]] = {"sentence_transformers_over_ours": [], "two_cores": []}
    with tempfile.TemporaryDirectory(prefix="rime-encode-") as name:
        base = make_proportioned(Path(name) / "base")
        items = mixed_items(Path(name), args.items, args.kinds)
        for weights in ("nf4", "float32"):
            backbone = trained(make_backbone(base, load_in_4bit=weights == "nf4")).eval()
            calls = both(backbone, base, Path(name) / weights, items)
            refuse_other_vectors(calls)
            for cores, key in enumerate(ratios, 1):
                seconds = on_cores(cores, calls, args.rounds)
                found = [peer / ours for ours, peer in zip(seconds["ours"], seconds["peer"], strict=True)]
                ratios[key].append(statistics.median(found))
                rates = [f"{who} {args.items / statistics.median(took):.0f}" for who, took in seconds.items()]
                print(
                    f"{weights}, cores: {cores}: items a second: {', '.join(rates)}; ratio "
                    f"{ratios[key][-1]:.2f} ({min(found):.2f} to {max(found):.2f})",
                    flush=True,
                )
    print(json.dumps({key: round(min(values), 2) for key, values in ratios.items()}))


def both(backbone: Backbone, base: Path, folder: Path, items: list[Source]) -> dict[str, Call]:
    """Return the two calls that are compared."""
    retriever, model, given = Retriever(backbone), peer(backbone, base, folder), as_the_peer_takes(items)
    return {
        "ours": lambda: retriever.encode(items, instruction=INSTRUCTION),
        "peer": lambda: model.encode(given, normalize_embeddings=True, convert_to_tensor=True),
    }


def mixed_items(folder: Path, count: int, kinds: Sequence[str]) -> list[Source]:
    """Return texts of 3 to 80 words, paths of JPEG files and items of both, one after the other."""
    rng = random.Random(0)
    items: list[Source] = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        text = " ".join(rng.choice(WORDS) for _ in range(3 + int(77 * rng.random() ** 3)))
        if kind == "texts":
            items.append(text)
            continue
        path = folder / f"{number:04d}.jpg"
        size = (rng.randint(48, PICTURE_SIZE), rng.randint(48, PICTURE_SIZE))
        noise = Image.frombytes("RGB", (12, 12), rng.randbytes(3 * 12 * 12))
        noise.resize(size, Image.Resampling.BICUBIC).save(path)
        images: Any = (path,)
        items.append(path if kind == "pictures" else Item(text, images))
    return items


def as_the_peer_takes(items: Sequence[Source]) -> list[Any]:
    """Return the items as the peer takes them."""
    return [
        str(item) if not isinstance(item, Item) else {"text": item.text, "image": str(item.media[0])}
        for item in items
    ]


def trained(backbone: Backbone) -> Backbone:
    """Give LoRA values as after a training; it starts with a change of zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return backbone


def peer(backbone: Backbone, base: Path, folder: Path) -> Any:
    """Return sentence-transformers with an ordinary checkpoint of the same weights, LoRA merged into them."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    state = model.state_dict()
    with merged(backbone):
        for name, module in backbone.language_model.named_modules():
            if isinstance(module, LoraLayer):
                state[f"{name}.weight"].copy_(module.whole_weight)  # type: ignore[attr-defined]  # ours
            elif isinstance(module, TrainableTokensLayer):
                table = trained_table(module)
                weight = state[f"{name.removesuffix('.token_adapter')}.weight"]
                weight.copy_(table.frozen)
                weight[list(table.ids)] = table.trained.detach()
    model.save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    read = Transformer(str(folder))
    pooling = Pooling(read.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(modules=[read, pooling], device="cpu")


def refuse_other_vectors(calls: dict[str, Call]) -> None:
    """End with an error if the vectors are not the same; the comparison would be void."""
    cosines = (calls["ours"]() * calls["peer"]()).sum(-1)
    if not bool((cosines > 0.999).all()):
        raise SystemExit(
            f"The vectors must be the same, but the lowest cosine is {float(cosines.min()):.4f}."
        )


def on_cores(cores: int, calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each call in each round: of CPU time on one core, of wall time on several."""
    clock = time.process_time if cores == 1 else time.perf_counter
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:cores])
    torch.set_num_threads(cores)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 else -1]:
            start = clock()
            calls[name]()
            seconds[name].append(clock() - start)
    os.sched_setaffinity(0, allowed)
    return seconds


if __name__ == "__main__":
    main(sys.argv[1:])
