"""`rime export`: write a trained model as a folder that other libraries load without our code."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console

from rime_pl.backbone.adapters import CONTRACT_FILE, contract_in
from rime_pl.errors import RimeError
from rime_pl.export.exporting import Order, Settings, export


def run(
    *,
    to: Literal["peft", "huggingface", "sentence-transformers"],
    run: Path,
    output: Path,
    rewrite_instruction: str | None = None,
    common: Settings = Settings(),
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
        rewrite_instruction: Words that ask a released checkpoint for a rewrite, which no file of it says.
        common: How it is exported.
    """
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    _refuse_latent_tokens(run)
    prompt = None if rewrite_instruction is None else {"rewrite_instruction": rewrite_instruction}
    export(Order(to, run, output, **vars(common)), console.print, prompt)
    console.print(f"written: {output} (README.md, parity.json)")
    return 0


def _refuse_latent_tokens(run: Path) -> None:
    """Raise for the control whose latent tokens no other library would feed."""
    file = run / "adapter" / CONTRACT_FILE
    if file.is_file() and contract_in(file)["prompt"].get("num_latent_tokens"):
        raise RimeError(
            f"--run {run} has latent tokens in place of rewrites (num_latent_tokens), which other libraries "
            "do not know. Export a run that writes rewrites."
        )
