"""Reads the five tasks of MMEB-V2 that ask about a video: which answer of the row is right?

Called by mmeb_v2.py. Each data set writes options and answers in its own way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rime_pl.datamodules.benchmarks.items import Candidates
from rime_pl.datamodules.benchmarks.mmeb_v2_table import counted
from rime_pl.datamodules.benchmarks.mmeb_v2_videos import ClipWords, VideoTask
from rime_pl.datamodules.benchmarks.rows import Row
from rime_pl.datamodules.benchmarks.task import BenchmarkTask
from rime_pl.errors import DataError

#: Parts of MVBench, in the official order; 200 rows each.
MVBENCH_SUBSETS = (
    *("episodic_reasoning", "action_sequence", "action_prediction", "action_antonym"),
    *("fine_grained_action", "unexpected_action", "object_existence", "object_interaction"),
    *("object_shuffle", "moving_direction", "action_localization", "scene_transition", "action_count"),
    *("moving_count", "moving_attribute", "state_change", "fine_grained_pose", "character_order"),
    *("egocentric_navigation", "counterfactual_inference"),
)
_YES_NO = ("yes", "no")


@dataclass(frozen=True)
class _Question:
    """A row, as its data set means it."""

    text: str  # behind the prompt
    folder: str  # of the frames
    names: Sequence[str]  # of the candidates
    contents: Sequence[str]  # what is embedded of each
    right: int  # which one is right
    info: dict[str, Any] = field(default_factory=dict)
    odd: int = 0  # options without a letter


def read_questions(video: VideoTask) -> BenchmarkTask:
    """Return a task of questions about videos.

    Raises:
        MissingFilesError: If annotations or frames are missing.
        DataError: If a row cannot be used, or its answer is not among its candidates.
    """
    task, frames = video.task, video.frames()
    queries: list[ClipWords] = []
    candidates: Candidates[ClipWords] = Candidates()
    labels, pools, infos, odd = [], [], [], 0
    for one in _of_rows(video):
        queries.append(ClipWords("clip", task.query_instruction, one.text, one.folder))
        places = [
            candidates.add(name, ClipWords("raw", text=content))
            for name, content in zip(one.names, one.contents, strict=True)
        ]
        pools.append(tuple(places))
        labels.append({places[one.right]: 1.0})
        infos.append({**one.info, "answer": one.names[one.right], "answer_idx": one.right})
        odd += one.odd
    video.refuse_missing(frames, queries)
    notes = counted(task, len(queries))
    if odd:
        notes.append(f"{odd:,} options do not begin with a letter, as 'A. ', and are embedded as officially")
    return video.finished(
        video.items(frames, queries),
        video.items(frames, candidates.rows),
        candidates.names,
        labels,
        pools,
        info=infos,
        notes=notes,
    )


def _of_rows(video: VideoTask) -> Iterator[_Question]:
    if video.task.parser == "mvbench":
        yield from _mvbench(video)
        return
    columns, meaning = _DATA_SETS[video.task.parser]
    more = ("question_id", "domain", "sub_category", "question_idx", "qid", "type")
    for row in video.rows(columns, more):
        one = meaning(row)
        kept = {name: row.values[name] for name in more if row.values.get(name) is not None}
        yield replace(one, info={"video_id": one.folder, **kept})


def _videomme(row: Row) -> _Question:
    options = row.texts("options")
    answer = row.text("answer")
    right = "ABCD".find(answer) if len(answer) == 1 else -1
    if not 0 <= right < len(options):
        raise DataError(f"{row.where}: 'answer' must be the letter of an option, but is {answer!r:.90}.")
    text = row.text("question") + "\n" + "\n".join(options)
    contents, odd = _without_letters(options)
    return _Question(text, str(row.name("videoID")), options, contents, right, odd=odd)


def _egoschema(row: Row) -> _Question:
    options = row.texts("option")
    text = row.text("question") + " ".join(options)  # officially nothing stands between them
    contents, odd = _without_letters(options)
    right = row.index("answer", len(options))
    return _Question(text, str(row.name("video_idx")), options, contents, right, odd=odd)


def _without_letters(options: Sequence[str]) -> tuple[list[str], int]:
    """Return the options without their letters, and how many have none.

    Officially the text begins at the first ". ". Where there is none, that is the last character.
    """
    contents = [option[option.find(". ") :].strip(". ") for option in options]
    return contents, sum(". " not in option for option in options)


def _nextqa(row: Row) -> _Question:
    options = [row.text(f"a{number}") for number in range(5)]
    text, _ = _lettered(row.text("question"), options)
    return _Question(text, str(row.name("video")), options, options, row.index("answer", 5))


def _activitynetqa(row: Row) -> _Question:
    answer = row.text("answer")
    if answer not in _YES_NO:
        raise DataError(f"{row.where}: 'answer' must be 'yes' or 'no', but is {answer!r:.90}.")
    text = row.text("question") + "? (A) yes; (B) no."
    return _Question(text, f"v_{row.name('video_name')}", _YES_NO, _YES_NO, _YES_NO.index(answer))


def _mvbench(video: VideoTask) -> Iterator[_Question]:
    """Yield the questions of all subsets, in the official order."""
    for subset in MVBENCH_SUBSETS:
        places = [
            f"video-tasks/data/{folder}/{file}"
            for folder in ("mvbench", "MVBench")
            for file in (
                f"{subset}.jsonl",
                f"{subset}.json",
                f"json/{subset}.json",
                f"{subset}/train-*.parquet",
            )
        ]
        for row in video.rows(("question", "video", "candidates", "answer"), (), places):
            options, answer = row.texts("candidates"), row.text("answer")
            if answer not in options:
                said = f"'answer' must be one of 'candidates', but {answer!r:.90} is not"
                raise DataError(f"{row.where}: {said}.")
            text, lettered = _lettered(row.text("question"), options)
            right = len(options) - 1 - options[::-1].index(answer)  # officially the last of equal options
            name = str(row.name("video"))
            info = {"subset": subset, "video_id": name}
            yield _Question(text, f"{subset}/{name}", lettered, lettered, right, info)


def _lettered(question: str, options: Sequence[str]) -> tuple[str, list[str]]:
    r"""Return the question with its options below it, and the options with their letters.

    >>> _lettered("Who?", ["a cat", "a dog"])
    ('Who?\nOptions:\n(A) a cat\n(B) a dog', ['(A) a cat', '(B) a dog'])
    """
    lettered = [f"({chr(ord('A') + number)}) {option}" for number, option in enumerate(options)]
    return "\n".join((question, "Options:", *lettered)).rstrip(), lettered


#: Of each parser: the columns of its rows, and what they mean.
_DATA_SETS: dict[str, tuple[tuple[str, ...], Callable[[Row], _Question]]] = {
    "videomme": (("question", "videoID", "options", "answer"), _videomme),
    "egoschema": (("question", "video_idx", "answer", "option"), _egoschema),
    "nextqa": (("video", "question", "answer", *(f"a{number}" for number in range(5))), _nextqa),
    "activitynetqa": (("video_name", "question", "answer"), _activitynetqa),
}
