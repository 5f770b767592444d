"""Tiny video tasks of MMEB-V2 in the official layout, and what a reader must make of them."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.datamodules.benchmarks.official_copies import Expected, Shown, fact, save, write_lines

PROMPT = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer. Question: "
)
TARGET = "Understand the content of the provided video."
MOMENT = "Understand the content of the provided video clip."
SUBSETS = [
    "episodic_reasoning",
    "action_sequence",
    "action_prediction",
    "action_antonym",
    "fine_grained_action",
    "unexpected_action",
    "object_existence",
    "object_interaction",
    "object_shuffle",
    "moving_direction",
    "action_localization",
    "scene_transition",
    "action_count",
    "moving_count",
    "moving_attribute",
    "state_change",
    "fine_grained_pose",
    "character_order",
    "egocentric_navigation",
    "counterfactual_inference",
]
BREAKFAST = [
    "pancake",
    "cereal",
    "sandwich",
    "scrambledegg",
    "friedegg",
    "coffee",
    "milk",
    "tea",
    "juice",
    "salad",
]


def frames(root: Path, folder: str, count: int, every: bool = False) -> tuple[str, ...]:
    """Save the frames of a clip; return those that a reader must take, in order.

    Names sort wrongly as text from ten frames on.
    """
    names = [f"{folder}/frame_{n + 1}.jpg" for n in range(count)]
    for name in names:
        save(root / name)
    (root / folder / "notes.txt").write_text("no frame")
    taken = range(count)
    if not every and count >= 8:
        taken = np.linspace(0, count - 1, 8, dtype=int).tolist()
    return ("clip:", *(names[n] for n in taken))


class VideoCopy:
    """Writes one video task.

    Args:
        root: Folder of the copy.
        name: The task.
        folder: Of the frames, below ``video-tasks/frames``, if not the official one.
    """

    def __init__(self, root: Path, name: str, folder: str = "") -> None:
        self.about = fact("video", name)
        self.root, self.name = root, name
        self.folder = f"video-tasks/frames/{folder or self.about['folder']}"
        query = self.about["query"]
        self.query = PROMPT if query == "P" else query
        group = {"CLS": "V-CLS", "QA": "V-QA", "RET": "V-RET", "MRET": "V-MRET"}[self.about["group"]]
        local = self.about["pool"] == "local"
        self.expected = Expected(name, group, "video", "hit@1", pools=[] if local else None)

    def write(self, rows: Sequence[Mapping[str, Any]], file: str = "") -> None:
        write_lines(self.root / "video-tasks/data" / (file or self.about["file"]), rows)

    def clip(self, folder: str, count: int, every: bool = False) -> tuple[str, ...]:
        return frames(self.root, f"{self.folder}/{folder}", count, every)

    def ask(self, text: str, media: tuple[str, ...], query: str = "") -> None:
        """Add a query: mark and a space if it shows something, then its words."""
        query = query or self.query
        said = f"{query} {text}" if text else query
        mark = " " if media else ""
        self.expected.queries.append(Shown(mark + said, query.strip(), text.strip(), media))

    def rank(self, names: Sequence[str | int], *right: str | int) -> None:
        if self.expected.pools is not None:
            self.expected.pools.append(list(names))
        self.expected.labels.append(dict.fromkeys(right, 1.0))

    def word(self, name: str, content: str | None = None) -> str:
        text = name if content is None else content
        self.expected.add(name, Shown(text, "", text))
        return name


def write_video_task(root: Path, name: str, folder: str = "") -> Expected:
    """Write a video task in the official layout."""
    copy = VideoCopy(root, name, folder)
    write = {"CLS": _classes, "RET": _retrieval, "QA": _questions, "MRET": _moments}
    write[copy.about["group"]](copy)
    return copy.expected


def _classes(copy: VideoCopy) -> None:
    labels = {"HMDB51": "ride_bike", "UCF101": "Kayaking", "Breakfast": "tea"}
    label = labels.get(copy.name, "waiting_in_line")
    rows = []
    for number, (count, right) in enumerate([(3, label), (8, "own label"), (11, label)]):
        row: dict[str, Any] = {"video_id": f"clip {number}", "pos_text": right}
        copy.ask("", copy.clip(f"clip {number}", count))
        names = [copy.word(right)]
        if copy.name == "SmthSmthV2":
            row["video_id"] = number  # ids may be numbers
            row["neg_text"] = [f"Moving {number}", label, "own label"]
            copy.expected.queries[-1].media = copy.clip(str(number), count)
            names = [copy.word(one) for one in row["neg_text"]]
        copy.rank(names, right)
        rows.append(row)
    for one in BREAKFAST if copy.name == "Breakfast" else ():
        copy.word(one)
    copy.write(rows)


def _retrieval(copy: VideoCopy) -> None:
    """Two rows share a video."""
    rows = []
    for number, video in enumerate(["v_a", "v_b.x", "v_a"]):
        text = f"words {number}"
        row: dict[str, Any] = {
            "DiDeMo": {"video": f"test/{video}.mp4", "caption": text},
            "MSR-VTT": {"video_id": video, "video": f"{video}.mp4", "caption": text},
            "MSVD": {"video_id": video, "video": f"{video}.avi", "caption": [text, "another"]},
            "VATEX": {"videoID": video, "enCap": [text, "another"]},
            "YouCook2": {"id": video, "video_path": "x/y.mp4", "sentence": text},
        }[copy.name]
        rows.append(row)
        copy.ask(text, ())
        shown = Shown(f" {TARGET}", TARGET, "", copy.clip(video, 9 + len(video)))
        copy.rank([], copy.expected.add(video, shown))
    copy.write(rows)


def _questions(copy: VideoCopy) -> None:
    if copy.name == "MVBench":
        _mvbench(copy)
        return
    rows = []
    for number in range(3):
        options = [f"{letter}. Answer. {number}" for letter in "ABCDE"]
        short = [f"Answer. {number}".strip(". ")] * 5
        question, right = f"What is {number}", number % 2
        if copy.name == "Video-MME":
            row = {
                "question": question,
                "videoID": f"v{number}",
                "options": options[:4],
                "answer": "AB"[right],
            }
            row |= {"question_id": f"{number}-1", "domain": "Sports", "sub_category": "Ball"}
            text, names, contents = "\n".join([question, *options[:4]]), options[:4], short[:4]
        elif copy.name == "EgoSchema":
            row = {"question": question, "video_idx": f"v{number}", "option": options, "answer": str(right)}
            row["question_idx"] = number
            text, names, contents = question + " ".join(options), options, short
        elif copy.name == "NExTQA":
            names = contents = [f"a{n} of {number}" for n in range(4)] + ["four "]
            row = {"question": question, "video": number, "answer": right, "qid": number, "type": "CW"}
            row |= {f"a{n}": name for n, name in enumerate(names)}
            lines = [f"({letter}) {name}" for letter, name in zip("ABCDE", names, strict=True)]
            text = "\n".join([question, "Options:", *lines]).rstrip()
        else:
            row = {"question": question, "video_name": f"v{number}", "question_id": f"q{number}"}
            row["answer"] = ("yes", "no")[right]
            text, names, contents = f"{question}? (A) yes; (B) no.", ["yes", "no"], ["yes", "no"]
        folder = {"NExTQA": str(number), "ActivityNetQA": f"v_v{number}"}.get(copy.name, f"v{number}")
        copy.ask(text, copy.clip(folder, 6 + 3 * number))
        for name, content in zip(names, contents, strict=True):
            copy.word(name, content)
        copy.rank(names, names[right])
        rows.append(row)
    copy.write(rows)


def _mvbench(copy: VideoCopy) -> None:
    for number, subset in enumerate(SUBSETS):
        video = f"{number}.mp4"  # the folder of the frames keeps the extension
        options = [f"thing {n}" for n in range(2 + number % 4)]
        right = number % len(options)
        named = [f"({string.ascii_uppercase[n]}) {option}" for n, option in enumerate(options)]
        copy.write(
            [
                {
                    **{"question": f"Which of {number}?", "video": video, "candidates": options},
                    **{"answer": options[right], "start": 1.0, "end": 2.0},
                }
            ],
            f"mvbench/{subset}.jsonl",
        )
        text = "\n".join([f"Which of {number}?", "Options:", *named])
        copy.ask(text, copy.clip(f"{subset}/{video}", 8))
        copy.rank([copy.word(name) for name in named], named[right])


def _moments(copy: VideoCopy) -> None:
    if copy.name == "MomentSeeker":
        _momentseeker(copy)
        return
    rows = []
    for number in range(2):
        stem = f"video_{number}"
        rows.append(
            {
                **{"query": f"a dog {number}", "video_path": f"videos/{stem}.mp4"},
                "clips_dir_path": f"clips/{stem}",
            }
        )
        copy.ask(f"a dog {number}", copy.clip(f"{stem}/query", 20))
        names: list[str | int] = []
        for clip in [*(f"negative_{n}" for n in range(9)), "positive_1"]:
            name = f"{stem}/{clip}"
            names.append(copy.expected.add(name, Shown(f" {TARGET}", TARGET, "", copy.clip(name, 5))))
        save(copy.root / copy.folder / stem / "loose.jpg")
        copy.rank(names, names[-1])
    copy.write(rows)


def _momentseeker(copy: VideoCopy) -> None:
    """A text alone, with a picture and with a clip; the last has two right clips."""
    parts = dict(part.split(": ", 1) for part in copy.query.split(" / "))
    rows = []
    for number, kind in enumerate(("text", "image", "video")):
        shown = {"text": None, "image": f"pic_{number}.jpg", "video": f"movie/q{number}.mp4"}[kind]
        media: tuple[str, ...] = ()
        if kind == "image":
            save(copy.root / copy.folder / f"query_{shown}")
            media = (f"{copy.folder}/query_{shown}",)
        elif kind == "video":
            media = copy.clip(f"video_frames/movie_q{number}", 11, every=True)
        copy.ask(f"words {number}", media, parts[kind])
        right, wrong = [f"movie/{number}/p{n}.mp4" for n in range(1 + number // 2)], []
        wrong = [f"movie/n{n}.mp4" for n in range(10 - len(right))]
        rows.append(
            {
                **{"query": f"words {number}", "input_frames": shown},
                **{
                    side: [{"output_path": path, "start": 0} for path in paths]
                    for side, paths in (("positive_frames", right), ("negative_frames", wrong))
                },
            }
        )
        names: list[str | int] = []
        for path in [*right, *wrong]:
            name = "video_frames/" + path.replace("/", "_").removesuffix(".mp4")
            clip = copy.clip(name, 9, every=True)
            names.append(copy.expected.add(name, Shown(f" {MOMENT}", MOMENT, "", clip)))
        copy.rank(names, *names[: len(right)])
    copy.write(rows)
