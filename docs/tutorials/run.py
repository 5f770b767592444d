"""Run the tutorials and write them as pages with their output: `make tutorials`.

Each tutorial becomes OUTPUT/<name>.md with its pictures in OUTPUT/<name>_files/. Beside them lie index.md and
the solutions as a page. The links fit docs/tutorials/, so a site shows OUTPUT in the place of that folder.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import jupytext
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from traitlets.config import Config

HERE = Path(__file__).resolve().parent
#: Seconds after which a cell is stopped.
LIMIT = 600
#: A kernel talks over TCP, which other users of the machine could read; unencrypted, it warns of that.
ENCRYPTED = Config({"KernelManager": {"transport_encryption": "auto"}})
#: What a terminal takes for colours and bold.
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
#: A link to a file here that becomes a page.
LINK = re.compile(r"\]\((\d\d_\w+|solutions)\.py\)")


def tutorials(folder: Path = HERE) -> list[Path]:
    """Return the tutorials in their order."""
    return sorted(folder.glob("[0-9][0-9]_*.py"))


def executed(script: Path) -> NotebookNode:
    """Return a tutorial as a notebook with its outputs; it runs in a process of its own, in its folder.

    Raises:
        CellExecutionError: If a cell fails.
    """
    notebook = jupytext.read(script)
    place = {"metadata": {"path": str(script.parent)}}
    NotebookClient(notebook, timeout=LIMIT, resources=place, config=ENCRYPTED).execute()
    return notebook


def write_page(notebook: NotebookNode, name: str, output: Path) -> Path:
    """Write ``<name>.md`` and its pictures, and return the page.

    What a cell writes to stderr is left out: bars and notes of other libraries. Tables are text without
    colours.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [one for one in cell.outputs if one.get("name") != "stderr"]
            for one in cell.outputs:
                data = one.get("data", {})
                data.pop("text/html", None)
                if "text/plain" in data:
                    data["text/plain"] = COLOUR.sub("", data["text/plain"])
    resources = {"output_files_dir": f"{name}_files", "unique_key": name}
    text, found = MarkdownExporter().from_notebook_node(notebook, resources)
    shutil.rmtree(output / f"{name}_files", ignore_errors=True)
    for place, data in found["outputs"].items():
        (output / place).parent.mkdir(parents=True, exist_ok=True)
        (output / place).write_bytes(data)
    page = output / f"{name}.md"
    page.write_text(LINK.sub(r"](\1.md)", text))
    return page


def write_other_pages(output: Path) -> None:
    """Write the table of the tutorials and the solutions as pages."""
    (output / "index.md").write_text(LINK.sub(r"](\1.md)", (HERE / "index.md").read_text()))
    code = (HERE / "solutions.py").read_text()
    (output / "solutions.md").write_text(f"# Solutions of the exercises\n\n```python\n{code}```\n")


def main(words: Sequence[str] | None = None) -> int:
    """Run some tutorials or all, and return the exit code."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of their names, such as 03 (default: all)")
    parser.add_argument(
        "--output", type=Path, default=HERE.parents[1] / "build/tutorials", help="folder of the pages"
    )
    given = parser.parse_args(words)
    chosen = [one for one in tutorials() if not given.names or one.name.startswith(tuple(given.names))]
    if not chosen:
        parser.error(f"no tutorial begins with {' or '.join(given.names)}")
    given.output.mkdir(parents=True, exist_ok=True)
    # the kernel writes pictures into the notebook, and asks no server for anything
    os.environ.update(MPLBACKEND="module://matplotlib_inline.backend_inline", HF_HUB_OFFLINE="1")
    began = time.monotonic()
    for number, script in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {script.stem} ...", end=" ", flush=True)
        start = time.monotonic()
        try:
            page = write_page(executed(script), script.stem, given.output)
        except CellExecutionError as error:
            print(f"failed:\n{error}")
            return 1
        print(f"{time.monotonic() - start:.0f} s, {page}", flush=True)
    write_other_pages(given.output)
    print(f"{len(chosen)} tutorials in {time.monotonic() - began:.0f} s: {given.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
