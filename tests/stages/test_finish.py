"""What the end of a stage writes, without training one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rime_pl import cli
from rime_pl.callbacks.retrieval_recall import RetrievalRecall
from rime_pl.callbacks.utilisation import Utilisation
from rime_pl.datamodules.corpora import Corpora
from rime_pl.run_folder import RunFolder

AFTER = {"recall@1": {"disc-disc": 0.5}}


@pytest.mark.parametrize("steps", [0, 9])
def test_an_adapter_is_not_compared_with_itself(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rime cma test --model.init_adapter_from RUN/adapter` trains nothing, so there is no before."""
    run = tmp_path / "cma"
    (run / "adapter").mkdir(parents=True)
    (run / "manifest.json").write_text(json.dumps({"data_hash": "same"}))
    (run / "summary.json").write_text(json.dumps({"after": AFTER}))
    written: dict[str, Any] = {}
    monkeypatch.setattr(cli, "write_report", lambda **given: written.update(given))
    made: Any = SimpleNamespace(
        trainer=SimpleNamespace(
            is_global_zero=True, callbacks=[RetrievalRecall(), Utilisation()], world_size=1
        ),
        config=SimpleNamespace(seed_everything=0),
        datamodule=SimpleNamespace(
            **{"data_hash": "same", "batch_size": 4, "broken": {}, "cut": []},
            **{"path": "data", "corpora": Corpora.of({"data": 1.0, "more": 2.0})},
        ),
        model=SimpleNamespace(
            init_adapter_from=str(run / "adapter"),
            negatives_per_query=None,
            start_hash="a",
            config=SimpleNamespace(name_or_path="base"),
            model=SimpleNamespace(base_hash="b"),
        ),
        run_folder=RunFolder(tmp_path / "all"),
    )
    cli.finish(made, "cma", {"test": 1.0}, [], steps)
    assert written["results"] == {}
    if steps:
        cli.finish(made, "cma", {"fit": 1.0}, [], steps)
        assert written["results"] is None  # never those of the last validation
    assert written["before"] == (None if steps == 0 else {"after": AFTER})
    assert written["facts"]["corpora"] == {"data": 1.0, "more": 2.0}
    assert written["facts"]["data"] == "data" and "data_places" in written["facts"]
