"""Compare what each library makes of an export with what our code makes of the same weights.

Called by exporting.py. Each library goes its own way: its own loading, its own template, its own reading of
media. An export is given out only if all of them agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForImageTextToText, AutoProcessor

from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import keep_packed_weights, quantization_config
from rime_pl.export.probes import clip_times, messages, one_input, rewrite_for
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.types import Item

#: Least cosine between the vector of a library and ours.
LEAST = 0.999
#: Least mean over the probes of the share of a rewrite that a library writes as our code does. A word that is
#: nearly as likely as another can be chosen differently by other kernels, and what follows is different then;
#: another recipe (words that ask for it, sampling, the token that ends it) is different from the beginning.
LEAST_REWRITTEN = 0.5
#: Name of a mode -> of a probe -> its vector (D,), float32.
Vectors = dict[str, dict[str, Tensor]]


@dataclass
class Agreement:
    """How far the vectors of two ways agree."""

    attention: str  # kernel of attention of the way that is compared
    cosines: dict[str, dict[str, float]]  # mode -> probe -> cosine
    equal_tokens: dict[str, bool] = field(default_factory=dict)  # of each probe's prompt
    #: of each probe: share of the longer rewrite, from its beginning, that both write
    rewritten: dict[str, float] = field(default_factory=dict)

    def wrong(self) -> str:
        """Return what is too different in tokens or vectors, in words; "" if nothing is."""
        if unlike := self.wrong_tokens():
            return unlike
        for mode, cosines in self.cosines.items():
            for probe, cosine in cosines.items():
                if not cosine >= LEAST:  # also where it is no number
                    return (
                        f"the {mode} vector of the probe {probe!r} must have a cosine of at least {LEAST} "
                        f"with ours, but has a cosine of {cosine:.6f}"
                    )
        return ""

    def wrong_tokens(self) -> str:
        """Return for which probe the tokens are others, in words; "" if they are equal."""
        unlike = [probe for probe, equal in self.equal_tokens.items() if not equal]
        if not unlike:
            return ""
        return (
            "its template or its bounds on pixels give other tokens than our prompt for the probe "
            f"{unlike[0]!r}"
        )

    def wrong_rewrites(self) -> str:
        """Return what is too different in the rewrites, in words; "" if nothing is."""
        mean = fmean(self.rewritten.values()) if self.rewritten else 1.0
        if mean >= LEAST_REWRITTEN:
            return ""
        return (
            f"rewrites must begin as ours for a mean share of at least {LEAST_REWRITTEN}, but do for "
            f"{mean:.3f}: it generates in another way than our code"
        )

    def lowest(self) -> float:
        """Return the smallest cosine."""
        return min(cosine for cosines in self.cosines.values() for cosine in cosines.values())


def cosines(ours: Vectors, theirs: Vectors) -> dict[str, dict[str, float]]:
    """Return the cosine of each vector that both have."""
    return {
        mode: {
            probe: float(normalize(ours[mode][probe].double(), dim=0) @ normalize(vector.double(), dim=0))
            for probe, vector in found.items()
        }
        for mode, found in theirs.items()
    }


@torch.no_grad()
def our_vectors(backbone: Backbone, items: Mapping[str, Item]) -> Vectors:
    """Return the vectors of our forward: discriminative, and generative with the rewrite of the probes."""
    found: Vectors = {"discriminative": {}, "generative": {}}
    device = _device(backbone)
    completions = backbone.processor.completions([rewrite_for(backbone.processor)]).to(device)
    for name, item in items.items():
        output = backbone(backbone.processor.prompts([item]).to(device), completions)
        assert output.gen is not None, "completions were given"
        found["discriminative"][name] = output.disc[0].float().cpu()
        found["generative"][name] = output.gen[0].float().cpu()
    return found


def rewritten(ours: Mapping[str, str], theirs: Mapping[str, str]) -> dict[str, float]:
    """Return the share of the longer rewrite, from its beginning, that both write.

    >>> rewritten({"a": "a red ring", "b": ""}, {"a": "a red hat", "b": ""})
    {'a': 0.6, 'b': 1.0}
    """
    found = {}
    for name, text in theirs.items():
        equal = [one == other for one, other in zip_longest(ours[name], text)]
        found[name] = equal.index(False) / len(equal) if False in equal else 1.0
    return found


def our_rewrites(backbone: Backbone, items: Mapping[str, Item]) -> dict[str, str]:
    """Return the rewrite that our code writes of each probe."""
    device, processor = _device(backbone), backbone.processor
    written = {
        name: write_rewrites(backbone, processor.prompts([item]).to(device)).completions
        for name, item in items.items()
    }
    return {name: processor.decode(completions)[0] for name, completions in written.items()}


@torch.no_grad()
def in_transformers(folder: Path, backbone: Backbone, items: Mapping[str, Item], ours: Vectors) -> Agreement:
    """Compare transformers on the folder, with its own processor, template and generation."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder,
        dtype=getattr(torch, backbone.config.dtype),
        device_map={"": _device(backbone)},
        use_safetensors=True,
    ).eval()
    return _with_messages(model, folder, backbone, items, ours, rewrites=True)


@torch.no_grad()
def in_peft(
    folder: Path, base: str, backbone: Backbone, items: Mapping[str, Item], ours: Vectors
) -> Agreement:
    """Compare PEFT on an adapter folder and a base model, with the processor and template of the folder."""
    from peft import PeftModel

    whole: Any = AutoModelForImageTextToText.from_pretrained(
        base,
        dtype=getattr(torch, backbone.config.dtype),
        quantization_config=quantization_config(backbone.config),
        device_map={"": _device(backbone)},
        use_safetensors=True,
    )
    if len(backbone.processor.tokenizer) > whole.get_input_embeddings().num_embeddings:
        whole.resize_token_embeddings(len(backbone.processor.tokenizer), mean_resizing=False)
    keep_packed_weights(whole)
    model = PeftModel.from_pretrained(whole, str(folder)).eval().get_base_model()
    return _with_messages(model, folder, backbone, items, ours, rewrites=False)


def _with_messages(
    model: Any, folder: Path, backbone: Backbone, items: Mapping[str, Item], ours: Vectors, rewrites: bool
) -> Agreement:
    processor = AutoProcessor.from_pretrained(folder)
    found: Vectors = {"discriminative": {}, "generative": {}}
    tokens, written = {}, {}
    for name, item in items.items():
        for mode, rewrite in (("discriminative", None), ("generative", rewrite_for(backbone.processor))):
            inputs = _inputs(processor, item, rewrite).to(model.device)
            if rewrite is None:
                expected = backbone.processor.prompts([item]).input_ids[0]
                end = expected.tolist().index(backbone.processor.disc_id) + 1
                tokens[name] = inputs["input_ids"][0].tolist() == expected[:end].tolist()
            if name in ours[mode]:
                hidden = model.model(**inputs).last_hidden_state  # behind the last norm, unlike hidden_states
                found[mode][name] = hidden[0, -1].float().cpu()
        if rewrites and name in ours["generative"]:
            inputs = _inputs(processor, item, add_generation_prompt=True).to(model.device)
            ids = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
            written[name] = processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
    own = our_rewrites(backbone, {name: items[name] for name in written})
    kernel = str(model.config._attn_implementation)
    return Agreement(kernel, cosines(ours, found), tokens, rewritten(own, written))


def _inputs(
    processor: Any, item: Item, rewrite: str | None = None, add_generation_prompt: bool = False
) -> Any:
    times = clip_times(item)
    return processor.apply_chat_template(
        messages(item, rewrite),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=add_generation_prompt,
        processor_kwargs={"videos_kwargs": {"video_metadata": times}} if times else None,
    )


@torch.no_grad()
def in_sentence_transformers(
    folder: Path, backbone: Backbone, items: Mapping[str, Item], ours: Vectors
) -> Agreement:
    """Compare sentence-transformers on the folder, loaded plainly: all probes in one batch."""
    from sentence_transformers import SentenceTransformer

    settings = {"dtype": backbone.config.dtype}
    model = SentenceTransformer(str(folder), device=str(_device(backbone)), model_kwargs=settings)
    model.truncate_dim = None
    found: Vectors = {"discriminative": {}, "generative": {}}
    tokens = {}
    for prompt in dict.fromkeys(item.instruction for item in items.values()):
        asked = {name: item for name, item in items.items() if item.instruction == prompt}
        chosen = {name: one_input(item) for name, item in asked.items() if name in ours["discriminative"]}
        vectors = model.encode(list(chosen.values()), prompt=prompt, convert_to_tensor=True)
        found["discriminative"] |= dict(zip(chosen, vectors.float().cpu(), strict=True))
        for name, item in asked.items():
            rows = model.preprocess([one_input(item)], prompt=prompt)["input_ids"]
            expected = backbone.processor.prompts([item]).input_ids[0].tolist()
            tokens[name] = rows[0].tolist() == expected[: expected.index(backbone.processor.disc_id) + 1]
    for name, item in items.items():
        if name in ours["generative"] and not clip_times(item):  # messages carry no times of a clip
            vector = model.encode([messages(item, rewrite_for(backbone.processor))], convert_to_tensor=True)
            found["generative"][name] = vector[0].float().cpu()
    transformer: Any = model[0]
    kernel = str(transformer.model.config._attn_implementation)
    return Agreement(kernel, cosines(ours, found), tokens)


def _device(backbone: Backbone) -> torch.device:
    return next(backbone.parameters()).device


def as_json(agreement: Agreement) -> dict[str, Any]:
    """Return an agreement as plain data; what was not compared is left out."""
    return {name: value for name, value in asdict(agreement).items() if value}
