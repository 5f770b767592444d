"""The leaderboard on a repository of a few lines: what counts, what is kept, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import leaderboard
from rime_pl.errors import RimeError

#: A `rime run` whose base model is shared by all seeds, and that fails once where a file says so.
MAIN = """
import json, pathlib, sys
part, seed = sys.argv[2], sys.argv[6]
place = pathlib.Path({"data": "data", "base": "models"}.get(part, f"runs/openmoji-tiny-seed{seed}/{part}"))
assert part in ("data", "base") or not place.exists(), "goes on from a half part"
print(f"{part}: {'found in' if place.exists() else 'making'} {place}")
place.mkdir(parents=True, exist_ok=True)
fail = pathlib.Path(f"fail-{part}-{seed}")
if fail.exists():
    fail.unlink()
    sys.exit(3)
recalls = [0.75 + 0.05 * int(seed), 0.7, 0.9, 0.85]
after = {"recall@1": dict(zip(["disc-disc", "gen-gen", "gen-disc", "disc-gen"], recalls))}
(place / "summary.json").write_text(json.dumps({"after": after, "seconds": {"fit": 1.0, "test": 0.006}}))
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """With one commit, as benchmarks.leaderboard clones it."""
    place = tmp_path / "source"
    (place / "rime_pl").mkdir(parents=True)
    (place / "rime_pl" / "__init__.py").touch()
    (place / "rime_pl" / "__main__.py").write_text(MAIN)
    name = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for words in (["init", "-q"], ["add", "."], [*name, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(place), *words], check=True)
    return place


def words(repository: Path, folder: Path, *more: str) -> list[str]:
    output = repository.parent / "results"
    output.mkdir(exist_ok=True)
    return ["HEAD", str(folder), "--source", str(repository), "--output", str(output), *more]


def test_a_stopped_call_goes_on_and_half_a_part_is_measured_anew(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "measured"
    leaderboard.clone("HEAD", folder / "tree", str(repository))
    (folder / "tree" / "fail-cma-1").touch()
    with pytest.raises(RimeError, match=r"`rime run cma --seed 1` in .*tree failed"):
        leaderboard.main(words(repository, folder))
    kept = json.loads((folder / "times.json").read_text())
    assert "seed 1 sft" in kept and "seed 1 cma" not in kept
    kept["seed 0 base"] |= {"wall": 120.0, "cpu": 180.0}
    kept["seed 0 sft"] |= {"wall": 60.006}
    (folder / "times.json").write_text(json.dumps(kept))
    assert leaderboard.main(words(repository, folder, "--what", "nothing yet")) == 0
    [row] = leaderboard.read_rows(tmp_path / "results" / "leaderboard.jsonl")
    assert row["recall@1 of each seed"] == [0.8, 0.8125, 0.825] and row["recall@1"] == 0.8125
    assert row["minutes"]["base"] == 2.0  # all seeds share what seed 0 made: it counts for each
    assert row["minutes"]["sft"] >= 0.33 and row["cpu_minutes"] >= 3.0
    text = (tmp_path / "results" / "leaderboard.md").read_text()
    assert (
        f"| `{row['commit']}` | " in text and "0.812 (0.80-0.82, 3 seeds)" in text and "nothing yet" in text
    )
    assert leaderboard.main(words(repository, folder, "--what", "again")) == 0
    assert len(leaderboard.read_rows(tmp_path / "results" / "leaderboard.jsonl")) == 1  # one row a commit


def test_less_than_needed_or_fewer_seeds_have_no_number(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "measured"
    assert leaderboard.main(words(repository, folder, "--seeds", "0", "1")) == 0
    assert "| not reached |" in (tmp_path / "results" / "leaderboard.md").read_text()
    [row] = leaderboard.read_rows(tmp_path / "results" / "leaderboard.jsonl")
    three = row | {"seeds": [0, 1, 2], "recall@1": 0.8}
    assert "not reached" not in leaderboard.page([three])
    missed = three | {"recall@1": 0.7999, "commit": "too_low"}
    assert "not reached" in leaderboard.page([missed])
    slow = three | {"minutes": dict.fromkeys(three["minutes"], 9000.0), "commit": "slow"}
    page = leaderboard.page([missed, slow, three])
    places = [page.index(f"`{commit}`") for commit in (three["commit"], "slow", "too_low")]
    assert places == sorted(places), "the fastest first, those without a number last"


def test_other_code_or_another_commit_is_refused(repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "measured"
    leaderboard.clone("HEAD", folder / "tree", str(repository))
    with pytest.raises(RimeError, match=r"must import rime_pl from .*other, but imports .*tree/rime_pl"):
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "rime_pl").symlink_to(folder / "tree" / "rime_pl")
        leaderboard.check_python(sys.executable, tmp_path / "other")
    (folder / "times.json").write_text(json.dumps({"commit": {"hash": "1234567"}}))
    with pytest.raises(RimeError, match=r"measured must be of commit \w{7}, but is of 1234567"):
        leaderboard.main(words(repository, folder))
    with pytest.raises(RimeError, match=r"checkout --quiet --detach none` failed"):
        leaderboard.clone("none", folder / "tree", str(repository))


def test_the_page_in_the_docs_is_what_its_rows_say() -> None:
    rows = leaderboard.read_rows(leaderboard.RESULTS / "leaderboard.jsonl")
    assert (leaderboard.RESULTS / "leaderboard.md").read_text() == leaderboard.page(rows)
