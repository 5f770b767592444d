"""The command `rime`: hands over to a stage (cli.py) or to one of rime_pl/commands, and prints errors.

Nothing heavy is imported before it is known what is wanted, so that `rime --help` answers at once.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import importlib
import inspect
import os
import re
import signal
import sys
import threading
from types import ModuleType
from typing import Any, NoReturn

from rime_pl import __version__
from rime_pl.errors import RimeError, StoppedError, ToldElsewhereError
from rime_pl.quiet import quiet_other_libraries

STAGES = {
    "sft": "stage 1: learn to rewrite and to embed, jointly",
    "cma": "stage 2: cross-mode alignment, any mode retrieves any mode",
    "refine_rl": "stage 3: improve the rewrite by reinforcement learning",
}
#: Further commands, by what they are for: name -> what it does. Each is rime_pl/commands/<name>.py.
COMMANDS = {
    "train with one command": {
        "run": "train a stage, and before it whatever it needs and is missing",
    },
    "data and models": {
        "shards": "build, check or inspect a corpus: openmoji, scenes, mini, a public or your own one",
        "rewrite": "let a larger model write the rewrites of a corpus or a table",
        "mine": "give the training pairs of a corpus hard negatives, found with a trained checkpoint",
        "base": "make the tiny base model from the captions or training pairs of a corpus",
    },
    "look at runs": {
        "runs": "list runs side by side: state, recalls and what differs from the recipe",
        "report": "write one HTML file about runs: modes, cost, examples, curves, settings",
    },
    "use": {
        "search": "search the pictures of a finished run, a folder of your own, or an index",
        "index": "embed a collection once: folders, PDF files, tables, texts or a corpus",
        "demo": "serve a search page: words, pictures or clips, and what each mode pair finds",
        "eval": "score a run on a local copy of a public benchmark: MMEB-V2, MRMR or UVRB",
        "export": "write a trained model for sentence-transformers, transformers, vLLM or PEFT",
    },
    "before a run": {
        "plan": "predict memory, time and disk of a run, and what to change if it does not fit",
        "doctor": "check installation, settings and adapter; each problem with its remedy",
    },
    "study": {
        "tune": "choose the weight of the cross-entropy for rewrite and chain of thought, on validation",
        "compare": "train the controls of a finished run and write their table and picture",
        "claims": "write the page of the claims from what compare wrote, over seeds and corpora",
    },
}
FIRST_STEPS = """\
first steps, in a checkout of the repository:
  make train-cma                 build the demo data and train stages 1 and 2, minutes on a laptop's CPU
  rime search "a woman firefighter with medium skin"
                                 search the demo pictures in both modes"""
#: What a collective says when another process has ended: gloo, NCCL, and the store that they meet at.
LOST = re.compile("Connection (closed|reset) by peer|Connection was likely closed|remote process exited")
#: Errors of the machine in threads while a command runs, which nobody has told yet; None before and after.
_of_threads: list[OSError] | None = None
#: Variable of the environment with the number of the first process; of torchrun's processes only that has it.
FIRST_PROCESS = "RIME_FIRST_PROCESS"
ACTIONS = {"fit": "trains", "test": "tests a checkpoint"}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code.

    0 is well, 1 problems found, 2 an error that the user or the machine made, 130 stopped by Ctrl-C.
    """
    global _of_threads
    argv = sys.argv[1:] if argv is None else argv
    keep_freed_memory()
    end_with_first_process()
    quiet_other_libraries()
    _of_threads = []
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = failed_thread
    try:
        code = dispatch(argv)
        if _of_threads:  # no other error has told it
            raise _of_threads[0]
        sys.stdout.flush()  # where nobody reads it any more, the error comes here
        return code
    except Exception as error:
        return failed(error)
    except StoppedError as stopped:
        print(f"rime: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        print("rime: stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        _of_threads = None


def dispatch(argv: list[str]) -> int:
    """Run what the words ask for and return its exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"rime {__version__}")
        return 0
    name, words = argv[0].replace("-", "_"), argv[1:]
    commands = [each for group in COMMANDS.values() for each in group]
    if name in STAGES:
        return stage(name, words)
    if name in commands:
        return command(importlib.import_module(f"rime_pl.commands.{name}"), f"rime {argv[0]}", words)
    raise RimeError(no_such("command", argv[0], [*STAGES, *commands]))


def failed(error: Exception) -> int:
    """Print an error that is not a fault of this program, in one sentence, and return the exit code.

    Raises:
        Exception: The error itself, if it is a fault of this program.
    """
    if isinstance(error, ToldElsewhereError):
        return (
            0  # not 2: Lightning kills the first process when another one fails, maybe before it has spoken
        )
    if isinstance(error, BrokenPipeError):  # the reader of our output has gone, as in `rime ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, RuntimeError) and LOST.search(str(error)):
        if is_further_process():
            return 0  # the first one tells
        error = RimeError(
            "another process of this run has ended, so this one ends, too. The reason may be above. The same "
            "command goes on from the last checkpoint."
        )
    if not isinstance(error, (RimeError, OSError)):
        raise error
    print(f"rime: error: {machine_error(error) if isinstance(error, OSError) else error}", file=sys.stderr)
    return 2


def failed_thread(args: threading.ExceptHookArgs) -> None:
    """Keep what the machine did to a thread, as when TensorBoard cannot write its curves.

    The next curve raises the same error where the folder is known, so it is told once. After the command, it
    is told at once.
    """
    if isinstance(args.exc_value, OSError) and _of_threads is not None:
        _of_threads.append(args.exc_value)
    elif isinstance(args.exc_value, OSError):
        failed(args.exc_value)
    else:
        threading.__excepthook__(args)


def machine_error(error: OSError) -> str:
    """Return what went wrong with a file or the disk, and what to do about it."""
    remedies = {
        errno.ENOSPC: "Make room on the disk, and give the same command again.",
        errno.EDQUOT: "Make room within the quota, and give the same command again.",
        errno.EROFS: "Choose a folder that can be written.",
        errno.EACCES: "Change the permissions of the file or folder, or choose another one.",
        errno.EMFILE: "Raise the limit of open files: ulimit -n 4096.",
    }
    if error.errno is None:
        return str(error).strip().splitlines()[0] if str(error) else type(error).__name__
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror}. {remedies.get(error.errno, '')}".strip()


def overview() -> str:
    """Return what ``rime --help`` prints."""
    groups = {"train (rime STAGE fit --config FILE --run_dir FOLDER)": STAGES, **COMMANDS}
    lines = [
        "usage: rime COMMAND ...",
        "",
        "Train and study multimodal embeddings that rewrite before they embed.",
    ]
    for title, names in groups.items():
        lines += ["", f"{title}:"]
        lines += [f"  {_shown(name):<10} {text}" for name, text in names.items()]
    lines += ["", FIRST_STEPS, "", "`rime COMMAND --help` shows the options of a command."]
    return "\n".join(lines)


def stage(name: str, words: list[str]) -> int:
    """Run ``rime STAGE fit|test ...``; obvious mistakes are told before anything heavy is imported."""
    from rime_pl.options.words import needs

    shown, first = _shown(name), words[0] if words else ""
    if first == "-h" or first.startswith("--help"):
        words = ["fit", *words]
    elif not first or first.startswith("-"):
        told = " and ".join(f"`rime {shown} {action}` {what}" for action, what in ACTIONS.items())
        raise RimeError(f"`rime {shown}` needs an action: {told}.")
    elif first not in ACTIONS:
        raise RimeError(no_such(f"action of `rime {shown}`", first, list(ACTIONS)))
    if not words[1:]:
        raise RimeError(needs(f"rime {shown} {words[0]}"))
    from rime_pl.cli import run_stage

    return run_stage(name, words[0], words[1:])


def command(module: ModuleType, prog: str, words: list[str]) -> int:
    """Run a command: ``run`` is called with what its signature takes from the command line.

    A module with ``SUBCOMMANDS`` (name -> function) takes one of the names first; then ``run(name, options)``
    is called. A module that also takes the settings of a stage brings a ``parse`` of its own.
    """
    names = vars(module)
    if "SUBCOMMANDS" in names:
        return _subcommand(module, prog, words)
    parse = names.get("parse") or importlib.import_module("rime_pl.options.parser").parse
    return int(module.run(**parse(module.run, prog, words)))


def _subcommand(module: ModuleType, prog: str, words: list[str]) -> int:
    from rime_pl.options.parser import parse

    functions: dict[str, Any] = module.SUBCOMMANDS
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: {prog} {'|'.join(functions)} [--OPTION VALUE ...]\n\n{inspect.getdoc(module)}\n")
        width = max(map(len, functions))
        for name, function in functions.items():
            print(f"  {name:<{width}} {(inspect.getdoc(function) or '').splitlines()[0]}")
        print(f"\n`{prog} {next(iter(functions))} --help` shows the options.")
        return 0
    if words[0] not in functions:
        raise RimeError(no_such(f"part of `{prog}`", words[0], list(functions)))
    options = parse(functions[words[0]], f"{prog} {words[0]}", words[1:], positional=False)
    return int(module.run(words[0], options))


def no_such(what: str, word: str, known: list[str]) -> str:
    """Return the message for a name that does not exist, with the nearest one that does."""
    from rime_pl.options.words import nearest

    near = nearest(word.replace("-", "_"), known)
    names = ", ".join(_shown(name) for name in known)
    hint = f"Did you mean {_shown(near)}?" if near else f"There are: {names}."
    return f"{word} is no {what}. {hint}"


def _shown(name: str) -> str:
    return name.replace("_", "-")


def is_further_process() -> bool:
    """Return whether this is one of the processes that the first one has started."""
    return os.environ.get("LOCAL_RANK", "0") != "0"


def end_with_first_process() -> None:
    """Let the system kill a further process when the first one ends, even when that was killed.

    It would wait for the first one for half an hour. One that starts after that end finds another parent.
    """
    if not is_further_process():
        os.environ[FIRST_PROCESS] = str(os.getpid())
    elif sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.environ.get(FIRST_PROCESS, str(os.getppid())) != str(os.getppid()):
            os._exit(1)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of handing it back after every large tensor.

    On a CPU each training step frees and takes hundreds of MB; page faults made it 1.8 times slower.
    """
    if sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no mallopt
        return
    for option, value in (
        (m_mmap_threshold, 1 << 30),
        (m_trim_threshold, (1 << 31) - 1),
        (m_top_pad, 1 << 28),
    ):
        mallopt(option, value)


def console() -> NoReturn:
    """Be the command ``rime``: `main`, where Ctrl-C is one sentence at any moment.

    It may come while a library is imported, which turns it into an error of its own; in a place where Python
    prints and forgets it; or again while the first one is told.
    """
    pressed = False

    def press(signum: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    def forgotten(error: Any) -> None:  # in a destructor, or the callback of a weak reference
        if issubclass(error.exc_type, KeyboardInterrupt):
            again = threading.Timer(0.05, signal.raise_signal, (signal.SIGINT,))
            again.daemon = True
            again.start()
        elif not pressed:  # else a library could not finish what Ctrl-C cut off
            sys.__unraisablehook__(error)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in a background job
        signal.signal(signal.SIGINT, press)
        sys.unraisablehook = forgotten
    try:
        code = main()
    except BaseException:
        if not pressed:
            raise
        code = 128 + signal.SIGINT
        print("rime: stopped.", file=sys.stderr)
    if sys.unraisablehook is forgotten:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is told: from here on it ends without a word
    leave(code and (128 + signal.SIGINT if pressed else code))


def leave(code: int) -> NoReturn:
    """End this process; one of several ends without Python's own last steps.

    In them, a thread of gloo that still lets go of a tensor aborts the process, and Lightning then kills the
    first one, whose work is done (https://github.com/pytorch/pytorch/issues/190489).
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        sys.exit(code)
    atexit._run_exitfuncs()  # workers that read data, NCCL's group
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    console()
