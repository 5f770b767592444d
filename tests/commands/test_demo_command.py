"""`rime demo`: it serves until Ctrl-C, and refuses what cannot be before a model is loaded."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from rime_pl.__main__ import main
from rime_pl.types import MODE_PAIRS
from tests.inference.conftest import run_folder  # noqa: F401 - a fixture


@pytest.mark.long
def test_it_serves_the_pictures_of_the_corpus_until_ctrl_c(run_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    words = ["demo", "--run", str(run_folder), "--device", "cpu", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rime_pl", *words],
        stdout=subprocess.PIPE,
        stderr=(tmp_path / "errors").open("w"),
        text=True,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert process.stdout is not None
    try:
        said = ""
        while not (found := re.search(r"search page: (http://127\.0\.0\.1:\d+/)", said)):
            line = process.stdout.readline()
            assert line, (tmp_path / "errors").read_text()
            said += line
        reply = httpx.post(f"{found[1]}search", data={"text": "a red ring"}, timeout=60)
        columns = reply.json()["columns"]
        assert [column["pair"] for column in columns] == list(MODE_PAIRS)
        assert all(len(column["results"]) == 8 for column in columns)
        row = columns[0]["results"][0]["id"]
        assert httpx.get(f"{found[1]}picture/{row}", timeout=60).headers["content-type"] == "image/webp"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
    errors = (tmp_path / "errors").read_text()
    assert "rime: stopped." in errors and "Traceback" not in errors


def test_what_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(["demo", "--run", str(tmp_path), *words]) == 2
        return capsys.readouterr().err

    assert "--top_k must be 1 to 100" in refused("--top_k", "0")
    assert "--port must be 0 to 65535" in refused("--port", "70000")
    assert "--host 0.0.0.0 lets the network in, so --names must say" in refused("--host", "0.0.0.0")
    assert "cannot listen there" in refused("--host", "192.0.2.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port} is in use already" in refused("--port", port)
    assert "no finished run" in refused("--port", "0")
