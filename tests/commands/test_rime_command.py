"""The command `rime` itself: what it says before anything runs, and how it hands over to a command."""

from __future__ import annotations

import errno
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from rime_pl import __version__
from rime_pl.__main__ import COMMANDS, STAGES, command, main
from rime_pl.commands import run
from rime_pl.commands.settings import StageWords, parse_with_settings
from rime_pl.errors import RimeError, StoppedError, ToldElsewhereError
from rime_pl.options.parser import command_parser

RECIPE = Path(__file__).parents[2] / "configs/tiny/cma.yaml"
NAMES = [name for group in COMMANDS.values() for name in group]


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    """0.3 s on an idle machine. Here: at most 0.3 s of this process's own time more than Python's start."""
    code = (
        "import sys, time; start = time.process_time(); from rime_pl.__main__ import main; main(['--help']);"
        "print(time.process_time() - start, file=sys.stderr);"
        "sys.exit(bool({'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules)))"
    )
    done = in_a_process(code)
    assert done.returncode == 0 and float(done.stderr) < 0.3, done.stderr
    for name in (*STAGES, *NAMES):
        assert f"\n  {name.replace('_', '-')} " in done.stdout
    assert "rime search" in done.stdout and "make train-cma" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serch"], "serch is no command. Did you mean search?"),
        (["refine-lr"], "refine-lr is no command. Did you mean refine-rl?"),
        (
            ["run", "refin-rl"],
            "STAGE must be 'data' or 'base' or 'sft' or 'cma' or 'refine-rl', but is 'refin-rl'. "
            "Did you mean refine-rl?",
        ),
        (["zzz"], "zzz is no command. There are: sft, cma, refine-rl, "),
        (
            ["cma"],
            "`rime cma` needs an action: `rime cma fit` trains and `rime cma test`",
        ),
        (["cma", "--config", "x"], "`rime cma` needs an action"),
        (["cma", "fti"], "fti is no action of `rime cma`. Did you mean fit?"),
        (
            ["refine-rl", "fit"],
            "`rime refine-rl fit` needs --config FILE (for example configs/tiny/refine_rl.yaml) and "
            "--run_dir FOLDER. `rime run refine-rl` sets both.",
        ),
        (["shards", "scene"], "scene is no part of `rime shards`. Did you mean scenes?"),
        (["shards", "scenes"], "`rime shards scenes` needs --output PATH."),
        (["search"], "`rime search` needs QUERY."),
        (["run"], "`rime run` needs STAGE."),
        (["run", "cmx"], "STAGE must be 'data' or 'base' or 'sft' or 'cma' or"),
    ],
)
def test_errors_are_plain(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"rime: error: {message}") and not told.out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rime {__version__}\n"


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_every_command_has_a_help(name: str) -> None:
    module = importlib.import_module(f"rime_pl.commands.{name}")
    functions = vars(module).get("SUBCOMMANDS", {"": module.run})
    for function in functions.values():
        parser = command_parser(function, f"rime {name}")
        assert all(action.help for action in parser._actions), [a.dest for a in parser._actions if not a.help]


def test_the_builders_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "--help"]) == 0
    told = capsys.readouterr().out
    about = {"openmoji": "Render", "scenes": "Draw", "folder": "Turn", "llava-hound": "Build LLaVA-Hound"}
    width = max(map(len, about))  # llava-hound has the longest name
    assert all(f"  {name:<{width}} {word}" in told for name, word in about.items())


def test_a_corpus_is_built_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = ["--train_per_task", "2", "--val-per-task", "1", "--test_per_task", "1", "--captions", "2"]
    contents = ["--val_contents", "8", "--test_contents", "8", "--size", "32"]
    assert main(["shards", "scenes", "--output", str(tmp_path / "corpus"), *counts, *contents]) == 0
    assert "relative" in capsys.readouterr().out and (tmp_path / "corpus/corpus.json").is_file()


# -- commands that take the settings of a stage ---------------------------------------------------------


def looking(settings: StageWords, *, memory: float | None = None, json: bool = False) -> int:
    """Look at the settings of a stage.

    Args:
        settings: The settings.
        memory: GiB of a GPU.
        json: Whether JSON is printed.
    """
    values = settings.read().values
    print(memory, json, values.model.temperature, values.data.batch_size, settings.read().stage)
    return 0


def look(*words: str) -> int:
    module = ModuleType("looking")
    vars(module).update(run=looking, parse=parse_with_settings)
    return command(module, "rime look", list(words))


def test_settings_of_a_stage_stand_beside_a_commands_options(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = ["--config", str(RECIPE)]
    assert look("--memory", "24", *config, "--model.temperature", "0.5", "--json", "--data.batch-size=8") == 0
    assert capsys.readouterr().out == "24.0 True 0.5 8 cma\n"
    with pytest.raises(SystemExit):
        look("--help")
    told = capsys.readouterr().out
    assert "--memory FLOAT" in told and "--config" in told and "settings:" not in told
    assert inspect.signature(looking).parameters.keys() == {"settings", "memory", "json"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "24"], "`rime look` needs --config FILE, for example configs/cma.yaml."),
        (["--memroy", "24"], "--memroy is not an option of `rime look`. Did you mean --memory?"),
        (
            ["--model.temperature", "1"],
            "--model.temperature is not an option of `rime look`. Add --config FILE",
        ),
        (
            ["--config", str(RECIPE), "--memroy", "24"],
            "--memroy is not a setting of `rime look`. Did you mean --mem",
        ),
        (["--config", str(RECIPE), "--model.temprature", "1"], "Did you mean --model.temperature?"),
        (
            ["--config", str(RECIPE.parents[1] / "overlays/ddp.yaml")],
            "the name of the file is not a stage. Add --stage",
        ),
        (["--memory", "much"], "--memory must be a number or null, but is 'much'."),
        (["word"], "`rime look` does not expect 'word'."),
    ],
)
def test_both_kinds_of_options_are_checked(words: list[str], message: str) -> None:
    with pytest.raises(RimeError) as caught:
        look(*words)
    assert message in str(caught.value)


def test_settings_of_a_stage_go_through_rime_run_as_they_are() -> None:
    words = ["cma", "--sft.model.temperature", "0.1", "--seed", "3", "--dry-run"]
    given = run.parse(run.run, "rime run", words)
    assert (given["stage"], given["seed"], given["dry_run"]) == ("cma", 3, True)
    assert given["settings"] == ["--sft.model.temperature", "0.1"]


# -- the help of a stage --------------------------------------------------------------------------------


def test_our_own_settings_come_first_and_the_trainers_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["cma", "fit", "--help"])
    told = capsys.readouterr().out
    groups = ["run:", "model: ", "model.backbone: ", "data: ", "recall: ", "samples: ", "checkpoint: "]
    places = [told.index(f"\n{group}") for group in groups]
    assert places == sorted(places)
    assert "--model.temperature FLOAT" in told and "(default: 0.02)" in told
    assert told.rstrip().endswith("--help_all (or --help-all) shows the trainer's settings as well")
    for words in (
        "--trainer",
        "Linked",
        "CONFIG",
        "Path to a configuration file",
        "derived from links",
        "tasks+",
    ):
        assert words not in told
    for word in ("--help_all", "--help-all"):
        with pytest.raises(SystemExit):
            main(["cma", "fit", word])
        everything = capsys.readouterr().out
        assert everything.index("\ntrainer: ") > everything.index("\ncheckpoint: ")
        assert "--trainer.max_epochs" in everything


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", str(RECIPE)], "`rime cma fit` needs --run_dir FOLDER. `rime run cma` sets both."),
        (["--run_dir", "x", "--data.path", "y"], "`rime cma fit` needs --config FILE"),
        (
            ["--run_dir", "x", "--config", str(RECIPE.parents[1] / "overlays/ddp.yaml")],
            "The settings in --config leave out model.backbone.name_or_path. Add --model.backbone.name_or_pa",
        ),
        (["--run_dir", "x", "--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file."),
        (
            ["--run_dir", "x", "--config", str(RECIPE), "--trainer.max_epoch", "3"],
            "--trainer.max_epoch is not a setting of `rime cma fit`. Did you mean --trainer.max_epochs?",
        ),
        (
            ["--run_dir", "x", "--config", str(RECIPE), "--data.seed", "3"],
            "data.seed always has the value of seed_everything. Set seed_everything instead.",
        ),
        (
            ["--run_dir", "x", "--config", str(RECIPE), "--trainer.strategy", "nonsense"],
            "The trainer refuses these settings. You selected an invalid strategy name",
        ),
        (
            ["--run_dir", "x", "--config", str(RECIPE), "--trainer.precision", "7"],
            "--trainer.precision must be ",
        ),
    ],
)
def test_a_stage_says_what_is_wrong_with_its_settings(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    assert main(["cma", "fit", *words]) == 2
    assert capsys.readouterr().err.startswith(f"rime: error: {message}")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            2,
            "runs/x: No space left on device. Make room",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "runs"),
            2,
            "runs: Read-only file system. Choose a folder",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            2,
            "runs: Permission denied. Change the",
        ),
        (OSError(errno.EMFILE, "Too many open files"), 2, "Too many open files. Raise the limit"),
        (
            FileNotFoundError(2, "No such file or directory", "a.yaml"),
            2,
            "a.yaml: No such file or directory.",
        ),
        (OSError("the first line\nand many others"), 2, "the first line"),
        (OSError(), 2, "OSError"),
        (StoppedError("stopped. Go on with the same command.", 15), 143, "Go on with the same command."),
        (KeyboardInterrupt(), 130, "rime: stopped."),
        (ToldElsewhereError("by the first process"), 0, ""),
    ],
)
def test_what_the_machine_or_a_person_does_is_one_sentence(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def fail(*words: str) -> int:
        raise error

    monkeypatch.setattr("rime_pl.__main__.command", fail)
    assert main(["plan"]) == code
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == bool(told)


def test_a_fault_of_the_program_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rime_pl.__main__.command", lambda *words: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["plan"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    """As in ``rime --help | head -1``, with more output than a pipe holds."""
    code = "import rime_pl.__main__ as m, sys; m.overview = lambda: 'x' * 10**6; sys.exit(m.main([]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_a_thread_that_cannot_write_is_one_sentence_too() -> None:
    """TensorBoard writes its curves in a thread."""
    code = (
        "import threading, rime_pl.__main__ as m; m.main(['--version'])\n"
        "def fail(error): raise error\n"
        "for error in (OSError(28, 'No space left', 'events'), KeyError('a fault')):\n"
        "    thread = threading.Thread(target=fail, args=[error]); thread.start(); thread.join()"
    )
    said = in_a_process(code).stderr
    assert said.startswith("rime: error: events: No space left. Make room on the disk")
    assert said.count("Traceback") == 1 and "KeyError: 'a fault'" in said
