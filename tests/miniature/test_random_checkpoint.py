"""The random checkpoint has the shape of the released one, and behaves as a Qwen2-VL."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2VLForConditionalGeneration

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import linear_4bit_modules
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.generation.rollouts import PromptPart, random_numbers, sample_rollouts, score_rollouts
from rime_pl.miniature.random_checkpoint import SHAPES, model_config, save_checkpoint, synthetic_pairs
from rime_pl.miniature.tiny import train_tokenizer
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig


def test_2b_shape_is_that_of_the_released_checkpoint() -> None:
    """Parameters of a Qwen2-VL-2B: 1.54 billion in the decoder (tied), 0.67 billion in the vision tower."""
    with torch.device("meta"):
        model = Qwen2VLForConditionalGeneration(model_config(SHAPES["2b"], train_tokenizer(["a"], 300)))
    vision = sum(p.numel() for p in model.model.visual.parameters())
    decoder = sum(p.numel() for p in model.model.language_model.parameters())
    assert decoder == 1_543_714_304 and round(vision / 1e6) == 665


@torch.no_grad()
def test_qwen2_vl_rows_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    """The other family of backbones: one by one equals the batch, and it writes rewrites."""
    shape = SHAPES["micro"]
    save_checkpoint(tmp_path, shape, torch.device("cpu"))
    config = BackboneConfig(
        str(tmp_path), dtype="float32", prompt=PromptConfig(system_prompt="You are a helpful assistant.")
    )
    processor = RimeProcessor.from_pretrained(str(tmp_path), config.prompt)
    backbone = Backbone(config, processor).eval()
    assert len(linear_4bit_modules(backbone)) == 7 * shape.num_layers
    items = [item for pair in synthetic_pairs(2, shape) for item in (pair.query, pair.target) if item]
    keys = [str(n) for n in range(len(items))]
    rows = processor.rows(items, keys)
    together = backbone(rows.prompts, rows.completions)
    features = backbone.encode_media(rows.prompts)
    shared = backbone(rows.prompts, rows.completions, features=features)
    torch.testing.assert_close(shared.gen, together.gen, atol=1e-4, rtol=0)
    for number, item in enumerate(items):
        row = processor.rows([item], [keys[number]])
        alone = backbone(row.prompts, row.completions)
        torch.testing.assert_close(alone.disc[0], together.disc[number], atol=1e-4, rtol=0)
        torch.testing.assert_close(alone.gen[0], together.gen[number], atol=1e-4, rtol=0)
    rewrites = write_rewrites(backbone, rows.prompts, max_new_tokens=4)
    for number, item in enumerate(items):
        alone_ids = write_rewrites(backbone, processor.prompts([item]), max_new_tokens=4).completions
        assert (
            alone_ids.ids[0].tolist() == rewrites.completions.ids[number][: alone_ids.ids.shape[1]].tolist()
        )
    numbers = random_numbers(0, 0, keys, 2, 5)
    (drawn,) = sample_rollouts(backbone, [PromptPart(rows.prompts, numbers, features)])
    scored = score_rollouts(backbone, rows.prompts, drawn, features=features)
    repeated = rows.prompts.select(torch.arange(len(items)).repeat_interleave(2))
    torch.testing.assert_close(
        scored.gen, backbone(repeated, drawn.completions).gen, atol=1e-4, rtol=0, msg="a shared prompt"
    )
