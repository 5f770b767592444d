"""Batches of similar length: in the order of the items, within the budget, opened by threads that end."""

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rime_pl.errors import DataError
from rime_pl.inference import batching, sources
from rime_pl.inference.batching import Batches, measured, up_to
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.inference.sources import Source
from rime_pl.processing import RimeProcessor
from rime_pl.types import Item, Prompts


@pytest.fixture
def mixed(tmp_path: Path) -> list[Source]:
    """Texts of 1 to 60 words, pictures of several sizes, and items of both, in no order."""
    rng = random.Random(0)
    items: list[Source] = []
    for number in range(18):
        text = " ".join(["ring"] * rng.randint(1, 60))
        path = tmp_path / f"{number}.jpg"
        Image.new("RGB", (rng.randint(12, 90), rng.randint(12, 90)), (9 * number, 90, 200)).save(path)
        images: Any = (path,) * (number % 3)
        items.append([text, path, Item(text, images)][number // 6])
    rng.shuffle(items)
    return items


def seen_prompts(loaded: Retriever, monkeypatch: pytest.MonkeyPatch) -> list[Prompts]:
    """Return a list that fills with what the processor returns."""
    seen: list[Prompts] = []
    prompts = loaded.backbone.processor.prompts

    def watched(*args: Any) -> Prompts:
        seen.append(prompts(*args))
        return seen[-1]

    monkeypatch.setattr(loaded.backbone.processor, "prompts", watched)
    return seen


def opening_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("rime-open")]


@pytest.mark.parametrize("cores", [1, 2, 4])
@pytest.mark.parametrize("mode", ["discriminative", "generative"])
def test_results_have_the_order_of_the_items(
    loaded: Retriever, mixed: list[Source], monkeypatch: pytest.MonkeyPatch, cores: int, mode: Any
) -> None:
    alone = torch.stack([loaded.encode(item, mode) for item in mixed])
    monkeypatch.setattr(batching, "_cores", lambda: cores)
    monkeypatch.setattr(batching, "MAX_TOKENS", 256)
    threads = torch.get_num_threads()
    encoded = loaded.encode_full(mixed, mode, batch_size=5)
    assert torch.allclose(encoded.embeddings, alone, atol=2e-5)
    if mode == "generative":
        assert encoded.rewrites == [loaded.rewrite(item) for item in mixed]
    assert not opening_threads() and torch.get_num_threads() == threads


def test_batches_hold_the_budget_with_padding_and_each_item_once(
    loaded: Retriever, mixed: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "MAX_TOKENS", 300)
    seen = seen_prompts(loaded, monkeypatch)
    loaded.encode(mixed, batch_size=5)
    assert sum(map(len, seen)) == len(mixed) and max(map(len, seen)) == 5
    disc = loaded.backbone.processor.disc_id
    assert all(len(part) == 1 or up_to(part, disc).input_ids.numel() <= 300 for part in seen)
    padding = sum(int((1 - part.attention_mask).sum()) for part in seen)
    in_order = [
        loaded.backbone.processor.prompts([*map(sources.to_item, mixed[n : n + 5])]) for n in (0, 5, 10)
    ]
    assert 2 * padding < sum(int((1 - part.attention_mask).sum()) for part in in_order)


def test_the_size_is_that_of_the_prompt_but_for_the_words_around_it(
    loaded: Retriever, mixed: list[Source]
) -> None:
    processor: RimeProcessor = loaded.backbone.processor
    for source, size in zip(mixed, measured(mixed, processor), strict=True):
        prompts = up_to(processor.prompts([sources.to_item(source)]), processor.disc_id)
        pictures = 0 if prompts.grid_thw is None else len(prompts.grid_thw)
        around = prompts.input_ids.shape[1] - size.tokens - 2 * pictures
        assert 0 < around <= batching.AROUND, source


def test_what_is_behind_the_token_changes_nothing(loaded: Retriever, mixed: list[Source]) -> None:
    prompts = loaded.backbone.processor.prompts([sources.to_item(source, "Find it.") for source in mixed])
    short = up_to(prompts, loaded.backbone.processor.disc_id)
    assert short.input_ids.shape[1] < prompts.input_ids.shape[1]
    assert (short.input_ids[:, -1] == loaded.backbone.processor.disc_id).all()
    with torch.no_grad():
        whole, part = loaded.backbone(prompts).disc, loaded.backbone(short).disc
    assert torch.allclose(whole, part, atol=2e-6)


def test_an_unusable_picture_is_named_from_a_thread(
    loaded: Retriever, mixed: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "_cores", lambda: 3)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    items = [*mixed[:7], broken, *mixed[7:]]
    with pytest.raises(DataError, match=r"broken\.jpg must be a picture"):
        loaded.encode(items, batch_size=2)
    assert not opening_threads()
    with pytest.raises(DataError, match=r"item 9: field 'text' must not contain '<gen_emb>'"):
        loaded.encode([*mixed[:9], "a <gen_emb>", *mixed[9:]], batch_size=2)
    encoded = loaded.encode_full(items, batch_size=2, skip_unusable=True)
    assert list(encoded.unusable) == [7] and "broken.jpg" in encoded.unusable[7]
    assert torch.allclose(encoded.embeddings, loaded.encode(mixed), atol=2e-5)


def test_ctrl_c_in_a_forward_leaves_no_thread(
    loaded: Retriever, mixed: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        assert opening_threads(), "threads open pictures while the model computes"
        raise KeyboardInterrupt

    monkeypatch.setattr(batching, "_cores", lambda: 3)
    monkeypatch.setattr(loaded, "_encode_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loaded.encode(mixed, batch_size=2)
    assert not opening_threads()


def test_a_sequence_is_read_in_the_thread_of_the_user(
    loaded: Retriever, mixed: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Lazy(Sequence[Source]):
        def __len__(self) -> int:
            return len(mixed)

        def __getitem__(self, index: Any) -> Any:
            assert threading.current_thread() is threading.main_thread()
            asked.append(index)
            return sources.to_item(mixed[index])

    monkeypatch.setattr(batching, "_cores", lambda: 3)
    vectors = loaded.encode(Lazy(), batch_size=4)
    assert asked == list(range(len(mixed))), "each once, in order"
    assert torch.allclose(vectors, loaded.encode(mixed), atol=2e-5)


def test_lora_is_merged_only_where_it_pays(loaded: Retriever, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = loaded.backbone.language_model.model.language_model.layers[0].mlp.up_proj
    whole: list[bool] = []
    encode = loaded._encode_batch
    monkeypatch.setattr(
        loaded, "_encode_batch", lambda *a: (whole.append(layer.whole_weight is not None), encode(*a))[1]
    )
    loaded.encode(["a", "b"])
    loaded.encode(["a", "b"], batch_size=1)
    loaded.encode("a", "generative")
    assert whole == [False, True, True, True]
    assert not Batches(["a"], loaded.backbone.processor, 1, "", None).several


def test_a_gallery_in_both_modes_reads_each_prompt_once(
    loaded: Retriever, mixed: list[Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {mode: loaded.encode_full(mixed, mode) for mode in MODES}
    seen = seen_prompts(loaded, monkeypatch)
    retriever = Retriever(loaded.backbone)
    retriever.index(mixed, instruction="")
    assert sum(map(len, seen)) == len(mixed)
    for mode in MODES:
        kept = retriever._encoded[mode]
        assert torch.allclose(kept.embeddings, alone[mode].embeddings, atol=2e-5)
        assert kept.rewrites == alone[mode].rewrites
