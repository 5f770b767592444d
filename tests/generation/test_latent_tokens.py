"""Latent tokens in place of a rewrite: positions to compute in, without words."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rime_pl.__main__ import main
from rime_pl.backbone.adapters import adapter_state, save_adapter
from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import RimeError
from rime_pl.generation.decoding import embed_completions, prefill
from rime_pl.generation.rewriting import write_rewrites
from rime_pl.inference.loading import load
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.sft import SFTModule
from rime_pl.prompts import LATENT_TOKEN, PromptConfig
from rime_pl.run_folder import RunFolder
from rime_pl.types import Batch, Pair
from tests.conftest import MakeBackbone
from tests.micro import PROMPT, randomise_adapter

K = 3
LATENT = replace(PROMPT, num_latent_tokens=K)


@pytest.fixture(scope="module")
def latent_backbone(make_backbone: MakeBackbone) -> Backbone:
    backbone = make_backbone(prompt=LATENT)
    randomise_adapter(backbone.peft)
    return backbone.eval()


@pytest.fixture(scope="module")
def latent_batch(latent_backbone: Backbone, train_pairs: list[Pair]) -> Batch:
    return latent_backbone.processor.training_batch(train_pairs[:4])


def test_every_rewrite_is_the_same_latent_tokens(latent_backbone: Backbone, latent_batch: Batch) -> None:
    processor = latent_backbone.processor
    latent = processor.tokenizer.convert_tokens_to_ids(LATENT_TOKEN)
    row = [latent] * K + [processor.gen_id, processor.turn_end_id]
    assert latent_batch.query.completions.ids.tolist() == [row] * 4
    assert processor.completions([None]).ids.tolist() == [row[-2:]]  # the rewrite ablation: empty
    assert processor.learned_ids == [processor.disc_id, processor.gen_id, latent]


def test_in_use_they_are_fed_and_not_sampled(latent_backbone: Backbone, latent_batch: Batch) -> None:
    prompts = latent_batch.query.prompts
    written = write_rewrites(latent_backbone, prompts)
    assert written.completions.ids.equal(latent_batch.query.completions.ids)
    assert written.lengths.tolist() == [K] * 4 and bool(written.well_formed.all())
    assert bool((written.labels == -100).all())
    with torch.no_grad():
        whole = latent_backbone(prompts, latent_batch.query.completions).gen
        in_use = embed_completions(latent_backbone, prefill(latent_backbone, prompts, 1), written.completions)
        empty = latent_backbone(prompts, latent_backbone.processor.completions([None] * 4)).gen
    torch.testing.assert_close(in_use, whole, rtol=0, atol=1e-5)
    assert float((whole * empty).sum(1).max()) < 0.9999  # they are computed in


def test_their_row_learns_from_the_contrast_only(latent_backbone: Backbone, latent_batch: Batch) -> None:
    module = SFTModule(latent_backbone.config, lambda_ce=0)
    module.backbone = latent_backbone
    query, target = module.encode(latent_batch.query), module.encode(latent_batch.target)
    (1 - (query.gen * target.gen).sum(1)).mean().backward()
    moved = {n: p.grad for n, p in latent_backbone.named_parameters() if "trainable_tokens_delta" in n}
    rows = [grad for grad in moved.values() if grad is not None]
    assert rows and all(len(grad) == 3 and bool((grad[2] != 0).any()) for grad in rows)
    latent_backbone.zero_grad()


def test_what_latent_tokens_cannot_be_used_for_is_refused(latent_backbone: Backbone) -> None:
    with pytest.raises(RimeError, match=r"model.lambda_ce must be 0 with .*num_latent_tokens"):
        SFTModule(latent_backbone.config)
    with pytest.raises(RimeError, match=r"num_latent_tokens must be null here, because .* but is 3"):
        CMAModule(latent_backbone.config, lambda_ce=0)
    with pytest.raises(RimeError, match=r"num_latent_tokens must be at most max_rewrite_tokens \(8\)"):
        PromptConfig(max_rewrite_tokens=8, num_latent_tokens=9)
    with pytest.raises(RimeError, match=r"num_latent_tokens must be 1 or more, but is 0"):
        PromptConfig(num_latent_tokens=0)


@pytest.fixture(scope="module")
def latent_run(
    latent_backbone: Backbone, scenes_corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What a run leaves of itself for its users."""
    run, backbone = RunFolder(tmp_path_factory.mktemp("latent") / "sft"), latent_backbone
    save_adapter(
        run.adapter,
        *(backbone.peft, adapter_state(backbone.peft), backbone.processor, backbone.config),
        backbone.base_hash,
    )
    (run.path / "manifest.json").write_text(json.dumps({"data": str(scenes_corpus)}))
    run.marker.write_text("{}")
    return run.path


def test_a_saved_run_is_used_with_them(
    latent_run: Path, latent_backbone: Backbone, latent_batch: Batch, train_pairs: list[Pair]
) -> None:
    items = [pair.target for pair in train_pairs[:4]]
    found = load(latent_run).encode_modes(items, ("generative",), 4)["generative"].embeddings
    with torch.no_grad():
        expected = latent_backbone(latent_batch.target.prompts, latent_batch.target.completions).gen
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_other_libraries_do_not_get_them(
    latent_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", "--to", "peft", "--run", str(latent_run), "--output", str(out)]) == 2
    assert "has latent tokens in place of rewrites" in capsys.readouterr().err
    assert not out.exists()
