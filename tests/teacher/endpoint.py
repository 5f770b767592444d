"""An endpoint of chat completions on this machine, with the faults of real ones. No network is used."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the endpoint sends back."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    hangs: float = 0.0  # seconds before anything is sent
    trickles: bool = False  # a byte now and then, without end
    missing: int = 0  # bytes at the end that never come, though they are announced


#: The request's body and its number, from 0 -> the reply.
Behaviour = Callable[[dict[str, Any], int], Reply]


def answer(text: str, finish: str = "stop", usage: bool = True, **more: Any) -> Reply:
    """A good answer."""
    body: dict[str, Any] = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "teacher",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **more}}
        ],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return Reply(body=json.dumps(body).encode())


def fault(status: int, message: str = "no", code: str | None = None, **headers: str) -> Reply:
    """An error as OpenAI sends it; ``retry_after`` becomes Retry-After."""
    body = {"error": {"message": message, "type": "error", "code": code}}
    return Reply(
        status, json.dumps(body).encode(), {name.replace("_", "-"): text for name, text in headers.items()}
    )


def words_in(body: dict[str, Any]) -> str:
    """The text of a request, without its system prompt and pictures."""
    content = body["messages"][1]["content"]
    return content if isinstance(content, str) else content[-1].get("text", "")


class Endpoint:
    """What it was asked, and where it is."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []  # of the header Authorization
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.url = ""
        self.lock = threading.Lock()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError | ValueError):  # the client has gone, the file is closed
            super().handle_error(request, client_address)


@contextmanager
def serving(behaviour: Behaviour) -> Iterator[Endpoint]:
    """An endpoint that runs while the block does."""
    endpoint = Endpoint(behaviour)
    server = _Server(("127.0.0.1", 0), _handler(endpoint))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(endpoint: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                number = len(endpoint.bodies)
                endpoint.bodies.append(body)
                endpoint.keys.append(self.headers["Authorization"])
                endpoint.times.append(time.monotonic())
                endpoint.at_once += 1
                endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
            try:
                self.reply(endpoint.behaviour(body, number))
            except (BrokenPipeError, ConnectionResetError):  # the client did not wait
                self.close_connection = True
            finally:
                with endpoint.lock:
                    endpoint.at_once -= 1

        def reply(self, reply: Reply) -> None:
            time.sleep(reply.hangs)
            self.send_response(reply.status)
            self.send_header("Content-Type", "application/json")
            length = 10_000 if reply.trickles else len(reply.body)
            self.send_header("Content-Length", str(length))
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if reply.trickles:
                for _ in range(200):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.02)
            self.wfile.write(reply.body[: len(reply.body) - reply.missing])
            self.close_connection = bool(reply.missing or reply.trickles)

        def log_message(self, format: str, *args: Any) -> None:
            return

    return Handler
