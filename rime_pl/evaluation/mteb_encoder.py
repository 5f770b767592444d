"""A trained model as an encoder of mteb, so that its tasks of texts and pictures can be run.

Called by nothing here: hand it to ``mteb.evaluate``. It needs ``pip install 'rime_pl[mteb]'``.

Source: mteb's ``EncoderProtocol`` (mteb 2.26).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType

from rime_pl.errors import RimeError
from rime_pl.evaluation.digests import as_source
from rime_pl.inference.retriever import MODES, Retriever
from rime_pl.types import Item, Mode

#: Columns of a batch that are not embedded as they are.
_UNSEEN = ("audio", "video")


class RimeEncoder(AbsEncoder):
    """Encodes the texts and pictures of mteb's tasks with a trained model.

    Queries, and items of tasks without sides, get the instruction of their row, or else that of the task.
    Documents get none.

    Args:
        model: The trained model.
        name: "organisation/model", as mteb stores results.
        query_mode: Mode of queries, and of items of tasks without sides.
        target_mode: Mode of documents (default: that of the queries).
        revision: Of the model, for mteb's results.

    Example::

        mteb.evaluate(RimeEncoder(rime_pl.load("runs/demo/cma"), query_mode="generative"), tasks)
    """

    def __init__(
        self,
        model: Retriever,
        name: str = "rime/run",
        query_mode: Mode = "discriminative",
        target_mode: Mode | None = None,
        revision: str = "local",
    ) -> None:
        for mode in (query_mode, target_mode or query_mode):
            if mode not in MODES:
                raise RimeError(f"A mode must be {' or '.join(map(repr, MODES))}, but is {mode!r}.")
        self.model = model
        self.query_mode, self.target_mode = query_mode, target_mode or query_mode
        network = model.backbone.language_model
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=name,
            revision=revision,
            release_date=None,
            languages=None,
            n_parameters=int(network.num_parameters()),
            memory_usage_mb=None,
            max_tokens=float(network.config.text_config.max_position_embeddings),
            embed_dim=model.dimension,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["PyTorch"],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=True,
            training_datasets=None,
            modalities=["text", "image"],
            experiment_kwargs={"query_mode": self.query_mode, "target_mode": self.target_mode},
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the embeddings of all rows of a data loader, (N, D) float32, L2-normalised.

        Args:
            inputs: Batches: column -> list, of which "text", "image", "query" and "instruction" are read.
            task_metadata: The task; its prompt is the instruction.
            hf_split, hf_subset: Not used.
            prompt_type: Whether the rows are queries, documents or neither (None).
            kwargs: ``batch_size`` is used.

        Raises:
            RimeError: If a batch has sound or video, or a row cannot be embedded.
        """
        document = prompt_type == PromptType.document
        told: Any = "" if document else self.get_instruction(task_metadata, prompt_type)
        instruction = str(told.get("query", "")) if isinstance(told, dict) else str(told)
        mode = self.target_mode if document else self.query_mode
        size = kwargs.get("batch_size", 32)
        found = [self.model.encode(items, mode, size) for items in _batches(inputs, instruction)]
        return torch.cat(found) if found else torch.zeros(0, self.model.dimension)


def _batches(inputs: Any, instruction: str) -> Iterator[list[Item]]:
    """Yield the rows of each batch as items."""
    for batch in inputs:
        if unseen := [column for column in _UNSEEN if column in batch]:
            raise RimeError(f"A task must consist of texts and pictures, but has a column {unseen[0]!r}.")
        count = len(next(iter(batch.values())))
        own = batch.get("instruction") or [""] * count
        texts, images = batch.get("text") or [""] * count, batch.get("image") or [None] * count
        plain = batch.get("query") or texts  # "text" holds the instruction of the row, too
        if count:
            yield [
                as_source(
                    Item(
                        (plain[n] if own[n] else texts[n]) or "",
                        () if images[n] is None else (images[n],),
                        instruction=own[n] or instruction,
                    )
                )
                for n in range(count)
            ]
