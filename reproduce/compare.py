"""Does a run of `rime gpu-check` confirm what this repository claims about GPUs?

    python reproduce/compare.py reproduce/gpu-NAME.json

Each claim of expected_gpu.json is confirmed, refuted or not yet known: null there means that nobody has
measured the figure yet, and a claim whose figure the run lacks stays open. The exit code is 1 when a claim is
refuted, and 2 when the run is of another shape or device than the claims are about. Needs Python alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

EXPECTED = Path(__file__).with_name("expected_gpu.json")
Verdict = Literal["confirmed", "refuted", "not yet known"]
#: Rule of a claim -> its words.
RULES = {
    "is": "is {}",
    "finite": "finite",
    "within": "between -{0} and {0}",
    "at_most": "at most {}",
    "at_least": "at least {}",
}


def judge(claim: Mapping[str, Any] | None, seen: Any) -> Verdict:
    """One claim.

    Args:
        claim: One rule of ``RULES`` and its bound; None where no figure is known.
        seen: What the run measured; None where it did not.

    Example:
        >>> judge({"within": 0.15}, -0.1), judge({"at_most": 1.6}, 1.7), judge(None, 3.2)
        ('confirmed', 'refuted', 'not yet known')
    """
    if claim is None or seen is None:
        return "not yet known"
    [(rule, bound)] = claim.items()
    numbers = seen if isinstance(seen, list) else [seen]
    if rule == "is":
        holds = seen == bound
    elif not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        holds = False
    elif rule == "finite":
        holds = bool(numbers)
    elif rule == "within":
        holds = all(abs(number) <= bound for number in numbers)
    elif rule == "at_most":
        holds = all(number <= bound for number in numbers)
    elif rule == "at_least":
        holds = all(number >= bound for number in numbers)
    else:
        raise SystemExit(f"{EXPECTED.name}: no rule {rule!r}; there are {', '.join(RULES)}.")
    return "confirmed" if holds else "refuted"


def find(run: Mapping[str, Any], name: str) -> Any:
    """The figure of ``part.key``, or the part's ``status``; None where the run has none."""
    part, key = name.split(".")
    section = run["parts"].get(part)
    if section is None:
        return None
    return section["status"] if key == "status" else section["figures"].get(key)


def words(claim: Mapping[str, Any] | None) -> str:
    if claim is None:
        return "none, nobody has measured it"
    [(rule, bound)] = claim.items()
    return RULES[rule].format(json.dumps(bound))


def compare(expected: Mapping[str, Any], run: Mapping[str, Any]) -> list[tuple[str, Verdict, str, str]]:
    """Name, verdict, claim and figure, in the order of the claims."""
    rows = []
    for name, claim in expected["claims"].items():
        seen = find(run, name)
        shown = "not in this run" if seen is None else json.dumps(seen)
        rows.append((name, judge(claim, seen), words(claim), shown))
    return rows


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="what `rime gpu-check --json` wrote")
    args = parser.parse_args(arguments)
    expected, run = json.loads(EXPECTED.read_text()), json.loads(args.run.read_text())
    for name, value in expected["run"].items():
        seen = run["environment"].get(name)
        if seen != value:
            print(f"{args.run}: {name} is {seen}; {EXPECTED.name} is about {value}.", file=sys.stderr)
            return 2
    rows = compare(expected, run)
    width = max(len(name) for name, *_ in rows)
    for name, verdict, claim, shown in rows:
        print(f"{verdict:<13}  {name:<{width}}  seen: {shown}; claim: {claim}")
    for part, section in run["parts"].items():
        for problem in section["problems"]:
            print(f"problem        {part}: {problem}")
    counts = {v: sum(row[1] == v for row in rows) for v in ("confirmed", "refuted", "not yet known")}
    device = run["environment"]["device"]
    print(f"{device}: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return 1 if counts["refuted"] else 0


if __name__ == "__main__":
    sys.exit(main())
