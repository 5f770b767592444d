"""`rime export`: write a trained model as a folder that other libraries load without our code."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from rich.console import Console

from rime_pl.export.exporting import Order, export


def run(
    *,
    to: Literal["peft", "huggingface", "sentence-transformers"],
    run: Path,
    output: Path,
    weights: Literal["trained", "original"] = "trained",
    dtype: Literal["float32", "bfloat16"] | None = None,
    task: str | None = None,
    truncate_dim: int | None = None,
    measure: bool = False,
    base_name: str | None = None,
    licence: str = "unknown",
    rewrite_instruction: str | None = None,
    device: str | None = None,
    base: str | None = None,
) -> int:
    """Write a trained model as a folder that other libraries load without our code.

    LoRA and the rows of the mode tokens are merged into the weights. A chat template gives the messages of
    any library the tokens of our prompt. Then each library embeds items of every kind in its own way. If a
    vector has a cosine below 0.999 with ours, nothing is left of the export. parity.json and README.md, a
    model card, lie in the folder.

    Args:
        to: sentence-transformers writes a folder for that library, transformers and vLLM; huggingface the
            same without the modules of sentence-transformers; peft copies the adapter.
        run: Folder of the run, or a released checkpoint.
        output: Folder to write, new or empty.
        weights: Values that LoRA is merged into. trained are those of its training, dequantised if the base
            model is in 4 bits; original are those of the base model's files, for which LoRA was not trained.
        dtype: Type of the written weights (default: that of the training).
        task: Task whose instructions are the prompts query and document (default: the first that asks in
            words alone for a picture).
        truncate_dim: Length to which sentence-transformers cuts vectors, one of model.dimensions (default:
            the whole length).
        measure: Whether recall on the run's test split is measured, of run and export, also for shorter,
            int8 and binary vectors.
        base_name: Hugging Face name of the base model, for the model card (default: as the run names it).
        licence: Licence of the weights, for the model card.
        rewrite_instruction: Words that ask a released checkpoint for a rewrite, which no file of it says.
        device: Device for comparing and measuring, such as cpu or cuda (default: cuda if there is one).
        base: Folder or Hugging Face name of the base model (default: where it was in training).
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    order = Order(
        to,
        run,
        output,
        weights=weights,
        dtype=dtype,
        task=task,
        truncate_dim=truncate_dim,
        measure=measure,
        base_name=base_name,
        licence=licence,
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        base=base,
    )
    prompt = None if rewrite_instruction is None else {"rewrite_instruction": rewrite_instruction}
    export(order, console.print, prompt)
    console.print(f"written: {output} (README.md, parity.json)")
    return 0
