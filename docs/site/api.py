"""The pages of the Python API: one for each package, which mkdocstrings fills from the docstrings.

Called by build.py. It reads the source without importing it.
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Page -> what a reader finds there, and the modules or packages on it.
PAGES = {
    "rime_pl": ("Load a trained model, and what you give it", ["rime_pl", "rime_pl.types", "rime_pl.errors"]),
    "inference": ("A trained model in use: encode, index, search", ["rime_pl.inference"]),
    "losses": ("Losses, rewards and advantages: pure functions of tensors", ["rime_pl.losses"]),
    "metrics": ("Recall, intervals, and what else is measured", ["rime_pl.metrics"]),
    "modules": ("The three stages, each a LightningModule", ["rime_pl.modules"]),
    "items": (
        "From an item to tokens and patches",
        ["rime_pl.prompts", "rime_pl.media", "rime_pl.clips", "rime_pl.visual_inputs", "rime_pl.processing"],
    ),
    "backbone": ("The model in 4 bits with its adapters", ["rime_pl.backbone"]),
    "generation": ("Writing and sampling rewrites", ["rime_pl.generation"]),
    "scaling": ("One batch larger than one device", ["rime_pl.scaling"]),
    "datamodules": ("Shards in, batches out", ["rime_pl.datamodules"]),
    "callbacks": ("What watches a training", ["rime_pl.callbacks"]),
    "evaluation": ("Public benchmarks", ["rime_pl.evaluation"]),
    "export": ("A model for other libraries", ["rime_pl.export"]),
}


def modules_of(name: str) -> list[str]:
    """Return a module, or the modules of a package, without those of packages inside it."""
    path = ROOT / Path(*name.split("."))
    if name == "rime_pl" or not path.is_dir():
        return [name]
    return [f"{name}.{file.stem}" for file in sorted(path.glob("*.py")) if not file.stem.startswith("_")]


def page(name: str) -> str:
    """Return a page of PAGES."""
    title, packages = PAGES[name]
    lines = [f"# {title}", ""]
    for module in [module for package in packages for module in modules_of(package)]:
        lines += [f"## {module}", "", _about(module), "", f"::: {module}", "    options:"]
        lines += [
            "      show_root_heading: false",
            "      show_root_toc_entry: false",
            "      show_docstring: true",
        ]
        if module == "rime_pl":
            lines += ["      members: [load]"]
        lines += [""]
    return "\n".join(lines)


def _about(module: str) -> str:
    """Return the way to import a module."""
    return f"`import {module}`"


def first_line(module: str) -> str:
    """Return the first line of the docstring of a module."""
    path = ROOT / Path(*module.split("."))
    text = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    return (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
