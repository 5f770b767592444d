"""The words of a command line and the settings files that they name: what was given, and what was meant.

Used by the parser before it reads the words, and by the command `rime` for misspelt commands.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rime_pl.errors import RimeError

_PACKAGE = Path(__file__).parents[1]
#: The settings files that come with rime_pl. In a checkout without links they lie beside the package.
CONFIGS = ((_PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent) / "configs").resolve()


class Given(NamedTuple):
    """A setting as somebody gave it."""

    name: str  # model.temperature
    value: object
    file: Path | None  # the settings file that holds it; None: an option on the command line

    def __str__(self) -> str:
        return f"{self.file}: {self.name}" if self.file else f"--{self.name}"


def options_given(words: Iterable[str]) -> Iterator[Given]:
    """Yield the settings that are given as options."""
    words = list(words)
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            yield Given(name.rstrip("+"), value if equals else following, None)


def in_our_spelling(words: Iterable[str]) -> Iterator[str]:
    """Yield the words with underscores in the names of options.

    A ``--config`` below configs/ that is not in the working folder becomes the installed one.

    Example:
        >>> list(in_our_spelling(["-c", "a.yaml", "--top-k=3"]))
        ['--config', 'a.yaml', '--top_k=3']
    """
    before = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = f"--{name[2:].replace('-', '_')}{equals}"
            yield word + (_installed(value) if word == "--config=" else value)
        else:
            word = "--config" if word == "-c" else word
            yield _installed(word) if before == "--config" else word
        before = word


def _installed(file: str) -> str:
    ours = CONFIGS.parent / file
    return str(ours) if file.startswith("configs") and not Path(file).exists() and ours.is_file() else file


def settings_given(words: Iterable[str]) -> Iterator[Given]:
    """Yield the settings that are given as options and in the files that ``--config`` names, in their order.

    Raises:
        RimeError: If such a file is missing or does not hold settings.
    """
    for option in options_given(words):
        yield option
        if option.name != "config" or not option.value:
            continue
        file = Path(str(option.value))
        if not file.is_file():
            raise RimeError(f"--config {file}: there is no such file.")
        try:
            values = yaml.safe_load(file.read_text())
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else "?"
            raise RimeError(f"--config {file}: line {line} is not YAML: {error.problem}.") from error
        if not isinstance(values, dict):
            raise RimeError(f"--config {file}: each line must be a setting, `name: value`.")
        yield from _leaves(values, file)


def needs(prog: str, given: Iterable[str] = ()) -> str:
    """Return what to say when a stage is started without its settings, e.g. ``rime cma fit``.

    Args:
        prog: The command, its stage and its action.
        given: Names of the settings that are there.
    """
    _, stage, action = prog.split()
    example = f"--config FILE (for example configs/tiny/{stage.replace('-', '_')}.yaml)"
    both = {"config": example, "run_dir": "--run_dir FOLDER"}
    there = set(given)
    missing = [words for name, words in both.items() if name not in there]
    return f"`{prog}` needs {' and '.join(missing)}." + f" `rime run {stage}` sets both." * (action == "fit")


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that is most like a misspelt one; None if none is.

    Names of the same group come first, then the same name in another group.

    Example:
        >>> nearest("serch", ["search", "shards"])
        'search'
        >>> nearest("model.temprature", ["model.temperature", "model.wrong_share"])
        'model.temperature'
        >>> nearest("learning_rate", ["model.optimizer.learning_rate", "model.temperature"])
        'model.optimizer.learning_rate'
    """
    names = sorted(known)
    group, _, last = word.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in names if name.rpartition(".")[0] == group}
    if close := difflib.get_close_matches(last, beside, n=1):
        return beside[close[0]]
    same = [name for name in names if name.rpartition(".")[2] == last]
    return next(iter(same or difflib.get_close_matches(word, names, n=1, cutoff=0.75)), None)


def groups_of(name: str) -> set[str]:
    """Return the groups that hold a setting.

    Example:
        >>> sorted(groups_of("model.backbone.lora_r"))
        ['model', 'model.backbone']
    """
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _leaves(values: dict[str, Any], file: Path, prefix: str = "") -> Iterator[Given]:
    for name, value in values.items():
        yield Given(f"{prefix}{name}", value, file)
        if isinstance(value, dict):
            yield from _leaves(value, file, f"{prefix}{name}.")
