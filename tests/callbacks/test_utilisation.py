"""The utilisation of a training: what is counted, and that counting changes no weight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from rime_pl.callbacks import utilisation
from rime_pl.callbacks.utilisation import Utilisation, dtype_of

WIDTH, ROWS, STEPS = 32, 6, 4


class Rows:
    """Both sides of a batch, as far as the callback looks at them."""

    def __init__(self, seed: int) -> None:
        self.x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))
        self.sides = (self, self)

    def __len__(self) -> int:
        return ROWS

    def lengths(self) -> Tensor:
        return torch.tensor([[3, 2]] * ROWS)


class Small(L.LightningModule):
    """A layer with dropout that is recomputed, as with gradient checkpointing."""

    config = SimpleNamespace(dtype="float32")

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Dropout(0.1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        out: Tensor = checkpoint(self.layer, batch.x, use_reentrant=False)
        return out.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def train(callbacks: list[L.Callback], steps: int = STEPS) -> tuple[Small, L.Trainer]:
    batches: Any = [Rows(number) for number in range(steps)]
    module = Small()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(1)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module, trainer


def test_it_counts_the_first_step_and_logs_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utilisation, "product_flops_per_second", lambda *_: 1e9)
    watch = Utilisation()
    _, trainer = train([watch])
    product = 2 * ROWS * WIDTH * WIDTH  # forward, recomputed, and the gradient of the weight
    assert watch._flops == pytest.approx((STEPS - 1) * 3 * product)
    facts = watch.facts
    assert facts and facts["share"] == pytest.approx(facts["flops_per_second"] / 1e9)
    assert facts["flops_per_second"] == pytest.approx(watch._flops / watch._seconds)
    assert trainer.callback_metrics["train/utilisation"] > 0


def test_counting_changes_no_weight_and_no_random_number() -> None:
    plain, _ = train([])
    after = torch.get_rng_state()
    counted, _ = train([Utilisation()])
    assert torch.equal(torch.get_rng_state(), after)
    assert all(map(torch.equal, plain.parameters(), counted.parameters()))


def test_less_than_two_steps_give_no_result() -> None:
    watch = Utilisation()
    train([watch], steps=1)
    assert watch.facts is None


def test_a_failing_step_ends_the_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("broken")

    monkeypatch.setattr(Small, "training_step", fail)
    watch = Utilisation()
    with pytest.raises(ValueError, match="broken"):
        train([watch])
    assert watch._counted is None


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.bfloat16), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)],
)
def test_the_type_is_that_of_the_products(precision: str, dtype: torch.dtype) -> None:
    trainer: Any = SimpleNamespace(precision=precision)
    module: Any = SimpleNamespace(config=SimpleNamespace(dtype="bfloat16"))
    assert dtype_of(trainer, module) == dtype
