"""An export gives the vectors of its run in every library, or it is not written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

import rime_pl
from rime_pl.errors import RimeError
from rime_pl.export import folders
from rime_pl.export.exporting import Order, export
from rime_pl.export.parity import Agreement
from rime_pl.export.probes import affordable, probes
from rime_pl.prompts import PromptConfig
from rime_pl.types import Item
from tests.export.conftest import make_run
from tests.families import FAMILIES, FPS, clip, noise
from tests.micro import build_backbone, micro_config

Exported = Callable[..., Path]
FOUR_FRAMES = clip(4, 56, 84)
TIMES = {"fps": FPS, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
ITEMS: dict[str, tuple[Item, Any]] = {
    "text": (Item("a red cat, 3.5 m tall"), "a red cat, 3.5 m tall"),
    "picture": (Item("", (noise(1, 84, 40),)), noise(1, 84, 40)),
    "several pictures": (
        Item("green", (noise(2, 30, 90), noise(3))),
        {"image": [noise(2, 30, 90), noise(3)], "text": "green"},
    ),
    "clip": (
        Item("", (FOUR_FRAMES,)),
        {"video": {"array": list(FOUR_FRAMES.frames), "video_metadata": TIMES}},
    ),
    "both": (Item("in the snow", (noise(4),)), {"image": noise(4), "text": "in the snow"}),
}


def cosine(left: Any, right: Any) -> float:
    return float(normalize(torch.as_tensor(left).double(), dim=0) @ normalize(right.double(), dim=0))


@pytest.mark.parametrize("family", FAMILIES)
def test_sentence_transformers_loads_the_folder_plainly(
    family: str, family_run: Callable[[str], Path], exported: Exported
) -> None:
    """The vectors are those of the run, with 4-bit weights and LoRA, and not only those of the export."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(exported(family)), device="cpu")
    run = rime_pl.load(family_run(family))
    vectors = model.encode([given for _, given in ITEMS.values()])
    ours = run.encode([item for item, _ in ITEMS.values()])
    found = dict(zip(ITEMS, map(cosine, vectors, ours), strict=True))
    assert min(found.values()) >= 0.9999, found
    apart = ours @ ours.T - 2 * torch.eye(len(ours))
    assert apart.max() < 0.999, "equal vectors of all items would prove nothing"
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    assert abs(float((vectors[0] ** 2).sum()) - 1) < 1e-5


def test_prompts_are_the_instructions_of_the_task(
    family_run: Callable[[str], Path], exported: Exported
) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(exported("qwen2_vl")), device="cpu")
    run = rime_pl.load(family_run("qwen2_vl"))
    assert cosine(model.encode_query("a cat"), run.encode_query("a cat")) >= 0.9999
    assert cosine(model.encode_document("a cat"), run.encode_target("a cat")) >= 0.9999
    assert model.prompts == {"query": "Find the cat.", "document": ""}
    words = model.encode("a cat", prompt="A word.")
    assert cosine(words, run.encode_target("a cat", task="words")) >= 0.9999
    assert cosine(words, run.encode("a cat")) < 0.9999, "the instruction changes the vector"


@pytest.mark.parametrize("family", FAMILIES)
def test_parity_tells_how_far_each_library_agrees(family: str, exported: Exported) -> None:
    parity = json.loads((exported(family) / "parity.json").read_text())
    assert set(parity["loaders"]) == {"transformers", "sentence-transformers"}
    media = ("picture", "page", "clip")
    for agreement in (parity["run"], *parity["loaders"].values()):
        outside = {f"{size} {kind}" for size in ("large", "small") for kind in media}
        assert set(agreement["cosines"]["discriminative"]) == set(ITEMS) | outside
        assert set(agreement["equal_tokens"]) == set(ITEMS) | outside
        assert all(value >= 0.9999 for mode in agreement["cosines"].values() for value in mode.values())
        assert agreement["attention"] == "sdpa"
    assert all(parity["loaders"]["transformers"]["equal_tokens"].values())
    assert set(parity["loaders"]["transformers"]["rewritten"].values()) == {1.0}
    assert parity["compared_by_tokens_only"] == []
    assert parity["dtype"] == "float32" and parity["versions"]["sentence-transformers"]


def test_an_adapter_for_peft(family_run: Callable[[str], Path], exported: Exported) -> None:
    folder = exported("qwen2_5_vl", "peft")
    parity = json.loads((folder / "parity.json").read_text())
    cosines = parity["loaders"]["peft"]["cosines"]
    assert all(value >= 0.9999 for mode in cosines.values() for value in mode.values())
    run = family_run("qwen2_5_vl")
    assert torch.equal(rime_pl.load(folder).encode("a cat"), rime_pl.load(run).encode("a cat"))


def test_bfloat16(exported: Exported, family_run: Callable[[str], Path]) -> None:
    folder = exported("qwen3_vl", "huggingface", dtype="bfloat16")
    loaded, run = rime_pl.load(folder), rime_pl.load(family_run("qwen3_vl"))
    assert loaded.backbone.language_model.dtype == torch.bfloat16
    assert 0.999 <= cosine(loaded.encode("a cat"), run.encode("a cat")) < 0.9999999
    assert not (folder / "modules.json").exists()


def test_merged_into_the_original_weights_it_says_how_far_it_is(
    family_run: Callable[[str], Path], tmp_path: Path
) -> None:
    said: list[str] = []
    order = Order("huggingface", family_run("qwen2_vl"), tmp_path / "out", weights="original")
    parity = export(order, said.append)
    lowest = min(value for mode in parity["run"]["cosines"].values() for value in mode.values())
    assert lowest < 0.9999, "random NF4 weights differ from the originals"
    assert f"lowest cosine {lowest:.4f} with the run" in "\n".join(said)
    assert "their NF4 values" in (tmp_path / "out" / "README.md").read_text().replace("\n", " ")
    trained, original = rime_pl.load(family_run("qwen2_vl")), rime_pl.load(tmp_path / "out")
    assert cosine(trained.encode("a cat"), original.encode("a cat")) < 0.99999


# -- refused ------------------------------------------------------------------------------------------


def test_another_template_is_refused_and_nothing_is_left(
    family_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = folders.chat_template
    monkeypatch.setattr(
        folders,
        "chat_template",
        lambda *args: right(*args).replace("{{- found.text +", "{{- ' ' + found.text +"),
    )
    order = Order("huggingface", family_run("qwen2_vl"), tmp_path / "out")
    with pytest.raises(
        RimeError,
        match="was not written: in transformers, its template or its bounds on pixels give other tokens",
    ):
        export(order, lambda line: None)
    assert not list(tmp_path.iterdir())


def test_weights_without_lora_are_refused(
    family_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rime_pl.export import merging

    monkeypatch.setattr(merging, "_change", lambda layer: torch.zeros(()))
    order = Order("huggingface", family_run("qwen2_vl"), tmp_path / "out")
    with pytest.raises(
        RimeError, match=r"was not written: in the run itself, the \w+ vector of the probe .* cosine"
    ):
        export(order, lambda line: None)
    assert not list(tmp_path.iterdir())


def bounds_times(folder: Path, part: str, edge: str, factor: int) -> None:
    """Change a bound of pictures or clips in the file of a processor."""
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    config[part]["size"][edge] *= factor
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("trained", [False, True], ids=["of the base model", "of the training"])
@pytest.mark.parametrize("edge", ["longest_edge", "shortest_edge"])
@pytest.mark.parametrize("part", ["image_processor", "video_processor"])
def test_a_loader_with_other_bounds_of_pixels_is_refused(
    part: str,
    edge: str,
    trained: bool,
    family_base: Callable[[str], Path],
    family_run: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without bounds of the training, our own code reads those of the files, so the run is compared first."""
    run = family_run("qwen2_vl")
    if trained:
        bounds = {"max_pixels": 12 * 784, "min_pixels": 784}
        bounds |= {"max_frame_pixels": 12 * 784, "min_frame_pixels": 784}
        prompt = PromptConfig(**bounds, max_rewrite_tokens=8)  # type: ignore[arg-type]
        run = make_run(tmp_path / "run", family_base("qwen2_vl"), prompt=prompt)
    right = folders.write_processor

    def wrong(processor: Any, folder: Path) -> None:
        right(processor, folder)
        bounds_times(folder, part, edge, 4)

    monkeypatch.setattr(folders, "write_processor", wrong)
    place = "transformers" if trained else "the run itself"
    size = "large" if edge == "longest_edge" else "small"
    kind = "picture" if part == "image_processor" else "clip"
    order = Order("huggingface", run, tmp_path / "out")
    with pytest.raises(
        RimeError,
        match=f"in {place}, its template or its bounds on pixels give other tokens .* '{size} {kind}'",
    ):
        export(order, lambda line: None)
    assert not (tmp_path / "out").exists()


def test_probes_that_would_take_minutes_are_compared_by_their_tokens(
    family_base: Callable[[str], Path],
) -> None:
    prompt = PromptConfig(max_pixels=4000 * 784, max_rewrite_tokens=8)
    processor = build_backbone(micro_config(family_base("qwen2_vl"), prompt=prompt)).processor
    items = probes(processor, "", clips=True)
    kept = affordable(processor, items)
    assert items.keys() - kept.keys() == {"large picture", "large page"}
    assert int((processor.prompts([items["large picture"]]).input_ids == processor.image_id).sum()) > 2048
    huge = PromptConfig(max_pixels=40_000_000, max_rewrite_tokens=8)
    drawn = probes(build_backbone(micro_config(family_base("qwen2_vl"), prompt=huge)).processor, "", True)
    assert "large picture" not in drawn and "small picture" in drawn


def test_pages_with_bounds_of_their_own_are_no_probe(family_base: Callable[[str], Path]) -> None:
    prompt = PromptConfig(max_page_pixels=8 * 784, max_rewrite_tokens=8)
    processor = build_backbone(micro_config(family_base("qwen2_vl"), prompt=prompt)).processor
    assert not any("page" in name for name in probes(processor, "", clips=True))


def test_another_way_of_generating_is_refused(
    family_run: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rime_pl.export import merging

    right = merging.greedy

    def without_an_end(backbone: Any) -> Any:
        config = right(backbone)
        config.min_new_tokens = config.max_new_tokens
        return config

    monkeypatch.setattr(merging, "greedy", without_an_end)
    order = Order("huggingface", family_run("qwen2_vl"), tmp_path / "out")
    with pytest.raises(RimeError, match="in transformers, rewrites must begin as ours for a mean share of"):
        export(order, lambda line: None)
    assert not list(tmp_path.iterdir())


def test_single_rewrites_that_differ_are_told() -> None:
    assert not Agreement("sdpa", {}, rewritten={"a": 1.0, "b": 0.1}).wrong_rewrites()
    assert "but do for 0.350" in Agreement("sdpa", {}, rewritten={"a": 0.6, "b": 0.1}).wrong_rewrites()


def test_a_vector_that_is_no_number_is_refused() -> None:
    assert "cosine of nan" in Agreement("sdpa", {"discriminative": {"text": float("nan")}}).wrong()
    assert not Agreement("sdpa", {"discriminative": {"text": 0.9991}}).wrong()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"to": "peft", "weights": "original"}, "--weights is not for --to peft"),
        ({"to": "peft", "dtype": "bfloat16"}, "--dtype is not for --to peft"),
        ({"to": "huggingface", "truncate_dim": 8}, "--truncate_dim is for --to sentence-transformers"),
        ({"truncate_dim": 8}, r"must be a length that was trained .* but none was, but is 8"),
        ({"task": "nothing"}, "task must be one that the model was trained on, 'names', 'words'"),
        ({"measure": True}, "--measure needs a run whose corpus is at hand"),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, Any], said: str, family_run: Callable[[str], Path], tmp_path: Path
) -> None:
    order = {
        "to": "sentence-transformers",
        "run": family_run("qwen2_vl"),
        "output": tmp_path / "out",
    } | changes
    with pytest.raises(RimeError, match=said):
        export(Order(**order), lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_overwritten(family_run: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(RimeError, match="must be a new or empty folder"):
        export(Order("peft", family_run("qwen2_vl"), tmp_path), lambda line: None)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_an_export_can_be_exported_again(exported: Exported, tmp_path: Path) -> None:
    first = exported("qwen2_vl")
    export(Order("huggingface", first, tmp_path / "again"), lambda line: None)
    again = rime_pl.load(tmp_path / "again")
    assert torch.equal(again.encode("a cat"), rime_pl.load(first).encode("a cat"))
    assert again.tasks.keys() == {"names", "words"}
    with pytest.raises(RimeError, match="--to peft needs a run with an adapter"):
        export(Order("peft", first, tmp_path / "no"), lambda line: None)
