"""What every answer of the page carries, and what no request may do.

Called by the server beside it. A page of another site must not read from this one, send queries to it, or put
it into a frame; and no request may send more bytes than the limit.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'self'",
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Adds the headers, refuses requests that another site sends, and counts the bytes of a request.

    Args:
        app: The application.
        max_bytes: Largest request.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                raise HTTPException(413, self.too_large())
            return message

        async def headed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
            await send(message)

        if refused := self._refused(Headers(scope=scope)):
            await refused(scope, receive, headed)
        else:
            await self.app(scope, counted, headed)

    def _refused(self, headers: Headers) -> JSONResponse | None:
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != headers.get("host"):
            return JSONResponse({"error": "Another site must not send queries to this page."}, 403)
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return JSONResponse({"error": self.too_large()}, 413)
        return None

    def too_large(self) -> str:
        """Return what a visitor reads who sends too much."""
        return f"A picture or clip must have at most {self.max_bytes / 1e6:.0f} MB. Shrink it."
