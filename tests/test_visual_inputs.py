"""Pictures, pages and clips reach each family of Qwen-VL as its own processor would send them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import DataError, RimeError
from rime_pl.generation.decoding import embed_completions, prefill
from rime_pl.generation.rollouts import PromptPart, random_numbers, sample_rollouts, score_rollouts
from rime_pl.processing import RimeProcessor
from rime_pl.types import Clip, Item, Page, Prompts, Rollouts
from tests.families import FAMILIES, FPS, clip, noise, save_family
from tests.micro import PROMPT, build_backbone, micro_config, plain_logits, randomise_adapter

CLOSE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_family(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def backbones(bases: dict[str, Path]) -> dict[str, Backbone]:
    """With an adapter that does something, so that positions and rewrites matter."""
    found = {}
    for family, base in bases.items():
        found[family] = build_backbone(micro_config(base, load_in_4bit=False)).eval()
        randomise_adapter(found[family].peft, scale=0.3)
    return found


def expected(processor: Any, media: list[Any], text: str) -> dict[str, Tensor]:
    """Inputs by the processor of transformers, with bare placeholders for clips."""
    images = [
        medium.image if isinstance(medium, Page) else medium
        for medium in media
        if not isinstance(medium, Clip)
    ]
    clips = [medium for medium in media if isinstance(medium, Clip)]
    qwen3 = type(processor).__name__.startswith("Qwen3VL")
    video = "<|video_pad|>" if qwen3 else "<|vision_start|><|video_pad|><|vision_end|>"
    slots = [
        video if isinstance(medium, Clip) else "<|vision_start|><|image_pad|><|vision_end|>"
        for medium in media
    ]
    more: dict[str, Any] = {}
    if clips:
        frames = [list(one.frames) + ([one.frames[0]] if len(one.frames) == 1 else []) for one in clips]
        more["videos"] = frames
        more["videos_kwargs"] = {
            "video_metadata": [
                {
                    "total_num_frames": len(one.frames),
                    "fps": FPS,
                    "frames_indices": [*range(len(one.frames)), *([0] if len(one.frames) == 1 else [])],
                }
                for one in clips
            ],
            "do_sample_frames": False,
            "cap_pixels_per_frame": False,
        }
    found: dict[str, Tensor] = processor(
        text=[text.format(media="".join(slots))], images=images or None, return_tensors="pt", **more
    )
    return found


@pytest.mark.parametrize(
    "media",
    [
        [noise(0)],
        *([clip(frames)] for frames in (1, 2, 3, 4, 8)),
        [clip(4, 84, 28), noise(1, 84, 40), clip(3), Page(noise(2, 28, 84))],
    ],
    ids=["picture", "1 frame", "2 frames", "3 frames", "4 frames", "8 frames", "clip picture clip page"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_those_of_the_checkpoints_processor(
    family: str, media: list[Any], backbones: dict[str, Backbone]
) -> None:
    """Token ids, patches, grids, and seconds of Qwen2.5-VL."""
    ours = backbones[family].processor
    prompts = ours.prompts([Item("a cat", tuple(media), "c", "Find it.")])
    asked = f"Find it.\na cat\n{PROMPT.disc_token}\n{PROMPT.rewrite_instruction}"
    text = f"<|im_start|>user\n{{media}}{asked}<|im_end|>\n<|im_start|>assistant\n"
    found = expected(ours.processor, media, text)
    assert prompts.input_ids.tolist() == found["input_ids"].tolist()
    assert prompts.grid_thw is not None and prompts.pixel_values is not None and prompts.seconds is not None
    clips = prompts.seconds > 0
    assert clips.tolist() == [isinstance(medium, Clip) for medium in media]
    pixels = ours.media.normalised(prompts.pixel_values).split(prompts.grid_thw.prod(-1).tolist())
    for kind, name, grid in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        mine = [part for part, is_clip in zip(pixels, clips.tolist(), strict=True) if is_clip == kind]
        if mine:
            assert prompts.grid_thw[clips == kind].equal(found[grid])
            torch.testing.assert_close(torch.cat(mine), found[name], atol=1e-6, rtol=0)
    layout = backbones[family].layout(prompts, prompts.input_ids)
    if "mm_token_type_ids" in found:
        assert layout["mm_token_type_ids"].equal(found["mm_token_type_ids"].int())
    if "second_per_grid_ts" in found and all(len(one.frames) > 1 for one in media if isinstance(one, Clip)):
        assert layout["second_per_grid_ts"] == pytest.approx([float(s) for s in found["second_per_grid_ts"]])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_call_of_the_tower_gives_the_features_of_several(
    family: str, backbones: dict[str, Backbone]
) -> None:
    backbone = backbones[family]
    media = (clip(4, 84, 28), noise(1, 84, 40), clip(3), Page(noise(2, 28, 84)))
    prompts = backbone.processor.prompts([Item("", media[:2]), Item("", media[2:]), Item("words")])
    calls: list[int] = []
    model = backbone.language_model.model
    handle = model.visual.register_forward_hook(lambda *_: calls.append(1))
    together = backbone.encode_media(prompts)
    handle.remove()
    assert together is not None and calls == [1]
    pixels, grid = backbone.pixels(prompts), prompts.grid_thw
    assert grid is not None and prompts.seconds is not None
    parts = pixels.split(grid.prod(-1).tolist())
    for kind, numbers, encode in (
        ("image", (1, 3), model.get_image_features),
        ("video", (0, 2), model.get_video_features),
    ):
        with torch.no_grad():
            alone = encode(torch.cat([parts[n] for n in numbers]), grid[list(numbers)], return_dict=True)
        for name in ("pooler_output", "deepstack_features"):
            if alone.get(name) is not None:
                mine, theirs = (_flat(features[name]) for features in (together[kind], alone))
                torch.testing.assert_close(mine, theirs, **CLOSE)


def _flat(features: Any) -> Tensor:
    return torch.cat([_flat(one) if isinstance(one, list | tuple) else one for one in features])


def mixed_prompts(processor: RimeProcessor) -> Prompts:
    """Small frames in a long clip: text behind it starts within the time of the clip (Qwen2, Qwen2.5)."""
    items = [
        Item("a cat", (clip(8, 28, 28, seed=1),), "a", "Find it."),
        Item("a red dog", (noise(7), clip(3, 56, 28, seed=2)), "b"),
        Item("an old boat", (), "c", "Find it."),
        Item("", (Page(noise(9, 84, 56)),), "d"),
    ]
    return processor.prompts(items)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_sampling_scoring_and_the_full_pass_agree_behind_a_clip(
    family: str, backbones: dict[str, Backbone]
) -> None:
    backbone = backbones[family]
    prompts = mixed_prompts(backbone.processor)
    names = [f"row {number}" for number in range(len(prompts))]
    (rollouts,) = sample_rollouts(backbone, [PromptPart(prompts, random_numbers(0, 0, names, 2, 7))])
    features = backbone.encode_media(prompts)
    shared = score_rollouts(backbone, prompts, rollouts, features=features)
    rows = torch.arange(len(prompts)).repeat_interleave(2)
    logits = plain_logits(backbone, prompts.select(rows), rollouts.completions)  # positions of transformers
    logits[..., [i for i in backbone.processor.special_ids if i not in _stops(backbone)]] = -torch.inf
    logits[..., len(backbone.processor.tokenizer) :] = -torch.inf
    sampled = rollouts.labels != -100
    plain = logits.log_softmax(-1).gather(-1, rollouts.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(shared.logprobs[sampled], plain[sampled], **CLOSE)
    read = prefill(backbone, prompts, 2)
    torch.testing.assert_close(embed_completions(backbone, read, rollouts.completions), shared.gen, **CLOSE)
    torch.testing.assert_close(read.disc, shared.disc, **CLOSE)
    torch.testing.assert_close(_stepwise(backbone, prompts, rollouts)[sampled], plain[sampled], **CLOSE)


def _stops(backbone: Backbone) -> list[int]:
    return [backbone.processor.gen_id, backbone.processor.turn_end_id]


def _stepwise(backbone: Backbone, prompts: Prompts, rollouts: Rollouts) -> Tensor:
    """Log-probabilities as sampling sees them: one token at a time, with the cache of the prompt."""
    from rime_pl.generation.decoding import decode, suppressed_tokens
    from rime_pl.generation.rollouts import distribution

    found = torch.zeros(rollouts.completions.ids.shape)

    def choose(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        suppressed = suppressed_tokens(backbone.processor, logits.shape[-1], logits.device)
        labels = rollouts.labels[rows, step].clamp(min=0)
        found[rows, step] = distribution(logits, suppressed, 1.0).gather(1, labels.unsqueeze(1)).squeeze(1)
        return rollouts.completions.ids[rows, step]

    decode(backbone, prefill(backbone, prompts, 2), rollouts.completions.ids.shape[1], choose)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_order_of_frames_and_their_times_matter(family: str, backbones: dict[str, Backbone]) -> None:
    """Of Qwen2-VL only the order: it knows no seconds."""
    backbone = backbones[family]
    forwards = clip(4)
    backwards, slower = replace(forwards, frames=forwards.frames[::-1]), replace(forwards, times=(0, 2, 4, 6))
    disc = backbone(
        backbone.processor.prompts([Item("", (one,)) for one in (forwards, backwards, slower)])
    ).disc
    assert (disc[0] - disc[1]).norm() > 1e-3
    assert ((disc[0] - disc[2]).norm() > 1e-4) == (family != "qwen2_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_selected_rows_take_their_own_media(family: str, backbones: dict[str, Backbone]) -> None:
    processor = backbones[family].processor
    items = [Item("x", (clip(3), noise(1))), Item("y"), Item("z", (noise(2, 84, 28), clip(2, 28, 56)))]
    whole = processor.prompts(items)
    for rows in ([2], [1], [2, 0, 0]):
        part = whole.select(torch.tensor(rows))
        alone = processor.prompts([items[row] for row in rows])
        assert part.num_media.equal(alone.num_media)
        for name in ("pixel_values", "grid_thw", "seconds"):
            mine, theirs = getattr(part, name), getattr(alone, name)
            assert (mine is None and theirs is None) or mine.equal(theirs), name


@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_hold_for_pictures_pages_and_frames(family: str, bases: dict[str, Path]) -> None:
    base = RimeProcessor.from_pretrained(str(bases[family]), PROMPT)
    token = (base.media.images.patch_size * base.media.images.merge_size) ** 2
    bounds = {
        "max_pixels": 4 * token,
        "max_page_pixels": 9 * token,
        "max_frame_pixels": token,
        "max_frames": 4,
    }
    ours = RimeProcessor(base.processor, replace(PROMPT, **bounds))
    large, six = noise(0, 400, 400), clip(6, 200, 200)
    grid = ours.prompts([Item("", (large, Page(large), six, large))]).grid_thw
    assert grid is not None
    assert (grid.prod(-1) // 4).tolist() == [4, 9, 2, 4] and grid[:, 0].tolist() == [1, 1, 2, 1]
    assert ours.contract()["prompt"].items() >= bounds.items()
    for kind, medium, frames in ((Image.Image, large, 1), (Page, Page(large), 1), (Clip, six, 6)):
        height = 200 if kind is Clip else 400
        estimated, pixels = ours.media.size_of(kind, frames, height, height)
        slot = ours.media([medium], ["x"]).slots[0]
        exact = len(ours.tokenizer(slot, add_special_tokens=False)["input_ids"])
        visual = slot.count("_pad|>")
        assert pixels == min(frames, 4) * height**2
        assert visual <= estimated <= exact + 16, (
            "never less than the visual tokens, and close to all of them"
        )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            Clip((noise(0), noise(1, 28, 28)), (0.0, 0.5)),
            "row 0: all frames of a clip must have one size, but",
        ),
        (Clip((), ()), "must have one size, but they have none"),
        (
            Clip((noise(0), noise(1)), (0.5, 0.5)),
            r"its time in seconds, rising from 0 or later, but .*0.5, 0.5",
        ),
        (Clip((noise(0), noise(1)), (0.5,)), "each of the 2 frames of a clip must have its time"),
        (Clip((noise(0),), (-1.0,)), "rising from 0 or later"),
        (Clip((noise(0), noise(1)), (0.0, float("nan"))), "rising from 0 or later"),
        (Clip((noise(0), noise(1)), (0.0, float("inf"))), "rising from 0 or later"),
    ],
)
def test_a_clip_that_cannot_be_read_is_named(bad: Clip, message: str, backbones: dict[str, Backbone]) -> None:
    with pytest.raises(DataError, match=message):
        backbones["qwen3_vl"].processor.prompts([Item("", (bad,))])


def test_a_base_model_that_reads_no_clips_is_named(bases: dict[str, Path]) -> None:
    base = RimeProcessor.from_pretrained(str(bases["qwen2_vl"]), PROMPT)
    base.processor.video_processor.image_mean = [0.1, 0.2, 0.3]
    with pytest.raises(DataError, match="reads no clips, because its video processor has another image_mean"):
        RimeProcessor(base.processor, PROMPT).prompts([Item("", (clip(2),))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_frame_pixels": 10}, "max_frame_pixels must be at least"),
        ({"max_page_pixels": 10}, "max_page_pixels must be at least"),
        ({"max_frames": 0}, "max_frames must be 1 or more"),
        ({"min_frame_pixels": 10**9}, "min_frame_pixels must be at most"),
    ],
)
def test_bounds_of_clips_and_pages_that_leave_nothing_are_refused(
    changes: dict[str, Any], message: str, bases: dict[str, Path]
) -> None:
    base = RimeProcessor.from_pretrained(str(bases["qwen3_vl"]), PROMPT)
    with pytest.raises(RimeError, match=rf"model.backbone.prompt.{message}"):
        RimeProcessor(base.processor, replace(PROMPT, **changes))


def test_a_text_may_not_hold_the_place_of_a_clip(backbones: dict[str, Backbone]) -> None:
    with pytest.raises(DataError, match=r"must not contain '<\|video_pad\|>'"):
        backbones["qwen3_vl"].processor.prompts([Item("a <|video_pad|> b")])
