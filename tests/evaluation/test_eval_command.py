"""`rime eval` on tiny copies in the official layouts: files key by key, reports, tables, errors."""

import json
from pathlib import Path
from typing import Any

import pytest

from rime_pl.__main__ import main
from rime_pl.datamodules.benchmarks.mmeb_v2_table import FIXED, mmeb_v2_table
from rime_pl.datamodules.benchmarks.reading import task_names
from rime_pl.metrics.ranking import TIE_RULE
from tests.datamodules.benchmarks.official_copies import write_image_task
from tests.datamodules.benchmarks.official_documents import (
    write_document_task,
    write_mrmr_task,
    write_uvrb_task,
)

SCORES = ["hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr"]


def evaluate(benchmark: str, root: Path, run: Path, output: Path, *more: str) -> tuple[int, Any]:
    words = ["eval", benchmark, "--root", str(root), "--run", str(run), "--output", str(output)]
    code = main([*words, "--accelerator", "cpu", *more])
    result = output / "result.json"
    return code, json.loads(result.read_text()) if result.is_file() else None


def test_mmeb_v2_writes_the_official_files(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, out = tmp_path / "root", tmp_path / "out"
    for name in ("CIRR", "HatefulMemes"):
        write_image_task(root, name)
    write_document_task(root, "ViDoSeek-doc")
    words = ("--modes", "gen-disc", "disc-disc", "--model_name", "tiny", "--url", "a page")
    code, result = evaluate("mmeb-v2", root, run, out, *words)
    assert code == 1  # 75 tasks are missing
    told = capsys.readouterr().out
    assert "K700 is missing: " in told and "3 of 78" in told and "Qwen3-VL-Embedding-8B" in told
    for pair in ("gen-disc", "disc-disc"):
        scores = json.loads((out / pair / "image" / "CIRR_score.json").read_text())
        assert list(scores) == [
            *(f"{name}@{k}" for name in SCORES for k in (1, 5, 10)),
            *("num_pred", "num_data"),
        ]
        assert scores["num_pred"] == scores["num_data"] == 3 and 0 <= scores["hit@1"] <= 1
        lines = (out / pair / "visdoc" / "ViDoSeek-doc_pred.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        assert len(found) == scores_of(out, pair, "visdoc", "ViDoSeek-doc")["num_pred"]
        for row in found:
            assert list(row) == ["prediction", "label", "rel_scores"]
            assert len(row["label"]) == len(row["rel_scores"]) and set(row["label"]) <= set(row["prediction"])
        plain = (out / pair / "image" / "CIRR_pred.jsonl").read_text().splitlines()[0]
        assert json.loads(plain)["rel_scores"] is None
        assert len((out / pair / "image" / "CIRR_info.jsonl").read_text().splitlines()) == 3
        report = json.loads((out / pair / "tiny.json").read_text())
        assert list(report["metadata"]) == [
            *("model_name", "model_backbone", "model_size", "embedding_dimension", "max_length_tokens"),
            *("model_release_date", "data_source", "url", "report_generated_date"),
        ]
        assert report["metadata"]["url"] == "a page" and report["metadata"]["embedding_dimension"] == 64
        names = [FIXED.get(one.name, one.name) for one in mmeb_v2_table()]
        assert [name for tasks in report["metrics"].values() for name in tasks] == names
        assert report["metrics"]["image"]["CIRR"] == scores
        assert report["metrics"]["video"]["K700"] == result["missing"]["K700"]["code"]
        average = result["averages"][pair]
        assert average["tasks"] == "3 of 78" and average["overall"] is None
    assert result["protocol"]["modes"] == ["disc-disc", "gen-disc"] and result["tie_rule"] == TIE_RULE
    assert result["protocol"]["frames"] == 8 and result["protocol"]["pad_clips"] == "False"
    task = result["tasks"]["ViDoSeek-doc"]
    assert task["version"] and {"ties", "queries_with_ties", "main"} <= task["results"]["gen-disc"].keys()
    assert task["cost"]["query"]["ms_per_item"]["generative"] > 0
    assert len(result["missing"]) == 75
    assert (out / "table.md").read_text().count("\n| ") > 80


def scores_of(out: Path, pair: str, modality: str, name: str) -> dict[str, float]:
    found: dict[str, float] = json.loads((out / pair / modality / f"{name}_score.json").read_text())
    return found


def test_a_second_call_embeds_nothing_and_gives_the_same(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image_task(tmp_path / "root", "MSCOCO_i2t")
    first = evaluate("mmeb-v2", tmp_path / "root", run, tmp_path / "a", "--tasks", "MSCOCO_i2t")
    monkeypatch.setattr("rime_pl.inference.retriever.Retriever.encode_modes", None)
    second = evaluate("mmeb-v2", tmp_path / "root", run, tmp_path / "b", "--tasks", "MSCOCO_i2t")
    for _, result in (first, second):
        result["tasks"]["MSCOCO_i2t"].pop("scored_at")
    assert first == second and first[0] == 0
    parts = list((run / "benchmark_embeddings").rglob("*.safetensors"))
    assert parts, "the default place of the embeddings"


def test_mrmr_and_uvrb_have_reports_with_their_averages(run: Path, tmp_path: Path) -> None:
    for name in task_names("mrmr"):
        write_mrmr_task(tmp_path / "mrmr", name)
    code, result = evaluate("mrmr", tmp_path / "mrmr", run, tmp_path / "m", "--modes", "disc-disc")
    assert code == 0 and result["averages"]["disc-disc"]["tasks"] == "5 of 5"
    report = json.loads((tmp_path / "m" / "disc-disc" / "demo-cma.json").read_text())
    assert report["averages"] == result["averages"]["disc-disc"] and set(report["metrics"]) == set(
        task_names("mrmr")
    )
    assert report["averages"]["mean_over_5_datasets"] is not None
    for name in ("MSRVTT", "DiDeMo", "CRB-G"):
        write_uvrb_task(tmp_path / "uvrb", name)
    code, result = evaluate("uvrb", tmp_path / "uvrb", run, tmp_path / "u", "--modes", "disc-disc")
    assert code == 1 and result["averages"]["disc-disc"]["CG"] is not None
    assert result["averages"]["disc-disc"]["A-AVG"] is None


def test_a_trial_with_few_queries_is_no_result(run: Path, tmp_path: Path) -> None:
    write_image_task(tmp_path / "root", "CIRR")
    words = ("--tasks", "CIRR", "--modes", "disc-disc", "--limit", "2")
    code, result = evaluate("mmeb-v2", tmp_path / "root", run, tmp_path / "out", *words)
    assert code == 0 and result["protocol"]["limit"] == 2 and result["tasks"]["CIRR"]["queries"] == 2
    assert result["averages"]["disc-disc"]["tasks"] == "0 of 78"
    assert "cut to the first 2 of 3 queries" in result["tasks"]["CIRR"]["notes"]
    assert not (tmp_path / "out" / "disc-disc" / "demo-cma.json").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--modes", "gen"), "--modes must name mode pairs, query - target, some of disc-disc"),
        (("--batch_size", "0"), "--batch_size must be 1 or more, but is 0"),
        (("--devices", "0"), "--devices must be 1 or more"),
        (("--limit", "0"), "--limit must be 1 or more"),
        (("--model_name", "a/b"), "--model_name must be a name that a file can have"),
        (("--accelerator", "gpu", "--devices", "99"), "--devices must be at most the number of GPUs"),
        (("--release_date", "yesterday"), "--release_date must be a day such as 2026-11-27"),
        (("--tasks", "CIRR", "CIRR"), "--tasks must name each task once"),
        (("--tasks", "CIR"), "must be among"),
        ((), "The folder of mmeb-v2 must hold one of image-tasks, "),
        (("--root", "no such folder"), "but there is none: no such folder"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(
    run: Path, tmp_path: Path, words: Any, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "root").mkdir()
    words = ("--modes", "disc-disc", *words) if "--modes" not in words else words
    given = ["eval", "mmeb-v2", "--root", str(tmp_path / "root"), "--run", str(run), *words]
    assert main(given) == 2
    assert says in capsys.readouterr().err
    assert not (run / "benchmarks").exists()


def test_a_folder_of_captions_that_is_missing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--root", str(tmp_path), "--run", str(run), "--captions", str(tmp_path / "none")]
    assert main(["eval", "mrmr", *words]) == 2
    assert "--captions must be a folder, but there is none" in capsys.readouterr().err
