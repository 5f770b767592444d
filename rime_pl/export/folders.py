"""Write the files of an export: a checkpoint with its processor and template, modules, an adapter.

Called by exporting.py. Everything here is data that other libraries read; none of our code travels with it.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from rime_pl.backbone.adapters import WEIGHTS_FILE, contract_in
from rime_pl.backbone.fingerprint import base_fingerprint
from rime_pl.errors import DataError
from rime_pl.export.chat_template import chat_template
from rime_pl.places import places_of
from rime_pl.processing import CONTRACT_FILE, RimeProcessor
from rime_pl.run_folder import write_json
from rime_pl.types import Clip, Item

#: What sentence-transformers must at least be: the version that the export was tested with.
REQUIREMENTS = {
    "sentence-transformers": ">=6.2",
    "transformers": ">=5.20",
    "torchvision": {"specifier": ">=0.20", "reason": "Pictures and clips are resized with it."},
}
_MODULES = (
    ("", "sentence_transformers.base.modules.transformer.Transformer"),
    ("1_Pooling", "sentence_transformers.sentence_transformer.modules.pooling.Pooling"),
    ("2_Normalize", "sentence_transformers.base.modules.normalize.Normalize"),
)
_POOLING_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")


def reason_for_no_clips(processor: RimeProcessor) -> str:
    """Return why other libraries cannot read clips as our code does; "" if they can."""
    picture = Image.new("RGB", (64, 64))
    try:
        processor.prompts([Item("", (Clip((picture, picture), (0.0, 0.5)),))], ["A clip"])
    except DataError as error:
        return str(error)
    if processor.media.timed and processor.media.frame_size is not None:
        return (
            "This export reads no clips: its training bounds the pixels of each frame, but the video "
            "processor of Qwen3-VL bounds those of a whole clip. Use rime_pl.load."
        )
    return ""


def write_processor(processor: RimeProcessor, folder: Path) -> None:
    """Write processor and tokenizer, so that they prepare media as our code does, and the chat template."""
    written = copy.deepcopy(processor.processor)
    media = processor.media
    if media.picture_size is not None:
        written.image_processor.size = dict(media.picture_size)
    if (videos := getattr(written, "video_processor", None)) is not None:
        # the frames of a clip are chosen when it is read from a file
        videos.do_sample_frames, videos.cap_pixels_per_frame = False, False
        if media.frame_size is not None and not media.timed:
            videos.size = dict(media.frame_size)
    written.tokenizer.padding_side = "left"  # the embedding is read at the last token
    template = chat_template(processor, reason_for_no_clips(processor))
    written.chat_template = written.tokenizer.chat_template = template
    written.save_pretrained(folder)


def write_checkpoint(
    model: Any, processor: RimeProcessor, folder: Path, contract: Mapping[str, Any], dimensions: Sequence[int]
) -> None:
    """Write a merged model as an ordinary checkpoint, with our contract beside it.

    Args:
        model: From ``merging.merged_model``.
        processor: Of the run.
        folder: Exists and is empty.
        contract: All of it but the fingerprint of the weights.
        dimensions: Lengths of embeddings that were trained, besides the whole one.
    """
    if dimensions:
        model.config.matryoshka_dimensions = list(dimensions)  # vLLM reads it
    model.save_pretrained(folder)
    write_processor(processor, folder)
    hashes = {"weights_hash": base_fingerprint(str(folder))}
    write_json(folder / CONTRACT_FILE, {**contract, **hashes})


def write_modules(
    folder: Path,
    width: int,
    prompts: Mapping[str, str],
    dimensions: Sequence[int],
    truncate_dim: int | None,
) -> None:
    """Add what sentence-transformers reads: a transformer, pooling at the last token, normalisation.

    Args:
        folder: Of a checkpoint.
        width: Length of an embedding.
        prompts: Name -> instruction; query and document among them.
        dimensions: As ``write_checkpoint``.
        truncate_dim: Length to which it cuts embeddings; None for the whole one.
    """
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (path, kind) in enumerate(_MODULES)
    ]
    write_json(folder / "modules.json", modules)
    read = {"method": "forward", "method_output_name": "last_hidden_state"}
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            **dict.fromkeys(("text", "image", "video"), read),
            "message": {**read, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
    }
    write_json(folder / "sentence_bert_config.json", transformer)
    for name in ("1_Pooling", "2_Normalize"):
        (folder / name).mkdir()
    # the long keys: vLLM up to 0.23 reads the short ones as mean pooling, without a word
    modes = {f"pooling_mode_{mode}": False for mode in _POOLING_MODES}
    pooling = {"word_embedding_dimension": width, **modes, "pooling_mode_lasttoken": True}
    write_json(folder / "1_Pooling" / "config.json", {**pooling, "include_prompt": True})
    versions = {"sentence_transformers": "sentence-transformers", "transformers": "transformers"}
    versions |= {"pytorch": "torch"}
    whole = {
        "model_type": "SentenceTransformer",
        "__version__": {key: metadata.version(name) for key, name in versions.items()},
        "requirements": REQUIREMENTS,
        "prompts": dict(prompts),
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
        "truncate_dim": truncate_dim,
        "matryoshka_dimensions": list(dimensions),
    }
    write_json(folder / "config_sentence_transformers.json", whole)


def write_adapter(adapter: Path, processor: RimeProcessor, folder: Path, base: str, output: Path) -> None:
    """Copy an adapter so that PEFT loads it without our code, with the chat template beside it.

    Args:
        adapter: The adapter folder of a run.
        processor: Of the run.
        folder: Exists and is empty.
        base: Folder or Hugging Face name of the base model, for PEFT's own config.
        output: Where the folder will lie; the base model is looked for from there.
    """
    shutil.copy(adapter / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    contract = contract_in(adapter / CONTRACT_FILE)
    write_json(folder / CONTRACT_FILE, {**contract, "base": base, "base_paths": places_of(base, output)})
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", {**config, "base_model_name_or_path": base})
    write_processor(processor, folder)
