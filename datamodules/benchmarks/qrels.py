"""Reads tables that say which documents are relevant for which query, and how much.

Called by the readers of documents of MMEB-V2 and of MRMR.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rime_pl.datamodules.benchmarks.rows import open_rows, rows_of
from rime_pl.datamodules.benchmarks.task import Name
from rime_pl.datamodules.builders.sources.parquet_files import ParquetFile
from rime_pl.errors import DataError

_SHOWN = 3  # faults that an error names


def read_qrels(
    root: Path,
    paths: Sequence[Path],
    query: Sequence[str],
    document: Sequence[str],
    as_text: bool = False,
) -> dict[Name, dict[Name, float]]:
    """Return the grades of the documents of each query, in the order of the files.

    Scores of 0 and less do not count. Of two scores of one document, the higher counts.

    Args:
        root: Folder of the benchmark.
        paths: Parquet files with the column ``score``.
        query: Spellings of the column with the id of the query.
        document: Spellings of the column with the id of the document.
        as_text: Whether ids that are numbers become texts.

    Raises:
        DataError: If a column is missing, or a row cannot be used.
    """
    there = ParquetFile(paths[0], paths[0].relative_to(root).as_posix()).columns
    asked = next((name for name in query if name in there), query[0])
    found = next((name for name in document if name in there), document[0])
    grades: dict[Name, dict[Name, float]] = {}
    for _, row in rows_of(open_rows(root, paths, (asked, found, "score"))):
        score = row.grade("score")
        if score > 0:
            of, name = row.name(asked), row.name(found)
            of, name = (str(of), str(name)) if as_text else (of, name)
            of_query = grades.setdefault(of, {})
            of_query[name] = max(score, of_query.get(name, 0.0))
    return grades


def labels_of(
    task: str,
    queries: Sequence[Name],
    places: Mapping[Name, int],
    grades: Mapping[Name, Mapping[Name, float]],
) -> tuple[list[dict[int, float]], list[str]]:
    """Return the labels of each query, and what is left over.

    Args:
        task: What an error calls the task.
        queries: Ids of the queries.
        places: Place of each document.
        grades: From :func:`read_qrels`.

    Raises:
        DataError: If a query has no label, or a label is not in the corpus.
    """
    if without := [name for name in queries if name not in grades]:
        raise DataError(
            f"{task}: each query must have a document with a score above 0, but {len(without):,} of "
            f"{len(queries):,} have none. The first: {without[:_SHOWN]}. A number and a text are different "
            "ids."
        )
    unknown = [name for query in queries for name in grades[query] if name not in places]
    if unknown:
        raise DataError(
            f"{task}: each document of qrels must be in the corpus, but {len(unknown):,} are not. The first: "
            f"{unknown[:_SHOWN]}. A number and a text are different ids."
        )
    labels = [{places[name]: grade for name, grade in grades[query].items()} for query in queries]
    left = len(grades.keys() - set(queries))
    return labels, [*repeated(queries), *([f"qrels name {left:,} queries that do not exist"] if left else [])]


def repeated(queries: Sequence[Name]) -> list[str]:
    """Return in words how many queries have an id that another one before has; each counts.

    >>> repeated(["a", "b", "a"]), repeated(["a", "b"])
    (['1 queries repeat an id, and count'], [])
    """
    more = len(queries) - len(set(queries))
    return [f"{more:,} queries repeat an id, and count"] if more else []
