"""`rime demo --run RUN`: a search page in the browser, with the four mode pairs next to each other."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from rime_pl.commands.conflicts import DEMO, refuse_ignored
from rime_pl.commands.search import corpus_pictures, corpus_tasks
from rime_pl.commands.search_index import choose_run
from rime_pl.demo.searcher import GallerySearcher, IndexSearcher, Searcher
from rime_pl.errors import RimeError
from rime_pl.inference.loading import load
from rime_pl.inference.retriever import Retriever
from rime_pl.inference.search import open_index
from rime_pl.options.parser import parse as parse_options
from rime_pl.run_folder import RunFolder
from rime_pl.types import Item

#: A name of a machine, or its address.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")
#: Connections at a time; uvicorn answers 503 to more.
CONNECTIONS = 200
_PACKAGES = ("starlette", "uvicorn", "jinja2", "python_multipart")


def parse(function: Any, prog: str, words: Sequence[str]) -> dict[str, Any]:
    """Return the arguments."""
    return refuse_ignored(DEMO, function, parse_options(function, prog, words))


def run(
    *,
    run: Path | None = None,
    index: Path | None = None,
    media: Path | None = None,
    top_k: int = 8,
    task: str | None = None,
    instruction: str | None = None,
    batch_size: int = 32,
    host: str = "127.0.0.1",
    port: int = 8320,
    names: list[str] | None = None,
    device: str | None = None,
    base: str | None = None,
) -> int:
    """Serve a search page: type words, drop a picture or a clip, and see what each mode pair finds.

    Only this machine can reach it, unless --host says otherwise. Ctrl-C ends it.

    Args:
        run: Folder of a run (default: the one that made the index, or else the one in runs/ that finished
            last).
        index: Folder of an index, from `rime index` (default: the pictures of the run's corpus).
        media: Folder of the media of the index, if they are not where they were.
        top_k: Results of each mode pair.
        task: Task whose instructions are used (default: the first that asks in words alone for a picture).
        instruction: Instruction of the query in the place of the task's.
        batch_size: Pictures encoded at a time.
        host: Address to listen at; 0.0.0.0 lets the network in.
        port: Port to listen at; 0 takes a free one.
        names: Further names by which browsers may call the server, such as that of this machine.
        device: Device of the model, such as cpu or cuda (default: cuda if there is one).
        base: Folder or Hugging Face name of the base model (default: where it was in training).
    """
    _check(top_k, port, names or [])
    listening = _listen(host, port, names or [])  # before minutes go into the gallery
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    stage = choose_run(run, console, index)
    retriever = load(stage.path, device or ("cuda" if torch.cuda.is_available() else "cpu"), base)
    retriever.tasks = retriever.tasks or corpus_tasks(stage)
    searcher: Searcher
    if index is not None:
        searcher = IndexSearcher(open_index(index, retriever, media), str(index), task, instruction)
    else:
        _embed(retriever, stage, task, batch_size, console)
        searcher = GallerySearcher(retriever, f"the corpus of {stage}", task, instruction)
    searcher.search(Item("a first search, which is slow"), top_k)
    _serve(searcher, str(stage), top_k, listening, host, names or [], console)
    return 0


def _check(top_k: int, port: int, names: list[str]) -> None:
    """Refuse what cannot be before a model is loaded."""
    if missing := [name for name in _PACKAGES if find_spec(name) is None]:
        raise RimeError(f"The page needs {', '.join(missing)}: pip install 'rime_pl[demo-page]'.")
    for name in names:
        if not _NAME.fullmatch(name):  # a star would let any site in
            raise RimeError(f"--names must be names such as my-machine.local, but one is {name!r}.")
    if not 1 <= top_k <= 100:
        raise RimeError(f"--top_k must be 1 to 100, but is {top_k}.")
    if not 0 <= port <= 65535:
        raise RimeError(f"--port must be 0 to 65535, but is {port}.")


def _everywhere(listening: socket.socket) -> bool:
    """Return whether the network can reach a socket at every address of this machine."""
    return ipaddress.ip_address(listening.getsockname()[0]).is_unspecified


def _listen(host: str, port: int, names: Sequence[str]) -> socket.socket:
    """Return a socket that listens; a RimeError if somebody else does, or nobody says what it is called."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host, port), family=family)
        if _everywhere(found) and not names:
            found.close()
            raise RimeError(
                f"--host {host or repr(host)} lets the network in, so --names must say how browsers call "
                f"this machine, such as --names {socket.gethostname()}. Other names are refused."
            )
        return found
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            told = f"--port {port} is in use already. Give another one, or --port 0 for a free one."
        else:
            told = f"--host {host} --port {port}: cannot listen there: {error.strerror or error}."
        raise RimeError(told) from error


def _embed(
    retriever: Retriever, stage: RunFolder, task: str | None, batch_size: int, console: Console
) -> None:
    """Make the pictures of the run's corpus the gallery; the run folder keeps their embeddings."""
    gallery = corpus_pictures(stage, console)
    gallery.special = retriever.backbone.processor.special_pattern
    target = retriever.instruction("target", task) if retriever.tasks or task else ""
    retriever.index(gallery, batch_size=batch_size, instruction=target, progress=True, skip_unusable=True)


def _serve(
    searcher: Searcher,
    run: str,
    top_k: int,
    listening: socket.socket,
    host: str,
    names: list[str],
    console: Console,
) -> None:
    import uvicorn

    from rime_pl.demo.server import LOCAL, Page, application

    everywhere = _everywhere(listening)
    own = [] if everywhere else [host]
    app = application(Page(searcher, run, top_k), [*LOCAL, *own, *names])
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, limit_concurrency=CONNECTIONS
    )
    shown = names[0] if everywhere else f"[{host}]" if ":" in host else host
    console.print(f"search page: http://{shown}:{listening.getsockname()[1]}/   Ctrl-C ends it.")
    console.file.flush()  # a program may wait for the address
    uvicorn.Server(config).run(sockets=[listening])
