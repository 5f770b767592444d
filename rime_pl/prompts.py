"""The text around an item: chat layout, rewrite instruction and the two mode tokens, in one place.

Called by processing.py for every stage, by generation and by the retriever, so that training, evaluation
and search always use the same prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from rime_pl.bounds import at_least
from rime_pl.errors import DataError, RimeError

#: Largest number of media of an item, where a prompt sets no other.
MAX_MEDIA = 16
#: Largest number of frames of a clip, where a prompt sets no other.
MAX_FRAMES = 64
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
#: The learned token that stands in place of a rewrite in the control with latent tokens.
LATENT_TOKEN = "<latent>"


@dataclass
class PromptConfig:
    """Prompt layout of an item. Saved with each adapter and checked when the adapter is loaded.

    Args:
        disc_token: Token at which the discriminative embedding is read.
        gen_token: Token at which the generative embedding is read; the model writes it after the rewrite.
        rewrite_instruction: Instruction after the discriminative token that asks for the rewrite.
        system_prompt: Text of the system turn, "You are a helpful assistant." for Qwen2-VL (default: none).
        max_rewrite_tokens: Maximum length of a rewrite in tokens, without <gen_emb> and end of turn.
        max_text_tokens: Maximum length of an item's text in tokens (default: none). The instruction may have
            that length in addition, and is never cut.
        max_pixels: Largest area of a picture in pixels; a larger one is shrunk to it (default: that of the
            base model's image processor).
        min_pixels: Smallest area of a picture in pixels; a smaller one is enlarged to it (default: that of
            the base model's image processor).
        max_media: Largest number of pictures, clips and pages of an item together (default: 16).
        max_page_pixels: Largest area of a page in pixels (default: ``max_pixels``).
        min_page_pixels: Smallest area of a page in pixels (default: ``min_pixels``).
        max_frames: Largest number of frames of a clip. Of a clip with more, so many are read, evenly spaced
            over its length (default: 64).
        max_frame_pixels: Largest area of a frame in pixels (default: that of the base model's video
            processor, which for Qwen3-VL depends on the number of frames).
        min_frame_pixels: Smallest area of a frame in pixels (default: the same).
        num_latent_tokens: Number of latent tokens in place of each rewrite, a control of SFT (default: none;
            the model writes rewrites).
    """

    disc_token: str = "<disc_emb>"
    gen_token: str = "<gen_emb>"
    rewrite_instruction: str = "Rewrite this for retrieval in one to three self-contained sentences."
    system_prompt: str = ""
    max_rewrite_tokens: int = 128
    max_text_tokens: int | None = None
    max_pixels: int | None = None
    min_pixels: int | None = None
    max_media: int | None = None
    max_page_pixels: int | None = None
    min_page_pixels: int | None = None
    max_frames: int | None = None
    max_frame_pixels: int | None = None
    min_frame_pixels: int | None = None
    num_latent_tokens: int | None = None

    def __post_init__(self) -> None:
        limits = [field.name for field in fields(self) if field.name.startswith(("max_", "min_", "num_"))]
        at_least(1, "model.backbone.prompt", self, *limits)
        if (self.num_latent_tokens or 0) > self.max_rewrite_tokens:
            raise RimeError(
                f"model.backbone.prompt.num_latent_tokens must be at most max_rewrite_tokens "
                f"({self.max_rewrite_tokens}), whose place they take, but is {self.num_latent_tokens}."
            )
        chat = (TURN_START, TURN_END, IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END, LATENT_TOKEN)
        modes = (self.disc_token, self.gen_token)
        for name, token in zip(("disc_token", "gen_token"), modes, strict=True):
            if not token.strip() or token in chat or modes.count(token) > 1:
                raise RimeError(
                    f"model.backbone.prompt.{name} must be a token of its own, such as '<{name[:-6]}_emb>', "
                    f"but is {token!r}."
                )
        for name in ("disc_token", "gen_token", "rewrite_instruction", "system_prompt"):
            if not getattr(self, name).isascii() and re.search("[\ud800-\udfff]", getattr(self, name)):
                raise RimeError(
                    f"model.backbone.prompt.{name} must be text, but holds half a character (a surrogate). "
                    "Remove it."
                )
        # UME-R1's instruction names <gen_emb>, which is read in the completion only
        names = {"rewrite_instruction": (*chat, self.disc_token), "system_prompt": (*chat, *modes)}
        for name, special in names.items():
            if found := [token for token in special if token in getattr(self, name)]:
                raise RimeError(
                    f"model.backbone.prompt.{name} must not contain {found[0]!r}, because it is a special "
                    "token of the model. Remove it."
                )

    @property
    def media_limit(self) -> int:
        """The largest number of media of an item."""
        return MAX_MEDIA if self.max_media is None else self.max_media

    @property
    def frame_limit(self) -> int:
        """The largest number of frames of a clip."""
        return MAX_FRAMES if self.max_frames is None else self.max_frames

    def budget(self, max_new_tokens: int | None = None) -> int:
        """Return the maximum length of a rewrite: ``max_new_tokens``, or ``max_rewrite_tokens`` if None."""
        return max_new_tokens or self.max_rewrite_tokens


def refuse_many_media(count: int, limit: int, name: str) -> None:
    """Raise a DataError if an item has more media than ``limit``: each takes memory when it is opened."""
    if count > limit:
        raise DataError(
            f"{name} must have at most {limit} pictures, clips and pages, but has {count}. Use fewer, or "
            "raise model.backbone.prompt.max_media for the training."
        )


def picture_slot(tokens: int) -> str:
    """Return the place of a picture or page in a prompt.

    >>> picture_slot(2)
    '<|vision_start|><|image_pad|><|image_pad|><|vision_end|>'
    """
    return f"{VISION_START}{IMAGE_TOKEN * tokens}{VISION_END}"


def clip_slot(patches: int, tokens: int, times: Sequence[float] | None) -> str:
    """Return the place of a clip in a prompt.

    Args:
        patches: Pairs of frames.
        tokens: Visual tokens of each pair.
        times: Of each frame in seconds, for models that read the time as text (Qwen3-VL). They write that of
            each pair before it. None for models that read it from the positions.

    Example:
        >>> clip_slot(2, 1, None)
        '<|vision_start|><|video_pad|><|video_pad|><|vision_end|>'
        >>> clip_slot(1, 1, [0.0, 0.5])
        '<0.2 seconds><|vision_start|><|video_pad|><|vision_end|>'

    Source: the processors of transformers. Qwen3-VL's has no further pair of marks around the whole clip if
    the prompt has none.
    """
    if times is None:
        return f"{VISION_START}{VIDEO_TOKEN * (patches * tokens)}{VISION_END}"
    slots = []
    for patch in range(patches):
        first, last = times[2 * patch], times[min(2 * patch + 1, len(times) - 1)]
        mark = f"<{(first + last) / 2:.1f} seconds>"
        slots.append(f"{mark}{VISION_START}{VIDEO_TOKEN * tokens}{VISION_END}")
    return "".join(slots)


def chat_prompt(config: PromptConfig, text: str, instruction: str, media: Sequence[str]) -> str:
    """Return the prompt of one item, up to where the assistant starts to write.

    Args:
        config: Mode tokens and instruction.
        text: Text of the item, may be empty.
        instruction: Instruction of the task, may be empty.
        media: The places of the media, in order, from :func:`picture_slot` and :func:`clip_slot`.

    Example:
        >>> config = PromptConfig(rewrite_instruction="Rewrite.")
        >>> print(chat_prompt(config, "a cat", "Find it.", [picture_slot(2)]))
        <|im_start|>user
        <|vision_start|><|image_pad|><|image_pad|><|vision_end|>Find it.
        a cat
        <disc_emb>
        Rewrite.<|im_end|>
        <|im_start|>assistant
        <BLANKLINE>
    """
    words = "\n".join(part for part in (instruction, text) if part)
    system = f"{TURN_START}system\n{config.system_prompt}{TURN_END}\n" if config.system_prompt else ""
    return (
        f"{system}{TURN_START}user\n{''.join(media)}{words}\n{config.disc_token}\n"
        f"{config.rewrite_instruction}{TURN_END}\n{TURN_START}assistant\n"
    )


def completion(config: PromptConfig, rewrite: str | None) -> str:
    """Return what the assistant writes: the rewrite, the generative token, end of turn.

    With ``num_latent_tokens`` K, every rewrite is K times <latent> instead. This is a control: as with a
    rewrite of K tokens, the model has K positions to compute in before <gen_emb>, but no words. One row of
    the table is learned, and fed K times in training and in use. Nothing is sampled or learned to be written.

    Args:
        config: Generative token and number of latent tokens.
        rewrite: "" or None is the empty rewrite; latent tokens replace every text, but not None.

    Source: pause tokens, arXiv 2310.02226: copies of one learned token whose outputs are not read. There
    they are in the pre-training, too; here SFT has to learn their use. Paper: ours. Methods that feed hidden
    states back as inputs (continuous thoughts, arXiv 2412.06769) are not this control.

    Example:
        >>> completion(PromptConfig(num_latent_tokens=2), "A cat.")
        '<latent><latent><gen_emb><|im_end|>'
    """
    if rewrite is not None and config.num_latent_tokens:
        rewrite = LATENT_TOKEN * config.num_latent_tokens
    return f"{rewrite or ''}{config.gen_token}{TURN_END}"
