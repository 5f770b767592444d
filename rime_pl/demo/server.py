"""The search page: one page, a JSON endpoint behind it, and small pictures by the row of their item.

Called by commands/demo.py. No answer holds anything from outside, and no path comes from a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from starlette.applications import Starlette
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from rime_pl.demo.guard import Guard
from rime_pl.demo.searcher import SHORT, Answer, Searcher
from rime_pl.demo.uploads import MAX_BYTES, to_query
from rime_pl.demo.worker import Busy, Worker
from rime_pl.errors import RimeError
from rime_pl.types import MODE_PAIRS

HERE = Path(__file__).parent
#: Hosts that a browser on this machine may call the server.
LOCAL = ("127.0.0.1", "localhost", "::1", "[::1]")
#: Queries that wait for the model at most; further ones are answered 503 at once.
QUERIES = 16
#: Pictures that wait to be opened.
PICTURES = 512
#: Seconds in which a query must arrive: meanwhile it has a place.
ARRIVAL = 60.0
BUSY = "The model has {limit} queries before this one. Try again in a moment."


class Page:
    """The answers of the server.

    Args:
        searcher: What searches.
        run: What the page calls the model.
        top_k: Results of a column.
        queries: Queries that wait at most.
    """

    def __init__(self, searcher: Searcher, run: str, top_k: int, queries: int = QUERIES) -> None:
        self.searcher, self.run, self.top_k = searcher, run, top_k
        self.model, self.pictures = Worker(queries, "rime-model"), Worker(PICTURES, "rime-pictures")
        templates = Environment(loader=FileSystemLoader(HERE), autoescape=True)
        words = {}
        for pair in MODE_PAIRS:
            asked, target = (SHORT[name] for name in pair.split("-"))
            words[pair] = f"{asked} query, {target} targets"
        self.page = templates.get_template("page.html").render(
            run=run, about=searcher.about, pairs=MODE_PAIRS, words=words, megabytes=MAX_BYTES // 10**6
        )

    async def home(self, request: Request) -> Response:
        return HTMLResponse(self.page)

    async def search(self, request: Request) -> Response:
        """Answer ``text`` and ``file`` of a form with four columns; see :class:`Answer`."""
        async with contextlib.AsyncExitStack() as kept:
            kept.enter_context(self.model.place())  # first: who finds none leaves no file
            form = await _received(request)
            kept.push_async_callback(form.close)
            text, upload = form.get("text", ""), form.get("file")
            if not isinstance(text, str):
                raise HTTPException(400, "The words must be text.")
            file, name = None, ""
            if isinstance(upload, UploadFile) and (upload.filename or upload.size):
                name = Path(upload.filename or "").name[-80:] or "the file"
                file = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="rime-"))) / "upload"
                with file.open("wb") as to:
                    while part := await upload.read(1 << 20):
                        to.write(part)
            answer = await self.model.run(partial(self._search, text, file, name))
        return JSONResponse(asdict(answer))

    def _search(self, text: str, file: Path | None, name: str) -> Answer:
        return self.searcher.search(to_query(text, file, name), self.top_k)

    async def picture(self, request: Request) -> Response:
        """Answer the row of an item with a small picture."""
        id = request.path_params["id"]
        with self.pictures.place():
            data = await self.pictures.run(partial(self.searcher.picture, id))
        if data is None:
            raise HTTPException(404, "There is no picture of this item.")
        # not cached: another index at this port has another picture in this row
        return Response(data, media_type="image/webp")

    @contextlib.asynccontextmanager
    async def life(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.model.close()
        self.pictures.close()


async def _received(request: Request) -> FormData:
    """Return the form of a request; a slow sender must not keep its place for ever."""
    try:
        async with asyncio.timeout(ARRIVAL):
            return await request.form(max_files=1, max_fields=4)
    except TimeoutError as error:
        raise HTTPException(408, f"The query must arrive within {ARRIVAL:.0f} seconds.") from error


def application(page: Page, hosts: Sequence[str] = LOCAL) -> Starlette:
    """Return the application.

    Args:
        page: Its answers.
        hosts: What a request may call the server in its header Host; others are refused, so that no site
            can point its own name at this machine.
    """

    async def wrong(request: Request, error: Exception) -> Response:
        """Answer with a sentence."""
        if isinstance(error, Busy):
            told = BUSY.format(limit=page.model.limit)
            return JSONResponse({"error": told}, 503, headers={"Retry-After": "2"})
        if isinstance(error, HTTPException):
            return JSONResponse({"error": error.detail}, error.status_code)
        return JSONResponse({"error": str(error)}, 400)

    def file(name: str, kind: str) -> Route:
        async def send(request: Request) -> Response:
            return FileResponse(HERE / name, media_type=kind)

        return Route(f"/{name}", send)

    return Starlette(
        routes=[
            Route("/", page.home),
            Route("/search", page.search, methods=["POST"]),
            Route("/picture/{id:int}", page.picture),
            file("page.js", "text/javascript"),
            file("page.css", "text/css"),
        ],
        middleware=[
            Middleware(Guard, max_bytes=MAX_BYTES),
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
        ],
        exception_handlers={RimeError: wrong, Busy: wrong, HTTPException: wrong},
        lifespan=page.life,
    )
