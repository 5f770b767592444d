"""The chat template of an export: messages of any library become our prompt, token for token.

Called by folders.py. The words are those of prompts.py, which the template gets as strings. What our own code
refuses, the template refuses as well, because another library would embed it in silence.

A system message is the instruction of the task: sentence-transformers puts its prompts there. A user message
is the item. Without a generation prompt the text ends in the discriminative token, where the embedding is
read. With one it asks for the rewrite. With the rewrite as an assistant message it ends in the generative
token.
"""

from __future__ import annotations

import json
from importlib import resources

from rime_pl.processing import RimeProcessor
from rime_pl.prompts import IMAGE_TOKEN, TURN_END, TURN_START, VIDEO_TOKEN, VISION_END, VISION_START


def chat_template(processor: RimeProcessor, no_clips: str = "") -> str:
    """Return the template, for Jinja as transformers renders it.

    Args:
        processor: Its prompt, its special tokens, and how its family writes a clip.
        no_clips: Why clips cannot be read as our code reads them; they are refused with it.
    """
    prompt = processor.prompt
    system = f"{TURN_START}system\n{prompt.system_prompt}{TURN_END}\n" if prompt.system_prompt else ""
    special = [token.content for token in processor.tokenizer.added_tokens_decoder.values() if token.special]
    values = {
        "special": sorted(special),
        "most_media": prompt.media_limit,
        "most_frames": prompt.frame_limit,
        "no_clips": no_clips,
        "picture": f"{VISION_START}{IMAGE_TOKEN}{VISION_END}",
        # Qwen3-VL's processor writes the marks of each pair of frames itself
        "clip": VIDEO_TOKEN if processor.media.timed else f"{VISION_START}{VIDEO_TOKEN}{VISION_END}",
        "before": f"{system}{TURN_START}user\n",
        "discriminative": f"\n{prompt.disc_token}",
        "ask": f"\n{prompt.rewrite_instruction}{TURN_END}\n{TURN_START}assistant\n",
        "generative": prompt.gen_token,
    }
    # strings of JSON are strings of Jinja
    head = [
        f"{{%- set {name} = {json.dumps(value, ensure_ascii=False)} -%}}" for name, value in values.items()
    ]
    body = resources.files("rime_pl.export").joinpath("chat_template.jinja").read_text("utf-8")
    return "\n".join([*head, body])
