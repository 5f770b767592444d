"""The page of the claims: verdicts follow from the results, and what was not run is said."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rime_pl.__main__ import main
from rime_pl.errors import RimeError
from rime_pl.study.comparison import claims_figure, claims_page, differences_table, read_records
from rime_pl.study.design import COMPARISONS
from rime_pl.study.measure import seed_result
from rime_pl.study.record import _join, pool, record_of
from tests.study.runs import record, run_folder

SHOWN = COMPARISONS["refine_rl"].differences
NEEDED = [d for d in SHOWN if d.at_least is not None]
GAIN, SAME_TIME, SHUFFLED = (SHOWN[place].key for place in (0, 3, 4))
TEMPLATE = "Overview\n\n$overview\n\n$sft\n\n$cma\n\n$refine_rl\n"


def refined(corpus: str = "scenes", **bounds: tuple[float, float]) -> dict[str, Any]:
    """A record of Refine-RL with the interval of some differences, by their place; the others hold."""
    found = record("refine_rl", 0.5, 0.6, corpus=corpus)
    for place, d in enumerate(SHOWN):
        found["differences"][d.key]["lower"], found["differences"][d.key]["upper"] = bounds.get(
            f"d{place}", (0.01, 0.02)
        )
    return found


def records(*found: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        stage: {one["corpus"]: one for one in found if one["stage"] == stage}
        for stage in ("sft", "cma", "refine_rl")
    }


def test_the_page_says_what_does_not_hold_and_what_was_not_run() -> None:
    openmoji = refined("openmoji", d0=(-0.03, -0.01), d3=(-0.01, 0.01))
    del openmoji["differences"][SHUFFLED], openmoji["differences"][SHOWN[8].key]
    page = claims_page(TEMPLATE, records(openmoji, refined()))
    assert f"| 3. Refine-RL | openmoji | 2 | {len(NEEDED) - 3} | 1 | 1 |" in page
    assert f"| 3. Refine-RL | scenes | 2 | {len(NEEDED)} | 0 | 0 |" in page
    assert "Does not hold: gen-gen: Refine-RL - CMA (before)." in page
    assert "Not run: gen-gen: Refine-RL - RL with shuffled rewards; " in page
    assert "Refine-RL - RL with the reward of UME-R1." in page  # no part of the claim, and yet not hidden
    assert f"{len(NEEDED) - 3} of {len(NEEDED)} parts of the claim hold." in page
    assert page.count("All parts of the claim hold.") == 1  # scenes
    assert page.count("Not run.") == 2  # the two other claims
    assert "| 1. SFT | scenes | not run |" in page
    assert "All results, measured 2026-01-01" in page and "| Refine-RL | 7 |" in page


def test_a_bar_other_than_zero_decides() -> None:
    label = "disc-disc: Refine-RL - CMA (before)"
    close = differences_table(refined(d9=(-0.019, 0.0))).rows[-1]
    lost = differences_table(refined(d9=(-0.021, 0.0))).rows[-1]
    assert (close[0], close[-1]) == (label, "holds") and (lost[0], lost[-1]) == (label, "not shown")


def test_the_figure_has_an_interval_for_each_corpus_and_a_dot_for_each_seed() -> None:
    axes = claims_figure({"openmoji": refined(), "scenes": refined()}).axes[0]
    lines = [line for line in axes.lines if line.get_linewidth() == 2.5]
    assert len(lines) == 2 * len(NEEDED)
    assert {tuple(line.get_xdata()) for line in lines} == {(0.01, 0.02)}
    dots = [line for line in axes.lines if line.get_marker() == "."]
    assert {tuple(line.get_xdata()) for line in dots} == {(0.01, 0.03)}


def compared(path: Path, seed: int, *controls: str, ranks: Sequence[int] = (1, 2), **facts: Any) -> Path:
    """What `rime compare` leaves of one seed."""
    runs = {name: run_folder(path / name, [*ranks], seed=seed) for name in ("before", "cma", *controls)}
    (path / "compare.json").write_text(json.dumps(record_of([seed_result("cma", runs) | facts])))
    return path


def test_seeds_are_pooled_over_the_controls_that_all_have(tmp_path: Path) -> None:
    folders = [
        compared(tmp_path / "1", 1, "further_sft"),
        compared(tmp_path / "0", 0, "further_sft", "without_decisive"),
    ]
    [found], _ = pool(folders)
    assert (found["stage"], found["corpus"], found["seeds"]) == ("cma", "mine", [0, 1])
    assert set(found["variants"]) == {"before", "cma", "further_sft"}
    same = found["differences"]["cma disc-disc - further_sft disc-disc"]
    assert same == {"mean": 0, "lower": 0, "upper": 0, "seeds": [0, 0]}


def test_a_seed_given_twice_or_nothing_to_read_is_named(tmp_path: Path) -> None:
    folders = [compared(tmp_path / "one", 0), compared(tmp_path / "other", 0, ranks=(2, 2))]
    with pytest.raises(RimeError, match=r"each seed once, but .*other holds seed 0 of cma on mine"):
        pool(folders)
    assert len(pool([folders[0], folders[0]])[0]) == 1  # the same run twice is no contradiction
    with pytest.raises(RimeError, match=r"--compared must name folders .* but .*empty has none"):
        pool([tmp_path / "empty"])
    (folders[0] / "compare.json").write_text(json.dumps({"stage": "cma"}))
    with pytest.raises(RimeError, match=r"with a compare.json of this version, but .*one has none"):
        pool([folders[0]])


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"data_hash": "of another"}, "another corpus"),
        ({"data_hash": None}, "another corpus"),
        (
            {"recipes": {"base": "of another", "cma": "of another"}, "queries": "others"},
            "other test queries or candidates, another kind of base model, other settings of cma",
        ),
        ({"tuned": {"rewrite": {}, "chain_of_thought": {}}}, "other weights of `rime tune`"),
    ],
)
def test_seeds_that_were_not_trained_alike_are_not_pooled(
    tmp_path: Path, facts: dict[str, Any], named: str
) -> None:
    folders = [compared(tmp_path / "0", 0), compared(tmp_path / "1", 1, **facts)]
    with pytest.raises(
        RimeError, match=f"seed 1 of cma on mine cannot be averaged with seed 0: it has {named}"
    ):
        pool(folders)
    # of an earlier record it is left out, and told
    kept = json.loads((folders[1] / "compare.json").read_text())
    [found], told = pool(folders[:1], [kept])
    assert found["seeds"] == [0] and told == [f"cma on mine: kept seed 1, which has {named}"]


def test_a_seed_measured_elsewhere_joins_those_of_the_record(tmp_path: Path) -> None:
    folders = [
        compared(tmp_path / str(seed), seed, base_model=f"{seed}", annotated_seed=seed) for seed in (0, 1, 2)
    ]
    [kept], _ = pool(folders[:2])
    [joined], told = pool(folders[2:], [kept, refined()])
    [at_once], _ = pool(folders)
    assert joined == at_once and joined["seeds"] == [0, 1, 2] and told == []
    assert joined["base_models"] == 3 and joined["annotated_seeds"] == [0, 1, 2]
    # given anew, a seed takes the place of the kept one; what the others lack is left out and told
    [again], told = pool([compared(tmp_path / "again", 1, "further_sft")], [joined])
    assert again["seeds"] == [0, 1, 2] and "further_sft" in again["of_seeds"][1]["variants"]
    assert "further_sft" not in again["variants"] and again["lacking"] == {"further_sft": [0, 2]}
    assert told == ["cma on mine: further_sft, which not all seeds have (not seed 0, 2)"]


def test_a_seed_without_the_curves_or_columns_of_another_takes_none_of_its_own_away(tmp_path: Path) -> None:
    [one], [other] = (
        json.loads((compared(tmp_path / str(seed), seed) / "compare.json").read_text())["of_seeds"]
        for seed in (0, 1)
    )
    one["variants"]["cma"]["curves"] = {"kl": 1.0}
    del other["hits"]["cma"]["trace/empty"]
    found = record_of([one, other])
    assert found["variants"]["cma"]["curves"] == {}
    assert "cma gen-gen - cma trace/empty" not in found["differences"]
    assert "cma gen-gen - cma disc-disc" in found["differences"]


def test_the_same_run_compared_on_two_days_is_one_seed(tmp_path: Path) -> None:
    folders = [compared(tmp_path / name, 0) for name in ("one", "other")]
    record = json.loads((folders[0] / "compare.json").read_text())
    record["of_seeds"][0] |= {"date": "2999-01-01", "adaptive": {"share": 0.5}}
    (folders[1] / "compare.json").write_text(json.dumps(record))
    [found], _ = pool(folders)
    assert found["seeds"] == [0] and found["date"] == "2999-01-01"


def test_a_record_of_an_earlier_version_gives_way_and_is_named() -> None:
    kept = refined()
    new = record("refine_rl", 0.5)
    of_seed = {"stage": "refine_rl", "corpus": "scenes", "seed": 1, "hits": {}, "variants": {}}
    seeds = {1: of_seed}
    assert new["seeds"] == [0] and "of_seeds" not in kept
    assert _join(seeds, kept) == [
        "refine_rl on scenes: kept seed 0; an earlier version did not keep its results"
    ]
    assert list(seeds) == [1]


def test_seconds_are_those_of_one_machine(tmp_path: Path) -> None:
    folders = [
        compared(tmp_path / str(seed), seed, machine=["fast" if seed else "slow", 1]) for seed in range(3)
    ]
    for folder in folders:
        compare = json.loads((folder / "compare.json").read_text())
        seed = compare["of_seeds"][0]
        seed["variants"]["cma"]["seconds_per_step"] = {0: 0.1, 1: 3.0, 2: 2.0}[seed["seed"]]
        (folder / "compare.json").write_text(json.dumps(compare))
    [found], _ = pool(folders)
    assert found["variants"]["cma"]["seconds_per_step"] == 2.0


def test_a_number_of_steps_that_follows_from_the_time_may_differ(tmp_path: Path) -> None:
    def trained_for(steps: int, seed: int) -> dict[str, Any]:
        one = seed_result("cma", {"cma": run_folder(tmp_path / str(seed), [1], seed=seed)})
        one["variants"]["further_cma_same_seconds"] = one["variants"]["cma"] | {"steps": steps}
        return one | {"stage": "refine_rl"}

    found = record_of(trained_for(9 + seed, seed) for seed in (0, 1))
    assert found["variants"]["further_cma_same_seconds"]["steps"] == "9-10"


def test_the_command_lets_a_seed_join_and_names_the_one_that_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "claims.template.md").write_text(TEMPLATE)
    command = ["claims", "--output", str(tmp_path), "--compared"]
    assert main([*command, str(compared(tmp_path / "0", 0))]) == 0
    assert main([*command, str(compared(tmp_path / "1", 1))]) == 0
    assert "| 2. CMA | mine | 2 |" in (tmp_path / "claims.md").read_text()
    capsys.readouterr()
    assert main([*command, str(compared(tmp_path / "2", 2, data_hash="of another"))]) == 0
    assert "| 2. CMA | mine | 1 |" in (tmp_path / "claims.md").read_text()
    told = " ".join(capsys.readouterr().out.split())
    assert "left out: cma on mine: kept seed 0, which has another corpus" in told
    (tmp_path / "claims" / "cma-mine.json").write_text("<<<<<<< ours")
    assert main([*command, str(tmp_path / "2")]) == 2  # two machines wrote it: named, and not a traceback
    assert "cma-mine.json is damaged" in " ".join(capsys.readouterr().err.split())


def test_what_is_not_given_again_stays_on_the_page(tmp_path: Path) -> None:
    page, kept = tmp_path / "claims.md", tmp_path / "claims" / "refine_rl-scenes.json"
    kept.parent.mkdir()
    kept.write_text(json.dumps(refined(d0=(-0.03, -0.01))))
    folders = [compared(tmp_path / str(seed), seed, "further_sft") for seed in (0, 1)]
    command = ["claims", "--output", str(tmp_path), "--compared"]
    assert main([*command, str(folders[0])]) == 2  # no template
    (tmp_path / "claims.template.md").write_text(TEMPLATE)
    assert main([*command, str(folders[0])]) == 0
    assert "| 2. CMA | mine | 1 |" in page.read_text()
    assert "Does not hold: gen-gen: Refine-RL - CMA (before)." in page.read_text()
    assert main([*command, *map(str, folders)]) == 0
    assert "| 2. CMA | mine | 2 |" in page.read_text()
    assert (tmp_path / "claims-cma-mine.png").is_file() and (tmp_path / "claims-refine-rl.png").is_file()
    assert not (tmp_path / "claims-sft.png").exists()
    assert [stage for stage, found in read_records(tmp_path / "claims").items() if found] == [
        "cma",
        "refine_rl",
    ]


def test_the_page_in_the_docs_is_what_its_records_say() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs" / "results"
    template = (docs / "claims.template.md").read_text()
    assert (docs / "claims.md").read_text() == claims_page(template, read_records(docs / "claims"))


def test_the_records_in_the_docs_have_the_names_of_today() -> None:
    """A control that is newer than a record is missing there, and the page says that it was not run."""
    docs = Path(__file__).resolve().parents[2] / "docs" / "results"
    found, page = read_records(docs / "claims"), (docs / "claims.md").read_text()
    for stage, shown in COMPARISONS.items():
        for one in found[stage].values():
            assert list(one["variants"]) == [name for name in shown.variants if name in one["variants"]]
            keys = [d.key for d in shown.differences]
            assert list(one["differences"]) == [key for key in keys if key in one["differences"]]
            for d in shown.differences:
                measured = {d.first, d.second} <= set(one["variants"])
                assert measured == (d.key in one["differences"])
                assert measured or shown.label(d) in page


def test_a_page_says_what_the_seeds_of_each_record_vary() -> None:
    def page(**facts: Any) -> str:
        return claims_page(TEMPLATE, records(refined() | facts))

    assert "These runs have 1 base model for 2 seeds and the same annotated pairs" in page()
    assert "Each seed has its own base model." in page(base_models=2, annotated_seeds=[0, 1])
    assert "These runs have the same annotated pairs for several seeds." in page(base_models=2)
