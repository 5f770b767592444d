"""The types that data, model and metrics hand to each other, in the order in which the data meets them.

shard -> Pair -> Batch (training) or EvalBatch (evaluation) -> ModeEmbeddings / EvalOutput.
All other files may import this one; it imports nothing of this project.

Shape legend: B pairs, R rows, P prompt tokens, C completion tokens, D embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

Mode = Literal["discriminative", "generative"]
Side = Literal["query", "target"]

#: The four pairs of query mode and target mode, in the order in which every table shows them.
MODE_PAIRS: tuple[str, ...] = ("disc-disc", "gen-gen", "gen-disc", "disc-gen")
#: The rewrites that the rewrite ablation gives to the queries; also keys of summary.json.
REWRITE_ABLATION: tuple[str, ...] = ("own", "reference", "shuffled", "empty")

#: Pixels of the longer side of a picture in a report.
THUMBNAIL = 148


def content_hash(content_id: str) -> int:
    """Return a signed 64-bit id of a content id, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(content_id.encode(), digest_size=8).digest(), "big", signed=True)


class _Movable:
    """Base of dataclasses of tensors that Lightning can move to a device."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        moved = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            moved[f.name] = value.to(*args, **kwargs) if isinstance(value, Tensor | _Movable) else value
        return type(self)(**moved)


@dataclass(frozen=True)
class Clip:
    """A video as some of its frames."""

    frames: tuple[Image, ...]  # RGB, one or more, all of one size
    times: tuple[float, ...]  # of each frame, in seconds since the start of the video; they rise


@dataclass(frozen=True)
class Page:
    """A page of a document: a picture with limits of its own, because small letters need many pixels."""

    image: Image  # RGB or grey, any size


Medium: TypeAlias = "Image | Clip | Page"


def frames_of(medium: Medium) -> tuple[Image, ...]:
    """Return the pictures that a picture, a clip or a page consists of."""
    if isinstance(medium, Clip):
        return medium.frames
    return (medium.image,) if isinstance(medium, Page) else (medium,)


def with_frames(medium: Medium, frames: Sequence[Image]) -> Medium:
    """Return a medium of the same kind with other pictures, as many as :func:`frames_of` returns."""
    if isinstance(medium, Clip):
        return replace(medium, frames=tuple(frames))
    return Page(frames[0]) if isinstance(medium, Page) else frames[0]


@dataclass(frozen=True)
class Item:
    """One side of a pair: text, media, or both."""

    text: str = ""
    media: tuple[Medium, ...] = ()  # pictures (RGB, any size), clips and pages, in the order of the prompt
    content_id: str = ""  # equal for duplicates: the same content in other pixels or words
    instruction: str = ""  # the task's instruction, "" if none
    rewrite: str | None = None  # the reference rewrite; None: not annotated
    cot: str | None = None  # a chain of thought, followed by the same rewrite

    @property
    def kinds(self) -> str:
        """What the item consists of, such as "clip + text"."""
        names = {Clip: "clip", Page: "page"}
        found = sorted({names.get(type(medium), "picture") for medium in self.media})
        return " + ".join([*found, *(["text"] if self.text else [])]) or "nothing"

    def thumbnail(self, side: int = THUMBNAIL) -> Item:
        """Return the item with small pictures, so that a whole gallery can be kept or sent."""
        return replace(self, media=tuple(_small(medium, side) for medium in self.media))


def _small(medium: Medium, side: int) -> Medium:
    frames = [frame.convert("RGB") for frame in frames_of(medium)]  # a copy if it is RGB already
    for frame in frames:
        frame.thumbnail((side, side))
    return with_frames(medium, frames)


@dataclass(frozen=True)
class Pair:
    """A query and its target. Without a query, the target is only in the gallery."""

    key: str  # "<shard file>/<sample key>", unique in the corpus
    dataset: str  # the task; a training batch holds one task
    gallery: str  # which gallery holds the target (e.g. "pictures" or "names")
    query: Item | None
    target: Item
    hard_negatives: tuple[Item, ...] = ()  # wrong targets that are easily taken for right
    positives: tuple[Item, ...] = ()  # further right targets of the query
    distractor: bool = False  # the target counts only where results with distractors are asked for
    source: str = ""  # where a builder found it: file and row; "" if it was not kept


@dataclass
class Prompts(_Movable):
    """Tokenised items, up to where the assistant starts to write. Left-padded."""

    input_ids: Tensor  # (R, P) int64; each row holds <disc_emb> once
    attention_mask: Tensor  # (R, P) int64, 0 at padding
    pixel_values: Tensor | None  # (patches of all M media, patch_dim) uint8, in row order; on the CPU
    grid_thw: Tensor | None  # (M, 3) int64: frames (two of a clip are one), patch rows, patch columns
    num_media: Tensor  # (R,) int64, media of each row
    seconds: Tensor | None = None  # (M,) float64: from patch to patch of a clip; 0: a picture or page

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, *args: Any, **kwargs: Any) -> Prompts:
        """Return the rows on a device. Pixels stay where they are until the vision tower reads them.

        A large batch goes through the model in parts, and only the pixels of one part are on the device then.
        """
        moved: Prompts = super().to(*args, **kwargs)
        return replace(moved, pixel_values=self.pixel_values)

    def select(self, rows: Tensor) -> Prompts:
        """Return the given rows (int64 indices, repeats allowed), with the patches of their images.

        Qwen-VL puts the patches of all media into one flat tensor, so ``grid_thw`` says where to cut.
        """
        pixels, grid, seconds = self.pixel_values, self.grid_thw, self.seconds
        if pixels is not None and grid is not None and seconds is not None:
            # row r owns media[first[r] : first[r + 1]], medium i owns patches[start[i] : start[i + 1]]
            first = [0, *self.num_media.cumsum(0).tolist()]
            start = [0, *grid.prod(-1).cumsum(0).tolist()]
            media = [slice(first[r], first[r + 1]) for r in rows.tolist() if first[r] < first[r + 1]]
            patches = [pixels[start[i.start] : start[i.stop]] for i in media]
            grid = torch.cat([grid[i] for i in media]) if media else None
            seconds = torch.cat([seconds[i] for i in media]) if media else None
            pixels = torch.cat(patches) if media else None
        ids, mask = self.input_ids[rows], self.attention_mask[rows]
        return Prompts(ids, mask, pixels, grid, self.num_media[rows], seconds)


@dataclass
class Completions(_Movable):
    """What the assistant writes after a prompt: rewrite, <gen_emb>, end of turn. Right-padded."""

    ids: Tensor  # (R, C) int64
    mask: Tensor  # (R, C) int64, 0 at padding

    def __len__(self) -> int:
        return self.ids.shape[0]

    def select(self, rows: Tensor) -> Completions:
        return Completions(self.ids[rows], self.mask[rows])

    def trimmed(self) -> Completions:
        """Return the rows without padding columns that none of them needs; at least one column stays."""
        width = max(1, int(self.mask.sum(1).max()))  # the model cannot look for <gen_emb> in no column
        return Completions(self.ids[:, :width], self.mask[:, :width])


@dataclass
class Rows(_Movable):
    """R items with one rewrite each, or with a wrong one beside it: the input of one forward."""

    prompts: Prompts  # R rows
    completions: Completions  # R rows: reference rewrite, <gen_emb>, end of turn
    annotated: Tensor  # (R,) bool: False where the item has no reference rewrite, so no cross-entropy
    wrong: Completions | None = None  # R rows, to be embedded behind the same prompts

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def labels(self) -> Tensor:
        """The tokens that are learned, (R, C) int64: those of annotated rewrites; -100 elsewhere."""
        learned = self.completions.mask.bool() & self.annotated.unsqueeze(1)
        return self.completions.ids.masked_fill(~learned, -100)

    def lengths(self) -> Tensor:
        """Return (R, 2) int64: tokens of each prompt and of what follows it, without padding."""
        after = self.completions.mask.sum(1)
        if self.wrong is not None:
            after = after + self.wrong.mask.sum(1)
        return torch.stack([self.prompts.attention_mask.sum(1), after], dim=1)

    def select(self, rows: Tensor) -> Rows:
        """Return the given rows (int64 indices), without padding columns that none of them needs."""
        prompts, completions = self.prompts.select(rows), self.completions.select(rows).trimmed()
        wrong = None if self.wrong is None else self.wrong.select(rows).trimmed()
        left = prompts.input_ids.shape[1] - int(prompts.attention_mask.sum(1).max())
        prompts = replace(
            prompts,
            input_ids=prompts.input_ids[:, left:],
            attention_mask=prompts.attention_mask[:, left:],
        )
        return Rows(prompts, completions, self.annotated[rows], wrong)


@dataclass
class FurtherRows(_Movable):
    """K targets beside those of a batch: hard negatives, and further right answers of single queries."""

    rows: Rows  # K rows; none is learned to be written
    owner: Tensor  # (K,) int64: row of the batch that each belongs to
    content: Tensor  # (K,) int64 content_hash
    positive: Tensor  # (K,) bool: a right answer; False: a hard negative
    rewritten: Tensor  # (K,) bool: it has a rewrite
    used: (
        Tensor  # (K,) bool: False for the row that a rank without any holds, so that all ranks run the model
    )

    def __len__(self) -> int:
        return len(self.rows)

    def at_least(self, count: int) -> FurtherRows:
        """Return ``count`` rows or more: what is missing repeats the first one, and does not count."""
        if len(self) >= count:
            return self
        index = torch.arange(count, device=self.owner.device)
        real = index < len(self)
        index = index.where(real, torch.zeros_like(index))
        return FurtherRows(
            self.rows.select(index),
            self.owner[index],
            self.content[index],
            self.positive[index],
            self.rewritten[index],
            self.used[index] & real,
        )


@dataclass
class Batch(_Movable):
    """B training pairs of one task on this rank; row i of ``target`` belongs to row i of ``query``."""

    query: Rows  # B rows
    target: Rows  # B rows
    query_content: Tensor  # (B,) int64 content_hash
    target_content: Tensor  # (B,) int64 content_hash
    dataset: str
    keys: list[str] = field(default_factory=list)  # B pair keys
    query_texts: list[str] = field(default_factory=list)  # B instructions with texts, for tables of rewrites
    position: int = 0  # number of this global batch since the start of training
    further: FurtherRows | None = None  # None: this training uses none, on no rank

    def __len__(self) -> int:
        return self.query_content.shape[0]

    @property
    def sides(self) -> tuple[Rows, Rows]:
        """The queries and the targets."""
        return self.query, self.target


@dataclass
class Rollouts(_Movable):
    """Rewrites that the model wrote: N = R * G rows, the G of an item together. Greedy writing has G = 1."""

    completions: Completions  # N rows: rewrite, <gen_emb>, end of turn; the last two are added if missing
    labels: Tensor  # (N, C) int64: the tokens that the model chose, with the first stop token; -100 elsewhere
    lengths: Tensor  # (N,) int64: tokens of the rewrite, without <gen_emb> and end of turn
    well_formed: Tensor  # (N,) bool: the rewrite has visible text, and the model itself wrote <gen_emb>

    def __len__(self) -> int:
        return len(self.completions)

    def select(self, rows: Tensor) -> Rollouts:
        return Rollouts(
            self.completions.select(rows), self.labels[rows], self.lengths[rows], self.well_formed[rows]
        )


@dataclass
class EvalBatch(_Movable):
    """R items of one side, queries or gallery items, to embed in one mode or in both."""

    side: Side
    prompts: Prompts  # R rows
    completions: Completions  # R rows: the reference rewrite
    item_ids: Tensor  # (R,) int64, unique per side; rows that the sampler repeats have the same id
    content_ids: Tensor  # (R,) int64: content of this item
    relevant_ids: Tensor  # (R,) int64: content of the right target; of a target: its own content
    distractor: Tensor  # (R,) bool: a gallery item that counts only in results with distractors
    datasets: list[str]  # R tasks (targets: "")
    galleries: list[str]  # R gallery names
    keys: list[str]  # R pair keys
    items: list[Item]  # R items with small pictures, for pictures and texts in reports
    generative: bool = True  # whether rewrites are written and embedded, too

    def __len__(self) -> int:
        return self.item_ids.shape[0]


@dataclass(frozen=True)
class Evaluation:
    """How a split is evaluated; ``RimeDataModule.evaluation`` gives it to the callbacks."""

    generative: bool = True  # whether its batches are evaluated in the generative mode, too
    left_out: int = 0  # items that a limit leaves out of its galleries, which makes each query easier

    def prefix(self, split: str) -> str:
        """Return what the names of its results begin with: one of its own on a limited gallery.

        >>> Evaluation().prefix("val"), Evaluation(left_out=5).prefix("val")
        ('val', 'val/limited_gallery')
        """
        return f"{split}/limited_gallery" if self.left_out else split


@dataclass
class ModeEmbeddings(_Movable):
    """Both embeddings of the same R items, float32, L2-normalised."""

    disc: Tensor  # (R, D)
    gen: Tensor  # (R, D)


@dataclass
class EncodedSide(_Movable):
    """What a loss gets from one side of this rank's batch, R rows."""

    disc: Tensor  # (R, D) float32, normalised
    gen: Tensor  # (R, D) float32, normalised
    cross_entropy: Tensor  # scalar: the part of this rank; the mean over ranks is that of the global batch
    wrong: Tensor | None = None  # (R, D) float32, normalised: generative, with the wrong rewrites


@dataclass
class Written(_Movable):
    """The generative mode of R evaluated items: what the model wrote, and how it is embedded."""

    gen: Tensor  # (R, D) float32, L2-normalised: with the rewrite that the model wrote
    completions: Completions  # that rewrite
    ablation: dict[str, Tensor]  # queries: "reference", "empty" -> (R, D); targets: {}
    rewrites: list[str]  # R generated rewrites, without special tokens
    lengths: Tensor  # (R,) int64: tokens of the rewrite, without <gen_emb> and end of turn
    well_formed: Tensor  # (R,) bool: the rewrite has visible text, and the model itself wrote <gen_emb>
    #: test of Refine-RL: "rewriter-embedder", each old or new -> (R, D) generative embeddings
    crossed: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class EvalOutput(_Movable):
    """What ``validation_step`` and ``test_step`` return for one EvalBatch."""

    disc: Tensor  # (R, D) float32, L2-normalised
    seconds: dict[str, float]  # wall time of this batch: "discriminative", "generative" (with writing)
    written: Written | None = None  # None: the batch asks for the discriminative mode only


class RewardData(Protocol):
    """What Refine-RL needs from the data module in addition to training batches."""

    seed: int  # seed of the run

    def anchor_batches(self, num_anchors: int) -> Iterable[Any]:
        """Return batches of up to ``num_anchors`` training pairs of each task, the same on all processes."""

    def sample_batches(self, num_samples: int) -> Iterable[Any]:
        """Return batches of held-out pairs whose rewrites are reported, the same on all processes."""


@dataclass
class RewriteChange:
    """The rewrite of one held-out query, before and after reinforcement learning."""

    key: str
    task: str
    query: str  # instruction and text; "" if there is only a picture
    reference: str
    before: str
    after: str
    reward_before: float
    reward_after: float
