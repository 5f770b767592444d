"""The tutorials: each runs on an untrained micro model, and each exercise tells right from wrong."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jupytext
import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor

from rime_pl.backbone.adapters import adapter_state, save_adapter
from rime_pl.datamodules.builders.openmoji import builder as openmoji
from rime_pl.datamodules.shards import read_split
from rime_pl.datamodules.texts import TextReader, read_texts
from rime_pl.losses.contrastive import info_nce
from rime_pl.run_folder import RunFolder
from rime_pl.training_texts import TrainingTexts, tasks_to_json, write_words
from tests.micro import build_backbone, build_base, micro_config, randomise_adapter
from tests.test_language import BARE_NUMBER, LINK, without_code

FOLDER = Path(__file__).parents[2] / "docs/tutorials"
TUTORIALS = sorted(FOLDER.glob("[0-9][0-9]_*.py"))
#: The one simulates steps of a 2B model, the other trains through the command line.
LONG = ("07_qlora_and_memory", "08_your_own_data")


def wrong_gen_column(ids: Tensor, mask: Tensor, gen_id: int) -> Tensor:
    """Looks into the padding."""
    hits = ids == gen_id
    return torch.where(hits.any(dim=1), hits.int().argmax(dim=1), -1)


def wrong_seen_before(train: list[Any], test: list[Any]) -> list[str]:
    """Compares queries, not targets."""
    return sorted({pair.query.content_id for pair in train} & {pair.query.content_id for pair in test})


def wrong_rank_of(query: Tensor, gallery: Tensor, right: int) -> int:
    """Lets a tie count for the right target."""
    scores = gallery @ query
    return 1 + int((scores > scores[right]).sum())


def wrong_symmetric_loss(cosines: Tensor, temperature: float) -> Tensor:
    """One direction only."""
    return torch.nn.functional.cross_entropy(cosines / temperature, torch.arange(len(cosines)))


def wrong_alignment(queries: Any, targets: Any, temperature: float) -> Tensor:
    """The terms of stage 1."""
    return info_nce(queries.gen, targets.gen, temperature) + info_nce(queries.disc, targets.disc, temperature)


def wrong_decisive(own: Tensor, wrong: Tensor, targets: Any, temperature: float, margin: float) -> Tensor:
    """The sign is turned round."""
    gaps = [((own - wrong) * target).sum(dim=-1) / temperature for target in (targets.gen, targets.disc)]
    return sum((torch.nn.functional.softplus(gap + margin).mean() for gap in gaps), torch.zeros(()))


def wrong_advantages_of(rewards: Tensor, scale: float, min_spread: float) -> Tensor:
    """Keeps groups without signal."""
    return (rewards - rewards.mean(dim=1, keepdim=True)) / scale


def wrong_nf4_bytes(rows: int, columns: int) -> int:
    """Forgets the scale of a block that is not full."""
    return rows * columns // 2 + 4 * (rows * columns // 64)


def wrong_rows_of(names: list[str]) -> list[dict[str, str]]:
    """Forgets the dash, the vowel, the ending and the order."""
    parts = [(name, *name.split(".")[0].split("_")) for name in names if "_" in name]
    return [{"image": name, "caption": f"a {colour} {shape}."} for name, colour, shape, _ in parts]


@pytest.fixture(scope="module", autouse=True)
def beside() -> Iterator[None]:
    """Tutorials import lesson.py from their own folder, and draw into nothing here."""
    sys.path.insert(0, str(FOLDER))
    before = matplotlib.get_backend()
    plt.switch_backend("agg")
    yield
    torch.set_printoptions(profile="default")  # a tutorial prints three digits
    plt.switch_backend(before)
    sys.path.remove(str(FOLDER))


def exercise(script: Path) -> dict[str, Any]:
    """Return the names of the exercise: its imports and its cells are run, and nothing else."""
    cells = [cell for cell in jupytext.read(script).cells if cell.cell_type == "code"]
    names: dict[str, Any] = {"__name__": script.stem}
    for cell in [cells[0], *(cell for cell in cells if "exercise" in cell.metadata.get("tags", []))]:
        exec(cell.source, names)
    return names


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda script: script.stem)
def test_a_solution_passes_and_others_do_not(script: Path) -> None:
    names = exercise(script)
    solutions, lesson = importlib.import_module("solutions"), importlib.import_module("lesson")
    (asked,) = [
        name
        for name, one in names.items()
        if callable(one) and getattr(one, "__module__", "") == script.stem and name != "check"
    ]
    check = names["check"]
    check(getattr(solutions, asked))
    assert lesson.verdict(check, getattr(solutions, asked)).startswith("Solved")
    with pytest.raises(NotImplementedError):
        check(names[asked])
    assert lesson.verdict(check, names[asked]).startswith("Not solved yet")
    wrong: Callable[..., Any] = globals()[f"wrong_{asked}"]
    with pytest.raises(AssertionError, match=r"."):
        check(wrong)
    assert lesson.verdict(check, wrong).startswith("Not right yet")


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda script: script.stem)
def test_a_tutorial_says_what_it_teaches_and_links_to_files(script: Path) -> None:
    cells = jupytext.read(script).cells
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    for part in ("**You will learn**", "**You need**", "**It takes**"):
        assert part in prose[0]
    assert prose[0].startswith(f"# {script.name[:2]} ")
    assert any("## Exercise" in text for text in prose) and "solutions.py" in prose[-1]
    assert any("plt.show()" in cell.source for cell in cells if cell.cell_type == "code")
    assert not [text for text in prose if BARE_NUMBER.search(without_code(text))]
    links = [link for text in prose for link in LINK.findall(text)]
    assert links and not [link for link in links if not (script.parent / link).is_file()]


@pytest.fixture(scope="module")
def micro_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tutorials read of the runs that `make train-cma` leaves, of a model that is not trained."""
    folder = tmp_path_factory.mktemp("tutorials")
    corpus = folder / "openmoji"
    openmoji.build(corpus, size=24, test_pictures=8, val_pictures=5, wordings=1, thing_wordings=1, limit=14)
    backbone = build_backbone(micro_config(build_base(folder / "base", corpus)))
    texts = TrainingTexts()
    for pair in read_texts(TextReader(read_split(corpus, "train"))):
        texts.add(pair)
    for seed, stage in enumerate(("sft", "cma")):
        run = RunFolder(folder / "run" / stage)
        randomise_adapter(backbone.peft, seed=seed, scale=0.02)
        weights = (backbone.peft, adapter_state(backbone.peft), backbone.processor, backbone.config)
        save_adapter(run.adapter, *weights, backbone.base_hash, tasks_to_json(texts.tasks()))
        write_words(run.adapter, texts.words)
        (run.path / "manifest.json").write_text(json.dumps({"data": str(corpus)}))
        before = str(folder / "run/sft/adapter") if stage == "cma" else None
        run.config.write_text(json.dumps({"model": {"init_adapter_from": before}}))
        run.marker.write_text("{}")
    return folder / "run/cma"


@pytest.mark.parametrize(
    "script",
    [pytest.param(one, marks=[pytest.mark.long] * (one.stem in LONG)) for one in TUTORIALS],
    ids=lambda script: script.stem,
)
def test_a_tutorial_runs(
    script: Path, micro_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RIME_TUTORIAL_RUN", str(micro_run))
    monkeypatch.chdir(FOLDER)
    drawn: list[bool] = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(bool(plt.gcf().axes)) or plt.close("all"))
    runpy.run_path(str(script))
    assert drawn and all(drawn)
    assert capsys.readouterr().out.rstrip().endswith("run this cell again.")


def test_without_a_run_the_reader_learns_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIME_TUTORIAL_RUN", str(tmp_path))
    lesson = importlib.import_module("lesson")
    with pytest.raises(lesson.RimeError, match="make train-cma"):
        lesson.trained_run()


PAGE = """\
# %% [markdown]
# # A page
# %%
import sys

import matplotlib.pyplot as plt
from ipykernel.connect import get_connection_info
from rich.console import Console

print("seven", 3 + 4)
Console().print("eleven", 5 + 6)
print("bar" * 2, file=sys.stderr)
print("encrypted", "curve_secretkey" in get_connection_info(unpack=True))
plt.plot([1, 2])
plt.show()
"""


def test_a_page_holds_text_output_and_picture(tmp_path: Path) -> None:
    (tmp_path / "00_page.py").write_text(PAGE)
    runner = importlib.import_module("run")
    assert runner.tutorials(tmp_path) == [tmp_path / "00_page.py"]
    page = runner.write_page(runner.executed(tmp_path / "00_page.py"), "00_page", tmp_path / "out")
    text = page.read_text()
    assert "# A page" in text and "seven 7" in text and "barbar" not in text
    assert "eleven 11" in text and "<pre" not in text
    assert "encrypted True" in text, "other users of the machine could read what the kernel sends"
    (picture,) = [link for link in LINK.findall(text) if link.endswith(".png")]
    assert (page.parent / picture).read_bytes().startswith(b"\x89PNG")


def test_a_cell_that_fails_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "00_page.py").write_text("# %%\nraise ValueError('no')\n")
    runner = importlib.import_module("run")
    with pytest.raises(runner.CellExecutionError, match="no"):
        runner.executed(tmp_path / "00_page.py")
