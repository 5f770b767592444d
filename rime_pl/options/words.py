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

#: No file of settings holds more values; a few lines of aliases of aliases do.
MAX_VALUES = 10_000


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
        yield from _leaves(read_settings(file, "--config "), file)


def read_settings(file: Path, option: str = "") -> dict[str, Any]:
    """Return the settings in a YAML file.

    Args:
        file: The file.
        option: What an error puts before its path, such as "--config ".

    Raises:
        RimeError: If it is not YAML, names a setting twice, is larger than any settings, or holds none.
    """
    where = f"{option}{file}"
    try:
        text = file.read_text(encoding="utf-8-sig")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _nodes(node, where, {})
        values = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RimeError(f"{where}: line {line} is not YAML: {error.problem}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # e.g. a date that is none, or zero bytes
        raise RimeError(f"{where} is not YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(values, dict):
        raise RimeError(f"{where}: each line must be a setting, `name: value`.")
    return values


def _nodes(node: yaml.Node | None, where: str, known: dict[yaml.Node, int | None]) -> int:
    """Return the number of values in YAML, each alias counted as what it stands for.

    Args:
        node: Where to count.
        where: What an error names.
        known: What is counted already; None for what is being counted, and so holds itself.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if node not in known:
        known[node] = None
        inner = list(node.value)
        if isinstance(node, yaml.MappingNode):
            _refuse_twice(node, where)
            inner = [value for _, value in inner]
        known[node] = 1 + sum(_nodes(one, where, known) for one in inner)
    count = known[node]
    if count is None or count > MAX_VALUES:
        raise RimeError(
            f"{where}: line {node.start_mark.line + 1} must hold at most {MAX_VALUES:,} values, but aliases "
            "make it hold more. Write the values out."
        )
    return count


def _refuse_twice(node: yaml.MappingNode, where: str) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and name in lines and name != "<<":
            raise RimeError(
                f"{where}: a setting may stand once in its group, but {name} stands in line {lines[name]} "
                f"and in line {line}. Remove one."
            )
        lines[name] = line


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
