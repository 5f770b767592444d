"""Sizes of a step: what `rime plan` knows of a batch that is not there.

Made by rime_pl/commands/plan.py, or from a batch; read by rehearsal.py and predict.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rime_pl.scaling.micro_batches import MicroBatches
from rime_pl.types import Rows


@dataclass(frozen=True)
class SideShape:
    """Sizes of one side of a batch, as one forward takes it."""

    rows: int
    prompt_tokens: int  # of the longest row, visual tokens included; the others are padded
    completion_tokens: int  # of the longest row: rewrite, <gen_emb>, end of turn
    labels: int  # completion tokens of all rows together
    images: int = 0  # of all rows together
    patches: int = 0  # of all images together
    padded: bool = True  # whether some row is shorter than the longest: a mask is needed

    def share(self, rows: int) -> SideShape:
        """The first rows of it, on average; images are whole."""
        images = -(-self.images * rows // self.rows)
        return replace(
            self,
            rows=rows,
            labels=round(self.labels * rows / self.rows),
            images=images,
            patches=round(images * self.patches / max(1, self.images)),
        )

    def largest(self, rows: int) -> SideShape:
        """The most that so many of its rows can be: all of full length, none without its image."""
        images = min(self.images, rows * -(-self.images // self.rows))
        labels = min(self.labels, rows * self.completion_tokens)
        return replace(self.share(rows), images=images, labels=labels, patches=images * self.of_an_image)

    @property
    def of_an_image(self) -> int:
        """Patches of an image, on average."""
        return -(-self.patches // max(1, self.images))

    def even(self, unit: int) -> SideShape:
        """With images of one size, whose patches are a multiple of ``unit``, as a tower merges them."""
        return replace(self, patches=self.images * -(-self.of_an_image // unit) * unit)


def side_shape(rows: Rows) -> SideShape:
    """The sizes of a side that is there."""
    prompts, completions = rows.prompts, rows.completions
    labelled = completions.mask.bool() & rows.annotated.unsqueeze(1)
    return SideShape(
        rows=len(rows),
        prompt_tokens=prompts.input_ids.shape[1],
        completion_tokens=completions.ids.shape[1],
        labels=int(labelled.sum()),
        images=0 if prompts.image_grid_thw is None else len(prompts.image_grid_thw),
        patches=0 if prompts.pixel_values is None else len(prompts.pixel_values),
        padded=not bool(prompts.attention_mask.all() and completions.mask.all()),
    )


@dataclass(frozen=True)
class RolloutShape:
    """What Refine-RL draws; every rewrite takes its whole budget here, the most that can happen."""

    num_generations: int  # of an item
    max_new_tokens: int  # of a rewrite, <gen_emb> not counted
    items_per_pass: int | None = None  # None: the batch at once
    both_sides: bool = True  # targets are rewritten, too


@dataclass(frozen=True)
class StepShape:
    """A stage's step on one process."""

    stage: str  # "sft", "cma" or "refine_rl"
    query: SideShape
    target: SideShape
    wrong_rows: int = 0  # queries that CMA encodes once more with a wrong rewrite
    cached: MicroBatches | None = None  # of the gradient cache; None: one forward a side
    rollouts: RolloutShape | None = None  # of Refine-RL

    @property
    def encoded(self) -> list[SideShape]:
        """What SFT and CMA encode."""
        return [self.query, self.target, *([self.query.share(self.wrong_rows)] if self.wrong_rows else [])]
