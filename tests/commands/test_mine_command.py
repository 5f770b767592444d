"""`rime mine` through the real command line, with a micro model after three steps of SFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import rime_pl
from rime_pl.__main__ import main
from rime_pl.backbone.adapters import read_contract
from rime_pl.datamodules.checking import check_corpus
from rime_pl.datamodules.corpus_file import read_corpus
from rime_pl.datamodules.shard_writer import write_corpus
from rime_pl.datamodules.shards import read_split
from rime_pl.inference.parts import PARTS
from rime_pl.inference.retriever import Retriever
from rime_pl.types import Pair
from tests.micro import read_pairs
from tests.stages.runs import read_json, scalars, stage_arguments

#: One epoch of three steps that measures as little as it can.
SHORT = (
    *("--trainer.max_epochs", "1", "--data.limit_val_queries", "6"),
    *("--data.val_modes", "[discriminative]", "--data.test_modes", "[]"),
)


@pytest.fixture(scope="module")
def run(scenes_corpus: Path, micro_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine") / "sft"
    assert main(stage_arguments("sft", scenes_corpus, micro_base, folder, *SHORT)) == 0
    return folder


def words(run: Path, corpus: Path, output: Path, *more: str) -> list[str]:
    places = ["--run", str(run), "--corpus", str(corpus), "--output", str(output)]
    return ["mine", *places, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def mined(run: Path, scenes_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All candidates are left that are no right answer, because a micro model knows nothing."""
    output = tmp_path_factory.mktemp("mined") / "scenes"
    limits = ("--rules.relative_margin", "null", "--rules.range_max", "7")
    assert main(words(run, scenes_corpus, output, *limits, "--modes", "disc-disc", "gen-disc")) == 0
    return output


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def without_negatives(pair: Pair) -> Any:
    sides = [pair.query, pair.target]
    shown = [[medium.tobytes() for medium in side.media] for side in sides if side]  # type: ignore[union-attr]
    return pair.key, pair.dataset, [side and replace(side, media=()) for side in sides], shown


def test_each_training_pair_has_wrong_targets_of_its_task(mined: Path, scenes_corpus: Path) -> None:
    before, after = read_pairs(scenes_corpus, "train"), read_pairs(mined, "train")
    assert list(map(without_negatives, before)) == list(map(without_negatives, after))
    for pair in after:
        contents = [item.content_id for item in pair.hard_negatives]
        assert len(set(contents)) == len(contents) == 4 and pair.target.content_id not in contents
        assert set(contents) <= {one.target.content_id for one in after if one.dataset == pair.dataset}
        assert all(item.rewrite and item.media for item in pair.hard_negatives), "they come whole"


def test_other_splits_are_copied_and_the_corpus_says_what_was_mined(
    mined: Path, run: Path, scenes_corpus: Path
) -> None:
    old, new = read_corpus(scenes_corpus), read_corpus(mined)
    for split in old["splits"]:
        if split != "train":
            assert bytes_of(mined / split) == bytes_of(scenes_corpus / split)
    assert old["splits"] == new["splits"] and old["data_hash"] != new["data_hash"]
    (record,) = new["arguments"]["mined_negatives"]
    contract = read_contract(run / "adapter")
    assert record["adapter"] == contract["weights_hash"] and record["base"] == contract["base_hash"]
    assert record["corpus"] == old["data_hash"] and record["modes"] == ["disc-disc", "gen-disc"]
    assert record["range_max"] == 7 and record["relative_margin"] is None and record["negatives"] == 4 * 48
    assert not [fault for fault in check_corpus(mined).faults if fault.kind == "changed tar"]
    for entry, before in zip(read_split(mined, "train"), read_split(scenes_corpus, "train"), strict=True):
        assert entry.name == before.name, "a tar keeps its samples: they decide who is annotated"


def test_the_scores_are_those_of_the_model(mined: Path, run: Path, scenes_corpus: Path) -> None:
    model = rime_pl.load(run)
    pairs = {pair.key: pair for pair in read_pairs(scenes_corpus, "train")}
    lines = [json.loads(line) for line in mined.with_name("scenes.mined").joinpath("negatives.jsonl").open()]
    assert len(lines) == 48
    written = {pair.key: pair for pair in read_pairs(mined, "train")}
    for line in lines[::8]:
        pair = pairs[line["pair"]]
        assert pair.query
        for number, told in enumerate(line["negatives"]):
            source = pairs[told["from"]]
            item = written[line["pair"]].hard_negatives[number]
            assert item.content_id == source.target.content_id and source.dataset == pair.dataset
            mode: Any = {"disc": "discriminative", "gen": "generative"}[told["modes"].split("-")[0]]
            query = model.encode(pair.query, mode)
            right, wrong = model.encode([pair.target, source.target])
            assert float(query @ wrong) == pytest.approx(told["score"], abs=1e-4)
            assert float(query @ right) == pytest.approx(told["lowest_right_answer"], abs=1e-4)


def test_the_report_has_a_table_of_the_rules_and_20_examples(mined: Path) -> None:
    folder = mined.with_name("scenes.mined")
    page = (folder / "report.md").read_text()
    assert "| task | modes | looked at | same content | left |" in page and "| composed | gen-disc |" in page
    assert (
        "No candidate was dropped by: same text, same pictures, already a negative, absolute margin" in page
    )
    assert "| composed | 8 | 8 | 4.00 | 0.0 % | 0.0 % | 0.0 % |" in page
    assert page.count("\n### ") == 20 and page.count("- negative, ") == 80
    with Image.open(folder / "examples.png") as sheet:
        assert sheet.height > 20 * 148


def test_three_steps_of_cma_train_on_the_output(
    mined: Path, run: Path, micro_base: Path, tmp_path: Path
) -> None:
    start = ("--model.init_adapter_from", str(run / "adapter"))
    arguments = stage_arguments("cma", mined, micro_base, tmp_path / "cma", *start, *SHORT)
    assert main([*arguments, "--data.hard_negatives", "4"]) == 0
    manifest = read_json(tmp_path / "cma" / "manifest.json")
    assert manifest["steps"] == 3 and not manifest["broken_samples"]
    assert manifest["negatives_per_query"]["discriminative"] > 10, "4 pairs and their 16 negatives"
    assert len(scalars(tmp_path / "cma", "train/loss_cma")) == 3


def test_a_stopped_command_goes_on_and_gives_the_same_bytes(
    mined: Path, run: Path, scenes_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "sft", ignore=shutil.ignore_patterns(PARTS)))
    limits = ("--rules.relative_margin", "null", "--rules.range_max", "7", "--modes", "disc-disc", "gen-disc")
    arguments = words(other, scenes_corpus, tmp_path / "new", *limits)
    encode: Callable[..., Any] = Retriever.encode_modes
    asked: list[int] = []

    def stopping(self: Retriever, items: Any, *more: Any, **rest: Any) -> Any:
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(len(items))
        return encode(self, items, *more, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Retriever, "encode_modes", stopping)
        assert main(arguments) == 130 and not (tmp_path / "new").exists()
    before = sum(asked)
    asked[:] = [0] * 6  # no stop any more
    monkeypatch.setattr(Retriever, "encode_modes", stopping)
    assert main(arguments) == 0
    assert sum(asked) == 2 * 48 - before, "queries and targets of 6 tasks, none twice"
    mine, theirs = bytes_of(tmp_path / "new"), bytes_of(mined)
    assert {name for name in mine if mine[name] != theirs[name]} == {"corpus.json"}, "it names another run"
    asked[:] = [0] * 6
    assert main([*arguments, "--rules.num_negatives", "2"]) == 0 and not sum(asked), (
        "other limits embed nothing"
    )
    assert "mining" not in capsys.readouterr().err


def test_old_negatives_are_kept_or_replaced_but_never_silently(
    mined: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = words(
        run, mined, tmp_path / "new", "--rules.relative_margin", "null", "--rules.num_negatives", "2"
    )
    assert main([*again, "--modes", "disc-disc"]) == 2 and not (tmp_path / "new").exists()
    assert "--existing must say what becomes of old negatives: 48 training pairs" in capsys.readouterr().err
    old = read_pairs(mined, "train")
    for existing, count in (("keep", 4), ("replace", 0)):
        assert main([*again, "--modes", "disc-disc", "--existing", existing]) == 0
        new = read_pairs(tmp_path / "new", "train")
        for before, after in zip(old, new, strict=True):
            contents = [item.content_id for item in after.hard_negatives]
            assert contents[:count] == [item.content_id for item in before.hard_negatives][:count]
            assert len(set(contents)) == len(contents) > count
        assert len(read_corpus(tmp_path / "new")["arguments"]["mined_negatives"]) == 1 + (existing == "keep")


def test_what_training_would_refuse_is_no_candidate(
    run: Path, scenes_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [replace(pair, key=pair.key.partition("/")[2]) for pair in read_pairs(scenes_corpus, "train")]
    pairs = [pair for pair in pairs if pair.dataset == "relative"]
    texts = ["a <gen_emb> token", "word " * 999, *(f"<b>text</b> {n} | [x](y)" for n in range(6))]
    pairs = [
        replace(pair, target=replace(pair.target, text=text, media=()))
        for pair, text in zip(pairs, texts, strict=True)
    ]
    write_corpus(tmp_path / "odd", "odd", "CC0", {"train": pairs}, {"train": 8}, seed=0)
    arguments = words(
        run, tmp_path / "odd", tmp_path / "new", "--modes", "disc-disc", "--rules.relative_margin", "null"
    )
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "2 items cannot be embedded and are no candidate" in said
    assert "(target): field 'text' must not contain '<gen_emb>'" in said
    assert "must have at most 256 tokens, but has" in said
    after = read_pairs(tmp_path / "new", "train")
    assert [len(pair.hard_negatives) for pair in after] == [0, 0, 4, 4, 4, 4, 4, 4]
    page = (tmp_path / "new.mined" / "report.md").read_text()
    assert "| relative | 8 | 6 | 3.00 | 25.0 % | 25.0 % | 25.0 % |" in page
    assert r"&lt;b&gt;text&lt;/b&gt; 3 \| \[x\](y)" in page and "<b>" not in page
    assert main([*arguments[:-2], "--rules.absolute_margin", "2"]) == 1, "no candidate is so far away"
    assert "No pair got a hard negative." in capsys.readouterr().out


def test_an_unreadable_sample_is_left_out_by_name(
    run: Path, scenes_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = Path(shutil.copytree(scenes_corpus, tmp_path / "corpus"))
    tar = corpus / "train" / "train-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b'"dataset"', b'"dxtaset"', 1))
    (corpus / "broken.txt").write_text("an older line\n")
    assert main(words(run, corpus, tmp_path / "new", "--modes", "disc-disc")) == 0
    assert "1 sample cannot be read and was left out:" in capsys.readouterr().out
    lines = (tmp_path / "new" / "broken.txt").read_text().splitlines()
    assert lines[0] == "an older line" and "field 'dataset' is missing" in lines[1] and len(lines) == 2
    assert read_corpus(tmp_path / "new")["splits"]["train"]["samples"] == 47
    assert len(read_pairs(tmp_path / "new", "train")) == 47


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"--modes": "gen"}, "--modes must name mode pairs, query - target, some of disc-disc gen-gen"),
        ({"--rules.num_negatives": "0"}, "--rules.num_negatives must be 1 or more, but is 0."),
        ({"--batch_size": "0"}, "--batch_size must be 1 or more, but is 0."),
        ({"--rules.relative_margin": "-0.1"}, "--rules.relative_margin must be 0 or more, but is -0.1."),
        (
            {"--rules.range_max": "2"},
            "--rules.range_max must be at least range_min plus num_negatives, 4, but is 2",
        ),
        ({"--corpus": "gone"}, "data.path must be a corpus folder, but 'gone' does not exist."),
        ({"--run": "gone"}, "gone: no finished run here or below."),
        ({"--output": "CORPUS"}, "--output must be another place than the input"),
        ({"--existing": "yes"}, "--existing must be 'keep' or 'replace' or null, but is 'yes'."),
        ({"--mode": "gen-gen"}, "--mode is not a setting of `rime mine`. Did you mean --modes?"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    changes: dict[str, str], says: str, run: Path, scenes_corpus: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"--run": str(run), "--corpus": str(scenes_corpus), "--output": "new", **changes}
    given = {name: str(scenes_corpus) if value == "CORPUS" else value for name, value in given.items()}
    assert main(["mine", *(word for pair in given.items() for word in pair)]) == 2
    assert says in capsys.readouterr().err and not any(tmp_path.iterdir())


def test_a_mode_that_the_run_did_not_train_is_refused_or_told(
    run: Path, scenes_corpus: Path, tmp_path: Path, capsys
) -> None:
    other = Path(shutil.copytree(run, tmp_path / "run"))
    settings = yaml.safe_load((other / "config.yaml").read_text())
    settings["data"]["rewrites"] = "none"
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    assert main(words(other, scenes_corpus, tmp_path / "new")) == 2
    assert "was trained without rewrites (data.rewrites none), but names gen-gen" in capsys.readouterr().err
    assert main(words(run, scenes_corpus, tmp_path / "new", "--modes", "gen-disc")) == 0
    assert "is a run of SFT, whose two modes lie in two spaces" in capsys.readouterr().out


def test_a_corpus_without_training_pairs_is_refused(
    run: Path, scenes_corpus: Path, tmp_path: Path, capsys
) -> None:
    corpus = Path(shutil.copytree(scenes_corpus, tmp_path / "corpus"))
    about = read_json(corpus / "corpus.json")
    del about["splits"]["train"]
    (corpus / "corpus.json").write_text(json.dumps(about))
    assert main(words(run, corpus, tmp_path / "new")) == 2
    assert "must have the split 'train', but has ['val', " in capsys.readouterr().err
