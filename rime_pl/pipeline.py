"""Which stage needs which run, which settings it gets, and where its run lies.

Called by `rime run` (commands/run.py), which starts the stages. Nothing here starts or trains anything, so
that all of it can be tested in a moment.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from rime_pl.corpus_places import BUILT_IN, find_tiny_base
from rime_pl.errors import RimeError
from rime_pl.options.words import CONFIGS, in_our_spelling, read_settings
from rime_pl.run_folder import RUNS, RunFolder

#: The stages in the order in which each starts from the adapter of the one before.
STAGES = ("sft", "cma", "refine_rl")
#: Recipes that have a name: a folder with one YAML file for each stage.
RECIPES = {"tiny": CONFIGS / "tiny", "2b": CONFIGS, "2b-24gb": CONFIGS / "24gb"}
#: A recipe with this base model trains on one that `rime base` makes for the corpus and the seed:
#: models/tiny-<corpus> for seed 0, else models/tiny-<corpus>-seed<seed>.
TINY_BASE = "models/tiny-openmoji"
#: Options of `rime base`. Words of other languages would take the room of those that are trained.
BASE_OPTIONS = {
    "openmoji": (
        *("--tasks", "name_to_picture", "picture_to_name", "composed", "word_to_picture", "picture_to_word"),
        *("--vision_steps", "400"),
    ),
    # With fewer steps, one seed of three read movements so badly that a rewrite never turned them round.
    "mini": ("--vision_steps", "1000", "--num_steps", "1200"),
}
#: Settings of a tiny model on other data: it reads and writes less than people do, and what was cut is told.
OF_OWN_DATA = ["--data.too_long", "cut"]
#: Settings that follow from the options of `rime run`, and the option to use instead.
DECIDED = {
    "run_dir": "the run's folder follows from --corpus, --recipe and --seed",
    "seed_everything": "use --seed",
    "data.path": "use --corpus",
    "model.backbone.name_or_path": "use --base",
}

Settings = dict[str, Any]
#: (stage, words of the command line) -> the complete settings, as config.yaml holds them.
Parse = Callable[[str, list[str]], Settings]


@dataclass(frozen=True)
class Pipeline:
    """All stages of one recipe on one corpus with one seed."""

    corpus: Path  # folder of shards
    recipe: Path  # folder with one YAML file for each stage
    recipe_name: str
    seed: int
    base: str | None  # base model in place of the recipe's
    given: Mapping[str, list[str]]  # stage -> settings that were typed, as words of the command line
    table: Path | None = None  # the table that the corpus is built from

    @property
    def folder(self) -> Path:
        """The folder above the runs of all stages."""
        return RUNS / f"{self.corpus.name}-{self.recipe_name}-seed{self.seed}"

    @property
    def tiny_base(self) -> Path | None:
        """The recipe's base model if it is one that is made for each corpus, else None."""
        file = self.file("sft")
        named: Any = read_settings(file, "--recipe ") if file.stat().st_size else {}
        for name in ("model", "backbone", "name_or_path"):
            named = (named.get(name) if isinstance(named, dict) else None) or {}
        if not named and not self.base:
            raise RimeError(
                f"--recipe {self.recipe}: sft.yaml must name a base model (model.backbone.name_or_path), but "
                "does not. Add it, or give --base."
            )
        return find_tiny_base(self.corpus, self.seed) if named == TINY_BASE else None

    def file(self, stage: str) -> Path:
        """Return the recipe's file of a stage."""
        file = self.recipe / f"{stage}.yaml"
        if not file.is_file():
            raise RimeError(f"--recipe {self.recipe}: {file.name} is missing. A recipe has one file a stage.")
        return file

    def configs(self, stage: str) -> list[Path]:
        """Return the recipe's file of a stage and, if there is one, the corpus' file of that stage."""
        of_corpus = CONFIGS / "data" / self.corpus.name / f"{stage}.yaml"
        return [_shown(file) for file in (self.file(stage), of_corpus) if file.is_file()]

    def words(self, stage: str, before: RunFolder | None = None, as_recipe: bool = False) -> list[str]:
        """Return the settings of a stage, as words of the command line; the run's folder is left out.

        Args:
            stage: One of ``STAGES``.
            before: The run to start from; None starts from the base model.
            as_recipe: Whether the settings that were typed are left out.
        """
        words = [word for file in self.configs(stage) for word in ("--config", str(file))]
        words += [] if self.corpus.name in BUILT_IN or not self.tiny_base else OF_OWN_DATA
        words += ["--data.annotated_seed", str(self.seed)] if self.seed else []
        words += () if as_recipe else self.given.get(stage, ())
        # last, because a settings file among the typed words may name another corpus or seed
        words += ["--data.path", str(self.corpus), "--seed_everything", str(self.seed)]
        base = self.tiny_base if as_recipe else self.base or self.tiny_base
        words += ["--model.backbone.name_or_path", str(base)] if base else []
        return [*words, "--model.init_adapter_from", str(before.adapter)] if before else words

    def stages_to(self, goal: str) -> list[str]:
        """Return the stages that must be finished to reach ``goal``, itself included, in order."""
        if goal not in STAGES:
            return []
        stages = list(STAGES[: STAGES.index(goal) + 1])
        starts = [n for n, stage in enumerate(stages) if starts_elsewhere(self.given.get(stage, ()))]
        return stages[max(starts, default=0) :]


def starts_elsewhere(words: Sequence[str]) -> bool:
    """Return whether the typed settings name an adapter to start from, so that no run before is needed."""
    return any(word.partition("=")[0] == "--model.init_adapter_from" for word in words)


def find_recipe(recipe: str) -> tuple[str, Path]:
    """Return name and folder of a recipe, given by either.

    Raises:
        RimeError: If there is no such recipe.
    """
    folder = RECIPES.get(recipe, Path(recipe)).resolve()
    if not (folder / "sft.yaml").is_file():
        raise RimeError(
            f"--recipe {recipe}: no sft.yaml in {_shown(folder)}. Give {' or '.join(RECIPES)}, or a folder "
            "with sft.yaml, cma.yaml and refine_rl.yaml."
        )
    names = {place: name for name, place in RECIPES.items()}
    return names.get(folder, folder.name), folder


def sort_settings(goal: str, words: Sequence[str]) -> dict[str, list[str]]:
    """Return the settings that were typed, for each stage up to ``goal``.

    ``--model.temperature 0.05`` belongs to ``goal``; ``--sft.model.temperature 0.05`` to an earlier stage.

    >>> sort_settings("cma", ["--model.lambda_dec", "0", "--sft.model.temperature=0.1"])
    {'sft': ['--model.temperature=0.1'], 'cma': ['--model.lambda_dec', '0']}

    Raises:
        RimeError: If a setting belongs to a later stage, or follows from an option of `rime run`.
    """
    stages = STAGES[: STAGES.index(goal) + 1] if goal in STAGES else ()
    given: dict[str, list[str]] = {stage: [] for stage in stages}
    words = list(in_our_spelling(words))
    if words and not (stages and words[0].startswith("--")):
        own = {"data": "rime shards", "base": "rime base"}.get(goal)
        hint = f" {goal} takes none; `{own} --help` lists what can be set there." if own else ""
        raise RimeError(f"rime run {goal}: {words[0]} is no setting of a stage (--NAME VALUE).{hint}")
    stage = goal
    for word in words:
        if word.startswith("--"):
            stage = goal
            prefix, _, rest = word[2:].partition(".")
            if prefix in STAGES:
                stage, word = prefix, f"--{rest}"
            if stage not in given:
                raise RimeError(f"--{prefix}.{rest}: rime run {goal} ends before {prefix}.")
            name = word[2:].partition("=")[0]
            if name in DECIDED:
                raise RimeError(f"--{name} cannot be given to rime run: {DECIDED[name]}.")
        given[stage].append(word)
    return given


def with_few_rewrites(pipeline: Pipeline, parse: Parse) -> Pipeline:
    """Return the pipeline whose SFT and CMA see no more rewrites than its Refine-RL counts as annotated."""
    words = pipeline.words("refine_rl")
    share = parse("refine_rl", words)["data"]["annotated_share"]
    if share == 1:
        return pipeline
    few = ["--data.annotated_share", str(share)]
    given = {stage: [*few, *pipeline.given[stage]] for stage in STAGES[:-1]}
    return replace(pipeline, given={**pipeline.given, **given})


def find_run(folder: Path, stage: str, settings: Settings, start: Mapping[str, Any]) -> RunFolder:
    """Return the run of ``stage`` with these settings and this start, else the first free folder.

    Args:
        folder: The folder above the runs, e.g. ``runs/openmoji-tiny-seed0``.
        stage: One of ``STAGES``.
        settings: The complete settings; ``run_dir`` does not count.
        start: What the run starts from beyond its settings, e.g. hashes of corpus and adapter.
    """
    runs = [run for run in _numbered(folder, stage) if run.config.is_file()]
    same = [run for run in runs if _same_settings(run, settings) and _same_start(run, start)]
    same.sort(key=lambda run: not run.finished)
    names = (stage if number == 1 else f"{stage}-{number}" for number in count(1))
    return same[0] if same else next(run for name in names if not _taken(run := RunFolder(folder / name)))


def _numbered(folder: Path, stage: str) -> Iterator[RunFolder]:
    for path in sorted(folder.glob(f"{stage}*"), key=lambda path: (len(path.name), path.name)):
        if re.fullmatch(rf"{stage}(-\d+)?", path.name):
            yield RunFolder(path)


def _same_settings(run: RunFolder, settings: Settings) -> bool:
    """Whether all are equal; one that an earlier version did not have is null there."""
    return not differences(settings | {"run_dir": None}, run.settings | {"run_dir": None})


def _same_start(run: RunFolder, start: Mapping[str, Any]) -> bool:
    """A run that was not started by `rime run` has no origin, but a manifest when it is finished."""
    known = (run.manifest if run.reported else {}) | run.origin
    return all(known.get(name, value) == value for name, value in start.items())


def _taken(run: RunFolder) -> bool:
    return any(path.exists() for path in (run.config, run.marker, run.adapter, run.last_checkpoint))


def differences(settings: Settings, recipe: Settings, above: str = "") -> dict[str, dict[str, Any]]:
    """Return the settings that differ from the recipe's.

    >>> differences({"model": {"temperature": 0.05}}, {"model": {"temperature": 0.02}})
    {'model.temperature': {'value': 0.05, 'recipe': 0.02}}
    """
    found: dict[str, dict[str, Any]] = {}
    for name in {**recipe, **settings}:
        value, usual = settings.get(name), recipe.get(name)
        if isinstance(value, dict) and isinstance(usual, dict):
            found |= differences(value, usual, f"{above}{name}.")
        elif value != usual:
            found[f"{above}{name}"] = {"value": value, "recipe": usual}
    return found


def describe(differing: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the differences as one line.

    >>> describe({"model.temperature": {"value": 0.05, "recipe": 0.02}})
    'differs from the recipe: model.temperature 0.05 instead of 0.02'
    """
    return f"differs from the recipe: {listed(differing)}" if differing else "as in the recipe"


def listed(differing: Mapping[str, Mapping[str, Any]]) -> str:
    """Return each setting with its value and the value it replaces."""
    return ", ".join(
        f"{name} {pair['value']} instead of {pair['recipe']}" for name, pair in differing.items()
    )


def _shown(path: Path) -> Path:
    """The path as a person in the working folder would type it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
