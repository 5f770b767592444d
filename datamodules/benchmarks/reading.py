"""Reads the tasks of a public benchmark from a local copy, one after the other.

Called by the command that evaluates a model on benchmarks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rime_pl.datamodules.benchmarks.mmeb_v2 import read_mmeb_v2
from rime_pl.datamodules.benchmarks.mmeb_v2_table import FIXED, mmeb_v2_table
from rime_pl.datamodules.benchmarks.mrmr import MRMR, read_mrmr
from rime_pl.datamodules.benchmarks.options import DEFAULT, ReadOptions
from rime_pl.datamodules.benchmarks.rows import MissingFilesError
from rime_pl.datamodules.benchmarks.task import UNUSABLE, BenchmarkTask, MissingTask
from rime_pl.datamodules.benchmarks.uvrb import read_uvrb, uvrb_table
from rime_pl.errors import DataError

#: The benchmarks that can be read.
BENCHMARKS = ("mmeb-v2", "mrmr", "uvrb")
_SHOWN = 5  # files and folders that an error names
#: Folders of MMEB-V2, one of which a copy must hold.
_MMEB_V2 = ("image-tasks", "video-tasks", "visdoc-tasks", "image-query", "MMEB_Test_Instruct")


def task_names(benchmark: str) -> list[str]:
    """Return the names of all tasks of a benchmark, in the order of the official report.

    Raises:
        DataError: If the benchmark is not known.
    """
    if benchmark == "mmeb-v2":
        return [FIXED.get(task.name, task.name) for task in mmeb_v2_table()]
    if benchmark == "mrmr":
        return [task.name for task in MRMR]
    if benchmark == "uvrb":
        return [task.name for task in uvrb_table()]
    raise DataError(f"The benchmark must be one of {', '.join(BENCHMARKS)}, but is {benchmark!r}.")


def read_tasks(
    benchmark: str,
    root: str | Path,
    names: Sequence[str] | None = None,
    options: ReadOptions = DEFAULT,
) -> Iterator[BenchmarkTask | MissingTask]:
    """Yield the tasks of a benchmark in the order of the official report, each read when it is asked for.

    A task whose files are missing or cannot be used is a :class:`MissingTask`: none is left out in silence.

    Args:
        benchmark: ``"mmeb-v2"``, ``"mrmr"`` or ``"uvrb"``.
        root: Folder of the local copy, in the official layout; docs/reference/benchmarks.md shows it.
        names: Tasks to read, by the keys of the report (default: all).
        options: How they are read.

    Raises:
        DataError: If benchmark, folder or a name is wrong.
    """
    folder = Path(root)
    known = task_names(benchmark)
    plain = {fixed: name for name, fixed in FIXED.items()} if benchmark == "mmeb-v2" else {}
    wanted = known if names is None else [FIXED.get(name, name) if plain else name for name in names]
    if unknown := [name for name in wanted if name not in known]:
        raise DataError(f"Tasks of {benchmark} must be among {known}, but {unknown} are not.")
    if not folder.is_dir():
        raise DataError(f"The folder of {benchmark} must hold a local copy, but there is none: {folder}.")
    _refuse_another_folder(benchmark, folder)
    return _each(benchmark, folder, [name for name in known if name in wanted], options)


def _refuse_another_folder(benchmark: str, folder: Path) -> None:
    """Raise one DataError if nothing of a benchmark is in a folder, instead of a line for each task."""
    others = {"mrmr": ("MRMRbenchmark", *task_names("mrmr")), "uvrb": ("UVRB", *task_names("uvrb"))}
    parts = others.get(benchmark, _MMEB_V2)
    if not any((folder / name).is_dir() for name in parts):
        there = sorted(one.name for one in folder.iterdir())
        raise DataError(
            f"The folder of {benchmark} must hold one of {', '.join(parts)}, but {folder} holds "
            f"{', '.join(there[:_SHOWN]) or 'nothing'}{' and more' if len(there) > _SHOWN else ''}."
        )


def _each(
    benchmark: str, root: Path, names: Sequence[str], options: ReadOptions
) -> Iterator[BenchmarkTask | MissingTask]:
    for name in names:
        try:
            task = read_task(benchmark, root, name, options)
        except DataError as error:
            yield _missing(benchmark, name, error)
        else:
            yield task


def read_task(benchmark: str, root: str | Path, name: str, options: ReadOptions = DEFAULT) -> BenchmarkTask:
    """Return one task of a benchmark.

    Args:
        benchmark: See :func:`read_tasks`.
        root: See :func:`read_tasks`.
        name: Key of the task in the official report.
        options: How it is read.

    Raises:
        MissingFilesError: If files are missing. Its ``code`` is what the official report holds then.
        DataError: If the name is not known, or the files cannot be used.
    """
    root = Path(root)
    if name not in task_names(benchmark):
        raise DataError(f"A task of {benchmark} must be among {task_names(benchmark)}, but is {name!r}.")
    if benchmark == "mmeb-v2":
        task = read_mmeb_v2(
            next(one for one in mmeb_v2_table() if FIXED.get(one.name, one.name) == name), root, options
        )
    elif benchmark == "mrmr":
        task = read_mrmr(next(one for one in MRMR if one.name == name), root, options)
    else:
        task = read_uvrb(next(one for one in uvrb_table() if one.name == name), root, options)
    if not len(task.queries):
        raise DataError(f"{name}: its files must have rows, but have none.")
    return task


def _missing(benchmark: str, name: str, error: DataError) -> MissingTask:
    told = (error.code if isinstance(error, MissingFilesError) else UNUSABLE, str(error))
    if benchmark == "mmeb-v2":
        one = next(one for one in mmeb_v2_table() if FIXED.get(one.name, one.name) == name)
        return MissingTask(benchmark, name, one.modality, one.group, *told)
    if benchmark == "mrmr":
        group = next(one.group for one in MRMR if one.name == name)
        return MissingTask(benchmark, name, "mrmr", group, *told)
    group = next(one.group for one in uvrb_table() if one.name == name)
    return MissingTask(benchmark, name, "video", group, *told)
