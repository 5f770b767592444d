"""The backbone that all stages share: items in, both embeddings and the logits of the rewrite out.

Built by ``RimeModule.configure_model`` and by the retriever. Attention is causal, so one forward over
prompt + rewrite yields the discriminative embedding, the generative one and the language-model loss.

Shape legend: R rows, P prompt tokens, C completion tokens, N labelled tokens, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from rime_pl.backbone.adapters import attach_adapters, base_fingerprint, load_adapter_weights, read_contract
from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.pooling import first_position, pool_at
from rime_pl.backbone.quantization import keep_packed_weights, quantization_config
from rime_pl.backbone.vision_attention import attend_pictures_together
from rime_pl.errors import RimeError
from rime_pl.processing import RimeProcessor
from rime_pl.types import Completions, Prompts


@dataclass
class BackboneOutput:
    """What one forward gives."""

    disc: Tensor  # (R, D) float32, normalised
    gen: Tensor | None  # (R, D) float32, normalised; None without completions
    gen_found: Tensor | None  # (R,) bool: the completion holds <gen_emb>; else its row of gen is zero
    logits: Tensor | None  # (N, V): at labelled positions only, N = rows' completion tokens
    labels: Tensor | None  # (N,) int64


class Backbone(nn.Module):
    """A multimodal language model with adapters and two read-out tokens.

    Args:
        config: Checkpoint, bits and adapters.
        processor: Its tokenizer says where the mode tokens are.
        device: Where the weights go; ``None`` is CPU.
    """

    def __init__(
        self, config: BackboneConfig, processor: RimeProcessor, device: str | torch.device | None = None
    ):
        super().__init__()
        self.config = config
        self.processor = processor
        model = _load(config, device)
        self.base_hash = base_fingerprint(model)  # of the checkpoint as it is, before any row is added
        self.adapt(model)

    def adapt(self, model: Any) -> None:
        """Freeze a loaded model, add rows for new mode tokens and attach the adapters."""
        config, processor = self.config, self.processor
        if config.attn_implementation == "sdpa":
            attend_pictures_together(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
            # Big checkpoints have spare rows; the tiny one has none. mean_resizing: the covariance of a
            # 150k x 1.5k table would take minutes, and the new rows are set below anyway.
            model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
        if processor.new_tokens:
            _start_new_rows(model, processor)
        self.peft = attach_adapters(model, config, [processor.disc_id, processor.gen_id])
        keep_packed_weights(self)
        if config.gradient_checkpointing:
            self.language_model.gradient_checkpointing_enable({"use_reentrant": False})
            self.language_model.enable_input_require_grads()
        self.train()  # from_pretrained returns eval mode, and Lightning leaves it so

    @property
    def language_model(self) -> Any:
        """The Hugging Face model, with LoRA inside."""
        return self.peft.get_base_model()

    def forward(
        self,
        prompts: Prompts,
        completions: Completions | None = None,
        label_mask: Tensor | None = None,
        image_features: Any | None = None,
    ) -> BackboneOutput:
        """One pass over R rows.

        Args:
            prompts: R rows.
            completions: R rewrites with <gen_emb>; None reads only the discriminative embedding.
            label_mask: (R,) bool, rows whose completion tokens give logits; None for no logits.
            image_features: From :meth:`encode_images`, to share one pass of the vision tower.

        Raises:
            RimeError: If a prompt has no discriminative token.
        """
        hidden = self._hidden(prompts, completions, image_features)
        prompt_length = prompts.input_ids.shape[1]
        at, found = first_position(prompts.input_ids, prompts.attention_mask, self.processor.disc_id)
        if not bool(found.all()):
            raise RimeError(
                f"a prompt lacks {self.processor.prompt.disc_token}; was it cut by a length limit?"
            )
        out = BackboneOutput(pool_at(hidden, at, found), None, None, None, None)
        if completions is not None:
            at, found = first_position(completions.ids, completions.mask, self.processor.gen_id)
            out.gen, out.gen_found = pool_at(hidden, at + prompt_length, found), found
            if label_mask is not None:
                labelled = completions.mask.bool() & label_mask.unsqueeze(1)
                # the token at completion position c is predicted one position earlier
                before = hidden[:, prompt_length - 1 : -1]
                out.logits = self.language_model.lm_head(before[labelled])
                out.labels = completions.ids[labelled]
        return out

    def _hidden(
        self, prompts: Prompts, completions: Completions | None, image_features: Any | None
    ) -> Tensor:
        ids, mask = prompts.input_ids, prompts.attention_mask
        if completions is not None:
            ids = torch.cat([ids, completions.ids], dim=1)
            mask = torch.cat([mask, completions.mask], dim=1)
        features = {} if image_features is None else {"mm_encoder_outputs": {"image": image_features}}
        output = self.language_model.model(
            input_ids=ids,
            attention_mask=mask,
            **self.image_inputs(prompts, ids, pixels=image_features is None),
            **features,
            use_cache=False,
        )
        return output.last_hidden_state

    def image_inputs(self, prompts: Prompts, ids: Tensor, pixels: bool = True) -> dict[str, Tensor]:
        """The image arguments of the Hugging Face model; empty for text alone."""
        if prompts.pixel_values is None or prompts.image_grid_thw is None:
            return {}
        inputs = {
            "image_grid_thw": prompts.image_grid_thw,
            "mm_token_type_ids": (ids == self.processor.image_id).int(),
        }
        return inputs | ({"pixel_values": prompts.pixel_values} if pixels else {})

    def encode_images(self, prompts: Prompts) -> Any | None:
        """One pass of the frozen vision tower over all images of the rows, to be used by several forwards.

        None where nothing can be shared, and each forward looks at the pictures itself: without images, and
        in transformers before 5.20, whose models ignore given features in silence.
        """
        takes_features = (
            "mm_encoder_outputs" in inspect.signature(self.language_model.model.forward).parameters
        )
        if prompts.pixel_values is None or not takes_features:
            return None
        with torch.no_grad():
            features = self.language_model.model.get_image_features(
                prompts.pixel_values, prompts.image_grid_thw, return_dict=True
            )
        # the tower's own last state is larger than what the decoder reads, and is not read
        read = {name: value for name, value in features.items() if name != "last_hidden_state"}
        return type(features)(**read)


def load_backbone(adapter: str | Path, device: str | torch.device | None = None) -> Backbone:
    """The trained backbone of an adapter folder, in eval mode.

    Raises:
        RimeError: If the folder is no adapter, or does not fit its base.
    """
    contract = read_contract(adapter)
    config = BackboneConfig(**contract["backbone"])
    processor = RimeProcessor.from_adapter(adapter)
    config.prompt = processor.prompt
    backbone = Backbone(config, processor, device)
    load_adapter_weights(backbone.peft, adapter, processor, backbone.base_hash)
    return backbone.eval()


def _load(config: BackboneConfig, device: str | torch.device | None) -> Any:
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            config.name_or_path,
            dtype=getattr(torch, config.dtype),
            quantization_config=quantization_config(config),
            attn_implementation=config.attn_implementation,
            device_map={"": device or "cpu"},
        )
    except OSError as error:
        raise RimeError(
            f"model.backbone.name_or_path: no checkpoint could be loaded from {config.name_or_path!r} "
            f"({error}). Give a Hugging Face name or a folder; the tiny base is made by `rime base`."
        ) from error
    return model


def _start_new_rows(model: Any, processor: RimeProcessor) -> None:
    """New mode tokens start as words that stand where a model sums up: the turn's "assistant", and its end.

    From a random row the embeddings of all items begin nearly equal (cosine 0.9999 on the tiny base,
    0.84-0.98 from here), and the contrastive losses stay at chance for hundreds of steps. The two start from
    different words: from the same one the spaces would half meet before any alignment.
    """
    tokenizer = processor.tokenizer
    prompt = processor.prompt
    starts = {prompt.disc_token: tokenizer.convert_tokens_to_ids(tokenizer.tokenize("assistant"))[0]}
    starts[prompt.gen_token] = processor.turn_end_id
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
        for token in processor.new_tokens:
            layer.weight.data[tokenizer.convert_tokens_to_ids(token)] = layer.weight.data[starts[token]]
