"""One parser for all commands: options from a function's signature, plain help, plain errors.

A command is a function: its signature is its command line, its docstring is its help. The parser of the
stages (cli.py) is Lightning's with the same manners. Nothing heavy is imported here.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from rime_pl.errors import RimeError
from rime_pl.options.numbers import refuse_numbers
from rime_pl.options.renamed import new_name
from rime_pl.options.words import Given, groups_of, in_our_spelling, nearest, settings_given

#: An argument of this name is a dataclass that commands share. Its fields are options like the others.
COMMON = "common"
#: Wrong names that an error shows.
SHOWN = 5
#: Names of types in an error, in words.
TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "NoneType": "null",
    "list[int]": "a list of whole numbers",
    "list[str]": "a list of words",
    "list[Path]": "a list of paths",
}


class PlainHelp(DefaultHelpFormatter):
    """Help with the default at its end and the type in place of the name in capitals."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=32, **kwargs)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").replace("``", "").strip().rstrip(".")
        if not action.option_strings or re.search(r"default:|\(required\)", text):
            return text
        if action.required:
            return f"{text} (required)"
        told = action.default is None and re.search(r"\bnull\b|not given", text)
        if told or action.default in (argparse.SUPPRESS, "") or action.nargs == 0 or action.dest == "config":
            return text
        default = str(action.default).lower() if isinstance(action.default, bool) else "%(default)s"
        return f"{text} (default: {default})"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if not name.endswith("+") and name != "-c"]
        if not names or action.nargs == 0:
            return ", ".join(names) or action.dest.upper()
        return f"{', '.join(names)} {self.metavar(action)}"

    def metavar(self, action: argparse.Action) -> str:
        """Return what stands for the value: its choices, or its type in capitals."""
        if str(action.metavar).startswith("{"):
            return "{" + ",".join(_once(str(action.metavar).strip("{}\b").split(","))) + "}"
        if action.metavar and not self.kind(action):
            return str(action.metavar).strip("\b")
        found = re.findall(r"\w+", self._get_type_str(action) or action.dest)
        types = [part for part in found if part not in ("class", "null", "None", "Optional", "Union")]
        if types[0] == "list" and len(types) == 2:
            return f"{types[1].upper()} ..."
        return types[0].upper() if len(types) == 1 else "VALUE"

    def kind(self, action: argparse.Action | None) -> str:
        """Return the type of a value as jsonargparse names it, such as ``Optional[list[str]]``."""
        return (action and self._get_type_str(action)) or ""


class PlainParser(ArgumentParser):
    """jsonargparse's parser that takes hyphens as underscores, and whose errors are a sentence or two."""

    def __init__(self, **kwargs: Any) -> None:
        manners: dict[str, Any] = {
            "formatter_class": PlainHelp,
            "exit_on_error": False,
            "allow_abbrev": False,
        }
        super().__init__(**manners | kwargs)  # jsonargparse makes parsers of this class for nested settings
        self.given: list[Given] = []

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        words = self.in_one_word(list(in_our_spelling(sys.argv[1:] if args is None else args)))
        self.given = list(settings_given(words))
        self.refuse_names()
        try:
            values = super().parse_args(words, *rest, **kwargs)
        except (argparse.ArgumentError, ValueError, OSError) as error:
            raise RimeError(self.sentence(str(error))) from error
        refuse_numbers(vars(values.as_flat()), self.given)
        return values

    def in_one_word(self, words: list[str]) -> list[str]:
        """Return the words with ``--list a b`` as ``--list=[a,b]`` and a switch as ``--switch=true``."""
        formatter = PlainHelp(self.prog)
        actions = {option: action for action in self._actions for option in action.option_strings}
        result: list[str] = []
        at = 0
        while at < len(words):
            word, at = words[at], at + 1
            name, equals, value = word.partition("=")
            if equals and "list[" in formatter.kind(actions.get(name)):
                words[at:at], word = [value], name
            kind = formatter.kind(actions.get(word))
            end = next((n for n in range(at, len(words)) if words[n].startswith("--")), len(words))
            values = words[at:end]
            if re.match(r"(Optional\[)?list\[", kind) and values and not re.match(r"\[|null$", values[0]):
                numbers = "int" in kind or "float" in kind
                listed = values if numbers else [json.dumps(value) for value in values]
                word, at = f"{word}=[{', '.join(listed)}]", end
            elif kind == "bool" and (not values or values[0].lower() not in ("true", "false")):
                word = f"{word}=true"
            elif word.startswith("--") and values and re.match(r"-\.?\d", values[0]):
                word, at = f"{word}={values[0]}", at + 1  # argparse takes -1e-4 for an option
            result.append(word)
        return result

    def refuse_names(self) -> None:
        """Refuse old and misspelt names, all at once, each with the right one.

        Raises:
            RimeError: If there are any.
        """
        known = {action.dest for action in self._actions if not action.dest.endswith(".help")}
        groups = set().union(self.groups or (), *map(groups_of, known))
        leaves = known - groups
        told: list[str] = []
        old: dict[Path | None, list[str]] = {}
        wrong: dict[str, str] = {}
        for one in self.given:
            if new := new_name(one.name, one.value, known):
                old.setdefault(one.file, []).append(f"{one.name} is now called {new}.")
            elif one.name not in known | groups and not groups_of(one.name) & (leaves | wrong.keys()):
                near = nearest(one.name, known | groups)
                hint = f" Did you mean {near if one.file else f'--{near}'}?" if near else ""
                wrong[one.name] = f"{one} is not a setting of `{self.prog}`.{hint}"
        for file, lines in old.items():
            told += [f"--{line}" for line in lines] if file is None else [f"{file} has old names:", *lines]
        told += list(wrong.values())[:SHOWN]
        if len(wrong) > SHOWN:
            told.append(f"{len(wrong) - SHOWN} more names are wrong. Is this a file for another stage?")
        if told:
            raise RimeError("\n".join(told))

    def sentence(self, message: str) -> str:
        """Return an error of jsonargparse in words that a user understands, or else as it is."""
        message = message.strip()
        if found := re.match(r"the following arguments are required: (.*)", message):
            return self.missing([name.strip() for name in found[1].split(",")])
        if found := re.match(r"unrecognized arguments: (.*)", message, re.S):
            return f"`{self.prog}` does not expect {found[1]!r}. Put quotes around several words."
        if found := re.match(r"argument (?:-\w/)?(--\w\S*?)(?:/\S+)?: expected one argument", message):
            return f"{found[1]} needs a value after it. `{self.prog} --help` says which."
        if found := re.match(r'Linked "(.*?)" must be given via "(.*?)"', message):
            return f"{found[1]} always has the value of {found[2]}. Set {found[2]} instead."
        found = re.search(r'Parser key "(.*?)"[^:]*:\s*(.*)', message, re.S)
        if found is None:
            return message
        name, reason = found.groups()
        given = [one for one in self.given if one.name == name]
        if not given:  # given by its place, or its default, none, was checked
            value = reason.rpartition("value: ")[2].strip()
            told = "" if value == "None" else _wrong_value([Given(name, value, None)], reason)
            return told.replace(f"--{name}", name.upper()) if told else self.missing([name])
        return _wrong_value(given, reason) or f"{given[-1]}: {reason}"

    def missing(self, names: list[str]) -> str:
        """Return what to say when required options are not given."""
        told = []
        for name in names:
            action = next(action for action in self._actions if action.dest == name)
            option = f"--{name} {PlainHelp('').metavar(action)}"
            told.append(option if action.option_strings else name.upper())
        return f"`{self.prog}` needs {' and '.join(told)}. `{self.prog} --help` explains every option."


def parse(
    function: Callable[..., Any], prog: str, words: Sequence[str], positional: bool = True
) -> dict[str, Any]:
    """Return the arguments of ``function`` that the words give; see :func:`command_parser`."""
    parser = command_parser(function, prog, positional)
    values = parser.instantiate(parser.parse_args(words))  # groups of settings become their dataclass
    return arguments(function, {name: values[name] for name in options_of(function)})


def parse_with_optional(
    function: Callable[..., Any], prog: str, words: Sequence[str], instead: str
) -> dict[str, Any]:
    """Return what ``parse`` does; the argument by its place is "" if it is left out next to ``--instead``."""
    given = any(
        re.fullmatch(f"--{instead}(=.*)?", word.replace("-", "_").replace("__", "--", 1)) for word in words
    )
    try:
        return parse(function, prog, words)
    except RimeError:
        if not given:
            raise
        try:
            return parse(function, prog, ["", *words])
        except RimeError:
            pass
        raise


def arguments(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``function`` for options: those of ``common`` become its dataclass."""
    if (common := common_of(function)) is None:
        return dict(options)
    names = {field.name for field in dataclasses.fields(common)}
    shared = {name: value for name, value in options.items() if name in names}
    own = {name: value for name, value in options.items() if name not in names}
    return {**own, COMMON: common(**shared)}


def common_of(function: Callable[..., Any]) -> Any:
    """Return the dataclass of the argument ``common``; None without one."""
    there = COMMON in inspect.signature(function).parameters
    return get_type_hints(function)[COMMON] if there else None


def command_parser(function: Callable[..., Any], prog: str, positional: bool = True) -> PlainParser:
    """Return the parser of a command: the signature is its command line, the docstring its help.

    Args:
        function: The command.
        prog: What an error calls it.
        positional: Whether required arguments are given by their place, unless they are keyword-only.
    """
    usage = _usage(function, prog, positional)
    parser = PlainParser(prog=prog, usage=usage, description=_about(function), add_help=False)
    group = add_options(parser, function, positional)
    group.add_argument("-h", "--help", action="help", help="This help")
    return parser


def add_options(parser: ArgumentParser, function: Callable[..., Any], positional: bool = False) -> Any:
    """Add the arguments of ``function`` to a parser, except ``settings``, and return their group."""
    before = len(parser._action_groups)
    parser.add_function_arguments(function, as_positional=positional, skip={"settings", COMMON})
    # groups of settings come after it
    group: Any = (parser._action_groups[before:] or parser._action_groups)[0]
    if (common := common_of(function)) is not None:
        group.add_class_arguments(common, as_group=False)
    group.title = "options"
    return group


def options_of(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that the command line gives."""
    names = [name for name in inspect.signature(function).parameters if name not in ("settings", COMMON)]
    common = common_of(function)
    return names + ([] if common is None else [field.name for field in dataclasses.fields(common)])


def _usage(function: Callable[..., Any], prog: str, positional: bool) -> str:
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "settings"]
    needed = [p for p in parameters if p.default is p.empty]
    by_place = {p.name for p in needed if positional and p.kind is not p.KEYWORD_ONLY}
    words = [p.name.upper() if p.name in by_place else f"--{p.name} VALUE" for p in needed]
    return " ".join([prog, *words, *(["[--OPTION VALUE ...]"] if len(parameters) > len(needed) else [])])


def _about(function: Callable[..., Any]) -> str:
    """Return the docstring up to its arguments."""
    return re.split(r"\n *(?:Args|Returns|Raises|Example)s?:", inspect.getdoc(function) or "")[0].replace(
        "``", ""
    )


def _wrong_value(given: list[Given], reason: str) -> str | None:
    """Return "NAME must be TYPE, but is VALUE." from jsonargparse's reason; None if it is of another form.

    Args:
        given: Where the setting was given, in order.
        reason: What jsonargparse says of its value.
    """
    one = re.search(r"Expected an? (.*?)\. Got value: (.*)", reason, re.S)
    several = re.search(r"Subtypes: \[(.*?)\]\n.*Given value: (.*)", reason, re.S)
    found = several or one
    if found is None:
        return None
    kinds = re.sub(r"<class '([\w.]+)'>", r"\1", found[1])
    kinds = re.sub(r"(?:typing\.)?Literal\[(.*?)\]", r"\1", kinds)
    choices = _once(re.split(r", (?![^\[]*\])", kinds))
    told = " or ".join(TYPES.get(kind, kind) for kind in choices)
    refused = next((at for at in reversed(given) if str(at.value) == found[2].strip()), given[-1])
    words = [choice.strip("'") for choice in choices if choice.startswith("'")]
    near = nearest(str(refused.value), words)
    hint = f" Did you mean {near}?" if near else ""
    return f"{refused} must be {told}, but is {refused.value!r}.{hint}"


def _once(choices: Iterable[str]) -> list[str]:
    """Return the choices, and of two spellings with hyphen and underscore the first.

    Example:
        >>> _once(["cma", "refine-rl", "refine_rl"])
        ['cma', 'refine-rl']
    """
    spellings: dict[str, str] = {}
    for choice in choices:
        spellings.setdefault(choice.replace("_", "-"), choice)
    return list(spellings.values())
