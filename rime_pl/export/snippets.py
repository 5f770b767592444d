"""The code in a model card, for each library that can load the export.

Called by card.py. The texts are in cards/. Each block of Python runs as it is, next to a picture photo.jpg: a
test takes it out of a written card and does so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from rime_pl.backbone.mllm import Backbone
from rime_pl.report.table import Table
from rime_pl.training_texts import TaskInstructions

#: NF4 as in training, for the base model of an adapter.
_BITS = """, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.@DTYPE@,
    llm_int8_skip_modules=["model.visual", "lm_head"],
)"""
#: Some processors repack 4-bit weights in place, which fails for widths that are no multiple of 64.
_PACKED = """
for module in base.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):  # on a CPU, 4-bit weights stay as they are
        module.support_avx512bf16_for_cpu = False"""
_POSITIONS = """

Where a clip has more pairs of frames than visual tokens along its longer side, vLLM gives the text behind it
other positions than transformers 5, with which this model was trained."""
#: Kind of export -> the files of cards/ that its card consists of.
_SECTIONS = {
    "sentence-transformers": ("sentence_transformers", "transformers+embed", "vllm", "rime"),
    "huggingface": ("transformers+embed", "vllm", "rime"),
    "peft": ("peft+embed", "rime"),
}


def of(
    to: str,
    folder: str,
    base: str,
    prompts: Mapping[str, str],
    tasks: Mapping[str, TaskInstructions],
    backbone: Backbone,
    parity: Mapping[str, Any],
) -> str:
    """Return the sections with code of a card.

    Args:
        to: Kind of the export.
        folder: Its path, as the user named it.
        base: Folder or Hugging Face name of the base model.
        prompts: Instructions; that of queries is shown.
        tasks: Of the training, by name; their instructions are listed.
        backbone: The trained one.
        parity: Says whether clips can be read.
    """
    config, prompt = backbone.config, backbone.processor.prompt
    four_bit, clips = config.load_in_4bit and to == "peft", "clip" in parity["probes"]
    older = type(backbone.language_model).__name__.startswith(("Qwen2VL", "Qwen2_5_VL"))
    settings = ", generation_config=GenerationConfig.from_pretrained(@FOLDER@)"
    filled = {
        "BITS": _BITS if four_bit else "",
        "PACKED": _PACKED if four_bit else "",
        "IMPORT": ", BitsAndBytesConfig" if four_bit else "",
        "GENERATE": settings if to == "peft" else "",  # the model of the others brings its own
        "FOLDER": json.dumps(folder),
        "PATH": folder,
        "BASE": json.dumps(base),
        "DTYPE": config.dtype,
        "QUERY": json.dumps(prompts["query"], ensure_ascii=False),
        "DISC": f"`{prompt.disc_token}`",
        "GEN": f"`{prompt.gen_token}`",
        "CLIP": '{"video": clip, "text": "in the evening"},' if clips else "",
        "TASKS": _listed(tasks),
        "POSITIONS": _POSITIONS if older and clips else "",
    }
    text = "\n".join("".join(map(_read, names.split("+"))) for names in _SECTIONS[to])
    for name, value in filled.items():
        text = text.replace(f"@{name}@", value)
    return text.strip()


def _listed(tasks: Mapping[str, TaskInstructions]) -> str:
    """Return the instructions of tasks as a table; nothing of one task, which is in the prompts."""
    if len(tasks) < 2:
        return ""
    rows = [[name, task.of("query") or "-", task.of("target") or "-"] for name, task in tasks.items()]
    return "\n" + Table("", ["task", "instruction of queries", "of documents"], rows).markdown() + "\n"


def _read(name: str) -> str:
    return resources.files("rime_pl.export").joinpath("cards", f"{name}.md").read_text("utf-8")
