"""Tiny copies of the document tasks of MMEB-V2, of MRMR and of UVRB, and what a reader must make of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tests.datamodules.benchmarks.official_copies import (
    Expected,
    Name,
    Shown,
    colour,
    fact,
    facts,
    picture,
    save,
    write_lines,
    write_parquet,
)
from tests.datamodules.benchmarks.official_videos import frames

ASK = "Find a document image that matches the given query:"
PAGE = "Understand the content of the provided document image."
GRADED = ("ViDoRe_esg_reports_human_labeled_v2", "ViDoSeek-doc", "MMLongBench-doc")
KEYS = {"ViDoSeek-page": "ViDoSeek-page-fixed", "MMLongBench-page": "MMLongBench-page-fixed"}


def write_document_task(root: Path, name: str, dumped: bool = False, folder: str = "") -> Expected:
    """Write the three tables of a document task.

    Args:
        root: Folder of the copy.
        name: The task.
        dumped: Whether pages are files, and the corpus has no column ``image``.
        folder: Of the tables, if not the official one.
    """
    about = fact("documents", name)
    expected = Expected(KEYS.get(name, name), f"D-{about['group']}", "visdoc", "ndcg_linear@5")
    texts = about["parser"] == "visrag"  # ids are file names there, and numbers elsewhere
    ids: list[Name] = [f"{'long name ' * 8}{n}.v.png" if texts else 10 * n for n in range(5)]
    asked: list[Name] = [f"q{n}" if texts else n for n in range(3)]
    tables = root / "visdoc-tasks/data" / (folder or about["data"])
    file = f"{about['split']}-00000-of-00001.parquet"
    corpus = []
    for number, one in enumerate(ids):
        row: dict[str, Any] = {"corpus-id": one}
        shown = f"page: {colour(number)}"
        if dumped:
            path = f"visdoc-tasks/images/{about['images']}/{_file(one)}"
            save(root / path, number)
            shown = f"page: {path}"
        else:
            row["image"] = {"bytes": picture(number), "path": None}
        corpus.append(row)
        expected.candidates[one] = Shown(f" {PAGE}", PAGE, "", (shown,))
    write_parquet(tables / "corpus" / file, corpus)
    write_parquet(
        tables / "queries" / file,
        [{"query-id": one, "query": f"total of {one}?", "language": "french"} for one in asked],
    )
    qrels = []
    for number, one in enumerate(asked):
        expected.queries.append(Shown(f"{ASK} total of {one}?", ASK, f"total of {one}?"))
        right = {ids[number + 1]: 3.0}
        if name in GRADED:
            right = {ids[number]: 2.0, ids[number + 1]: 3.0}
        expected.labels.append(right)
        qrels += [{"query-id": one, "corpus-id": page, "score": int(score)} for page, score in right.items()]
        qrels.append({"query-id": one, "corpus-id": ids[4], "score": 0})  # 0 means not relevant
        qrels.append({"query-id": one, "corpus-id": ids[number + 1], "score": 1})  # the higher score counts
    write_parquet(tables / "qrels" / file, qrels)
    return expected


def _file(name: Name) -> str:
    if isinstance(name, int):
        return f"{name}.png"
    digest = hashlib.md5(name.encode("utf-8")).hexdigest()
    return f"{name.removesuffix('.png')[:50]}_{digest[:8]}.png"


# -- MRMR -------------------------------------------------------------------------------------------------

_KINDS = ("text", "image", "image,text")
_LARGE = (2400, 1200)


def write_mrmr_task(root: Path, name: str) -> Expected:
    """Write a data set of MRMR: texts, pictures and both, one picture larger than 2,000 pixels."""
    about = fact("mrmr", name)
    metric = "hit@1" if about["metric"].startswith("hit@1") else "ndcg_linear@10"
    group = name if name in ("knowledge", "theorem") else "contradiction"
    expected = Expected(name, group, "mrmr", metric)
    query, document, score = about["qrels"].split(", ")
    sizes = {"knowledge": (2000, 1000), "theorem": (2000, 1000)}
    large = sizes.get(name, _LARGE)
    asked, corpus, qrels = [], [], []
    subjects = {
        "knowledge": ["Art_Theory", "Biology", "Design"],
        "theorem": ["Math", "Energy_and_Power", "Finance"],
    }
    means = {"knowledge": ["Art", "Science", "Art"], "theorem": ["Math", "Physics", "Business"]}
    for number, kind in enumerate(_KINDS):
        text = f"case {number} <image>" if "text" in kind else None
        shown = (f"picture: {colour(number)} (12, 8)",) if "image" in kind else ()
        asked.append(
            {
                **{"id": f"q{number}", "modality": kind, "text": text},
                "image": {"bytes": picture(number), "path": None} if "image" in kind else None,
                "image 1": {"bytes": b"never read", "path": None},
                **({"category": subjects[name][number]} if name in subjects else {}),
            }
        )
        said = about["query"] + (f" {text}" if text else "")
        expected.queries.append(Shown(said, about["query"], text or "", shown))
        expected.categories = means.get(name, [])
        right = f"q{number}_1" if name == "negation" else f"d{number}"
        expected.labels.append({right: 1.0})
        qrels.append({query: f"q{number}", document: right, score: 1})
    names = [f"d{n}" for n in range(4)]
    if name == "negation":
        names = [f"q{n}_{k}" for n in range(3) for k in (2, 1, 3, 4)]
        expected.pools = [[f"q{n}_{k}" for k in (1, 2, 3, 4)] for n in range(3)]
    for number, one in enumerate(names):
        kind = "text" if name == "negation" else _KINDS[number % 3]
        size = _LARGE if number == 1 else (12, 8)
        text = f"rule {one} " if "text" in kind else ""
        at = large if number == 1 else size
        shown = (f"picture: {colour(number)} {at}",) if "image" in kind else ()
        expected.candidates[one] = Shown(text, "", text, shown)
        corpus.append(
            {
                **{"id": one, "modality": kind, "text": text or None},
                "image": {"bytes": picture(number, size), "path": None} if "image" in kind else None,
                "vision": {"bytes": picture(number + 50), "path": None},
            }
        )
    for table, rows in (("query", asked), ("corpus", corpus), ("qrels", qrels)):
        write_parquet(root / name / table / "test-00000-of-00001.parquet", rows)
    return expected


# -- UVRB -------------------------------------------------------------------------------------------------


def write_uvrb_task(root: Path, name: str) -> Expected:
    """Write a data set of UVRB; texts, and a picture or a clip where the queries have one."""
    about = next(row for row in facts("uvrb") if row["task"] == name)
    metric = {"R@1": "hit@1", "R@10": "hit@10", "P@1": "precision@1"}[about["metric"]]
    expected = Expected(name, about["ability"], "video", metric)
    folder = f"{name}/UVRB/{name}"
    ids = [f"c{n}" for n in range(12 if name.startswith("MS-") else 4)]
    corpus = []
    for number, one in enumerate(ids):
        inner = "part/" if name.startswith("VDC") else ""
        corpus.append({"id": one, "video": f"{inner}v{number}.mp4"})
        media = frames(root, f"{folder}/videos_frames/{inner}v{number}", 7 + number)
        expected.candidates[one] = Shown("", "", "", media)
    queries, instances = [], []
    if name.startswith("MS-"):
        expected.pools = []
    for number in range(3):
        row: dict[str, Any] = {"id": f"q{number}", "text": f"words {number}"}
        text, media = f"words {number}", ()
        if name in ("MSRVTT-I2V", "MS-TI"):
            row |= {"image": f"{number}.png", "video": "ignored.mp4"}
            save(root / folder / "images" / f"{number}.png")
            media = (f"{folder}/images/{number}.png",)
        elif name in ("LoVR-C2V", "MS-TV"):
            row |= {"video": f"clip{number}.mp4", "image": ""}
            media = frames(root, f"{folder}/videos_frames/clip{number}", 8)
        if name in ("MSRVTT-I2V", "LoVR-C2V"):
            text = row["text"] = ""
        queries.append(row)
        said = f"{about['query']} {text}" if text else about["query"]
        expected.queries.append(Shown(said, about["query"], text, media))
        right = [ids[number], ids[number + 1]] if number == 1 else [ids[number]]
        instances += [{"qid": f"q{number}", "pos": [one]} for one in right]
        instances.append({"qid": f"q{number}", "pos": []})
        if expected.pools is not None:
            wrong = [one for one in ids if one not in right][: 10 - len(right)]
            for one in instances:
                if one["qid"] == f"q{number}":
                    one["neg"] = wrong
            expected.pools.append([*right, *wrong])
        expected.labels.append(dict.fromkeys(right, 1.0))
    queries.append({"id": "unused", "text": "has no right clip"})
    for table, rows in (("queries", queries), ("corpus", corpus), ("instances", instances)):
        write_lines(root / folder / "jsonl" / f"{table}.jsonl", rows)
    return expected
