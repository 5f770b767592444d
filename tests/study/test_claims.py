"""The page of the claims: verdicts follow from the numbers, and what was not run is said."""

import json
from pathlib import Path
from typing import Any

import pytest

from rime_pl.__main__ import main
from rime_pl.commands.claims import pooled, read_records
from rime_pl.errors import RimeError
from rime_pl.study.claims import claims_figure, claims_page, make_record, verdicts
from rime_pl.study.comparison import COMPARISONS
from tests.study.test_comparison import folder, result

NEEDED = [d for d in COMPARISONS["refine_rl"].differences if d.at_least is not None]


def refined(**bounds: tuple[float, float]) -> dict[str, Any]:
    """Two seeds of Refine-RL on a corpus, with the interval of some differences; the others hold."""
    found = result((0.5, 2.0), (0.6, 2.0), stage="refine_rl")
    for name, difference in found["differences"].items():
        difference["lower"], difference["upper"] = bounds.get(name, (0.01, 0.02))
    return make_record(found, "2026-01-01")


def test_the_page_says_what_does_not_hold_and_what_was_not_run() -> None:
    openmoji = refined(gen_minus_before=(-0.03, -0.01), gen_minus_seconds=(-0.01, 0.01))
    del openmoji["differences"]["gen_minus_shuffled"], openmoji["differences"]["gen_minus_ancestor"]
    page = claims_page({"refine_rl": {"openmoji": openmoji, "scenes": refined()}})
    assert f"| 3. Reinforcement learning of the rewrite | openmoji | 2 | {len(NEEDED) - 3} | 1 | 1 |" in page
    assert f"| 3. Reinforcement learning of the rewrite | scenes | 2 | {len(NEEDED)} | 0 | 0 |" in page
    assert "Does not hold: gen-gen after Refine-RL minus before." in page
    assert "Not run: gen-gen after Refine-RL minus with shuffled rewards; " in page
    assert "minus with the ancestor's reward." in page  # no part of the claim, and yet not hidden
    assert f"{len(NEEDED) - 3} of {len(NEEDED)} parts of the claim hold." in page
    assert page.count("The claim holds on this corpus") == 1  # scenes
    assert page.count("Not run.") == 2  # the two other claims
    assert "| 1. Rewrite, or steps of reasoning? | scenes | not run |" in page
    assert "All numbers, measured 2026-01-01" in page and "| Refine-RL |" in page


def test_a_bar_other_than_zero_decides() -> None:
    close = refined(disc_minus_before=(-0.019, 0.0))
    lost = refined(disc_minus_before=(-0.021, 0.0))
    label = "disc-disc after Refine-RL minus before"
    assert verdicts(close)[label] == "holds" and verdicts(lost)[label] == "not shown"


def test_the_figure_has_an_interval_for_each_corpus_and_a_dot_for_each_seed() -> None:
    axes = claims_figure({"openmoji": refined(), "scenes": refined()}).axes[0]
    lines = [line for line in axes.lines if line.get_linewidth() == 2.5]
    assert len(lines) == 2 * len(NEEDED)
    assert {tuple(line.get_xdata()) for line in lines} == {(0.01, 0.02)}
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert {tuple(line.get_xdata()) for line in dots} == {(0.01, 0.03)}


def compared(path: Path, seed: int, *controls: str) -> Path:
    """What `rime compare` leaves of one seed."""
    variants = {name: folder(path / name, [1, 2], seed=seed) for name in ("before", "decisive", *controls)}
    found = {"stage": "cma", "folders": [{name: str(run) for name, run in variants.items()}]}
    (path / "compare.json").write_text(json.dumps(found))
    return path


def test_seeds_are_pooled_over_the_controls_that_all_have(tmp_path: Path) -> None:
    folders = [compared(tmp_path / "1", 1, "control"), compared(tmp_path / "0", 0, "control", "plain")]
    found = pooled(folders)["cma"]["mine"]
    assert [run["decisive"]["seed"] for run in found["runs"]] == [0, 1]
    assert set(found["runs"][0]) == {"before", "decisive", "control"}
    assert found["differences"]["disc_minus_control"] == {"mean": 0, "lower": 0, "upper": 0, "seeds": [0, 0]}


def test_a_seed_given_twice_or_nothing_to_read_is_named(tmp_path: Path) -> None:
    folders = [compared(tmp_path / "one", 0), compared(tmp_path / "other", 0)]
    with pytest.raises(RimeError, match=r"other: seed 0 of cma on data/mine was given already"):
        pooled(folders)
    with pytest.raises(RimeError, match=r"--compared .*empty: no compare.json"):
        pooled([tmp_path / "empty"])


def test_runs_that_cannot_be_pooled_are_named(tmp_path: Path) -> None:
    first, second = compared(tmp_path / "0", 0), compared(tmp_path / "1", 1)
    manifest = tmp_path / "1" / "decisive" / "manifest.json"
    kept = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(kept | {"steps": 10}))
    with pytest.raises(RimeError, match=r"unlike numbers of steps .*0/decisive: 9, .*1/decisive: 10"):
        pooled([first, second])
    manifest.unlink()
    with pytest.raises(RimeError, match=r"1/decisive: no manifest.json here"):
        pooled([first, second])
    (second / "compare.json").write_text(json.dumps({"stage": "cma"}))
    with pytest.raises(RimeError, match=r"1: an older version wrote it; run `rime compare` again"):
        pooled([second])


def test_what_is_not_given_again_stays_on_the_page(tmp_path: Path) -> None:
    page, kept = tmp_path / "claims.md", tmp_path / "claims" / "refine_rl-scenes.json"
    kept.parent.mkdir()
    kept.write_text(json.dumps(refined(gen_minus_before=(-0.03, -0.01))))
    folders = [compared(tmp_path / str(seed), seed, "control") for seed in (0, 1)]
    command = ["claims", "--output", str(tmp_path), "--compared"]
    assert main([*command, str(folders[0])]) == 0
    assert "| 2. Alignment and the decisive term | mine | 1 |" in page.read_text()
    assert "Does not hold: gen-gen after Refine-RL minus before." in page.read_text()
    assert main([*command, *map(str, folders)]) == 0
    assert "| 2. Alignment and the decisive term | mine | 2 |" in page.read_text()
    assert (tmp_path / "claims-cma.png").is_file() and not (tmp_path / "claims-refine-rl.png").exists()
    assert list(read_records(tmp_path / "claims")) == ["cma", "refine_rl"]


def test_the_page_in_the_docs_is_what_its_records_say() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs" / "explanation"
    assert (docs / "claims.md").read_text() == claims_page(read_records(docs / "claims"))
