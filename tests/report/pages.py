"""Run folders for the tests of `rime report`, with the names and texts that somebody hostile would choose."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from rime_pl.callbacks.rewrite_samples import Found, Shown, _row, rewrite_table
from rime_pl.report.sheets import sheet
from rime_pl.report.stage import write_report
from rime_pl.run_folder import RunFolder
from rime_pl.types import MODE_PAIRS, Item

SCRIPT = "<script>alert(1)</script>"
#: Closes whatever it may stand in: an attribute, a comment, a style, a title.
BREAKER = "\"'--></style></title><img src=x onerror=alert(2)>\x00\ud800"


class Read(HTMLParser):
    """The elements, attributes and texts of a page, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def results(gen: bool = True, task: str = SCRIPT) -> dict[str, Any]:
    """What a test of four queries gives; their ranks are those of `ranks`."""
    pairs = MODE_PAIRS if gen else MODE_PAIRS[:1]
    recalls = {f"recall@{k}": dict.fromkeys(pairs, value) for k, value in ((1, 0.5), (5, 0.75), (10, 1.0))}
    overall: dict[str, Any] = {
        **recalls,
        "ci": {pair: [0.25, 0.8] for pair in pairs},
        "milliseconds": {"discriminative": 1.5} | ({"generative": 4.5} if gen else {}),
    }
    if gen:
        trace = {"own": 0.5, "reference": 0.75, "shuffled": 0.0, "empty": 0.25}
        trace |= {"own-minus-empty": 0.25, "own-minus-shuffled": 0.5, "room": 0.25}
        overall |= {"trace": trace, "rewrite": {"mean_length": 7.0, "well_formed": 1.0}}
        overall |= {"oracle": dict.fromkeys(recalls, 1.0)}
    kinds = {"modality": {"query": f"text {BREAKER[:9]}", "target": "picture"}}
    of_task = {**overall, **kinds, "gallery": 4, "chance": 0.25, "queries": 4}
    facts = {"gallery": 4, "chance": 0.25, "queries": 4, "memory": [], "all_gallery": None}
    return {"overall": overall, "per_task": {task: of_task}, **facts}


def ranks(gen: bool = True) -> list[dict[str, Any]]:
    """Two queries that are found first, one that is third, and one that is ninth."""
    pairs = MODE_PAIRS if gen else MODE_PAIRS[:1]
    rows = [
        {"key": f"{n} {SCRIPT}", "task": SCRIPT, "ranks": dict.fromkeys(pairs, rank)}
        for n, rank in enumerate((1, 1, 3, 9))
    ]
    if gen:
        rows[0]["ranks"] |= {"disc-disc": 3}  # type: ignore[dict-item]
        rows[2]["ranks"] |= {"disc-disc": 1}  # type: ignore[dict-item]
    return [row | {"rewrite": BREAKER} for row in rows] if gen else rows


def log(run: RunFolder, stage: str) -> None:
    """Curves, and one sample as the callback keeps it, right in gen-gen and wrong in disc-disc."""
    writer = SummaryWriter(str(run.path / "tensorboard"))
    for step in range(1, 451):
        writer.add_scalar("train/loss", 9 / step, step)
        writer.add_scalar("train/grad_norm", 1.0, step)
        if stage == "refine_rl":
            writer.add_scalar("train/reward", step / 100, step)
            writer.add_scalar("train/kl", 0.01, step)
    for step in (225, 450):
        for pair in MODE_PAIRS:
            writer.add_scalar(f"val/recall@1/{pair}", step / 900, step)
    picture = Item(SCRIPT, (Image.new("RGB", (60, 40), "red"),), "c", rewrite=SCRIPT)
    sample = Shown(
        1, "key", SCRIPT, "g", 5, picture, f"{SCRIPT} | {BREAKER[:9]}", {"gen": None, "disc": None}
    )  # type: ignore[dict-item]
    found = {
        "gen": [[Found(0.9, 5, picture, SCRIPT), Found(0.8, 6, picture, None)]],
        "disc": [[Found(0.7, 6, picture, SCRIPT), Found(0.6, 5, picture, None)]],
    }
    writer.add_text("test/rewrites", rewrite_table([sample], found), 450)
    for view, name in (("gen", "gen-gen"), ("disc", "disc-disc")):
        drawn = sheet([_row(sample, found[view][0])], "test split")
        writer.add_image(f"test/retrieval/{name}", np.asarray(drawn), 450, dataformats="HWC")
    writer.close()


def make_run(folder: Path, stage: str = "cma", before: RunFolder | None = None, **settings: Any) -> RunFolder:
    """A finished run with all that `rime STAGE fit` leaves and the report reads."""
    run = RunFolder(folder)
    model = {
        "init_adapter_from": str(before.adapter) if before else None,
        "temperature": 0.02,
        SCRIPT: BREAKER[:-1],
    }
    values = {"data": {"path": f"data/{SCRIPT[:8]}", "tasks": [SCRIPT]}, "model": model | settings}
    differs = {"model.temperature": {"value": SCRIPT, "recipe": 0.02}}
    run.begin(
        values | {"recall": {"headline_tasks": None, "memory_tasks": None}}, {"differs_from_recipe": differs}
    )
    facts = {"seed": 0, "data": f"data/{SCRIPT}", "data_hash": "x", "steps": 450, "note": BREAKER[:-1]}
    earlier = before.summary if before else None
    write_report(run.path, stage, results(), [], [], earlier, {"fit": 9.0}, facts | {"argv": [SCRIPT]})
    (run.path / "ranks.json").write_text(json.dumps(ranks()))  # half a surrogate pair only as an escape
    log(run, stage)
    return run
