"""The text around an item: chat layout, rewrite instruction and the two mode tokens, in one place.

Called by processing.py for every stage, by generation and by the retriever, so that training, evaluation
and search always use the same prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from rime_pl.bounds import at_least
from rime_pl.errors import DataError, RimeError

#: Largest number of pictures of an item, where a prompt sets no other.
MAX_IMAGES = 16
IMAGE_SLOT = "<|vision_start|>{pads}<|vision_end|>"
IMAGE_TOKEN = "<|image_pad|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"


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
        max_images: Largest number of pictures of an item (default: 16).
    """

    disc_token: str = "<disc_emb>"
    gen_token: str = "<gen_emb>"
    rewrite_instruction: str = "Rewrite this for retrieval in one to three self-contained sentences."
    system_prompt: str = ""
    max_rewrite_tokens: int = 128
    max_text_tokens: int | None = None
    max_pixels: int | None = None
    min_pixels: int | None = None
    max_images: int | None = None

    def __post_init__(self) -> None:
        limits = ("max_rewrite_tokens", "max_text_tokens", "max_pixels", "min_pixels", "max_images")
        at_least(1, "model.backbone.prompt", self, *limits)
        chat = (TURN_START, TURN_END, IMAGE_TOKEN, *IMAGE_SLOT.split("{pads}"))
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
        for name in ("rewrite_instruction", "system_prompt"):
            if found := [token for token in (*chat, *modes) if token in getattr(self, name)]:
                raise RimeError(
                    f"model.backbone.prompt.{name} must not contain {found[0]!r}, because it is a special "
                    "token of the model. Remove it."
                )

    @property
    def image_limit(self) -> int:
        """The largest number of pictures of an item."""
        return MAX_IMAGES if self.max_images is None else self.max_images

    def budget(self, max_new_tokens: int | None = None) -> int:
        """Return the maximum length of a rewrite: ``max_new_tokens``, or ``max_rewrite_tokens`` if None."""
        return max_new_tokens or self.max_rewrite_tokens


def refuse_many_images(count: int, limit: int, name: str) -> None:
    """Raise a DataError if an item has more pictures than ``limit``: each takes memory when it is opened."""
    if count > limit:
        raise DataError(
            f"{name} must have at most {limit} pictures, but has {count}. Use fewer, or raise "
            "model.backbone.prompt.max_images for the training."
        )


def chat_prompt(config: PromptConfig, text: str, instruction: str, image_tokens: list[int]) -> str:
    """Return the prompt of one item, up to where the assistant starts to write.

    Args:
        config: Mode tokens and instruction.
        text: Text of the item, may be empty.
        instruction: Instruction of the task, may be empty.
        image_tokens: Number of visual tokens of each image, in order.

    Example:
        >>> print(chat_prompt(PromptConfig(rewrite_instruction="Rewrite."), "a cat", "Find it.", [2]))
        <|im_start|>user
        <|vision_start|><|image_pad|><|image_pad|><|vision_end|>Find it.
        a cat
        <disc_emb>
        Rewrite.<|im_end|>
        <|im_start|>assistant
        <BLANKLINE>
    """
    media = "".join(IMAGE_SLOT.format(pads=IMAGE_TOKEN * count) for count in image_tokens)
    words = "\n".join(part for part in (instruction, text) if part)
    system = f"{TURN_START}system\n{config.system_prompt}{TURN_END}\n" if config.system_prompt else ""
    return (
        f"{system}{TURN_START}user\n{media}{words}\n{config.disc_token}\n"
        f"{config.rewrite_instruction}{TURN_END}\n{TURN_START}assistant\n"
    )


def completion(config: PromptConfig, rewrite: str) -> str:
    """Return what the assistant writes: the rewrite, the generative token, end of turn."""
    return f"{rewrite}{config.gen_token}{TURN_END}"
