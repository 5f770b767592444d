"""The model of all stages: items in, both embeddings and the log-probabilities of the rewrite out.

Built by ``RimeModule.configure_model`` and by the retriever. Attention is causal, so one forward over prompt
and rewrite gives the discriminative embedding, the generative one and what the language-model loss needs.

Shape legend: R prompts, G completions of each, N = R * G, P prompt tokens, C completion tokens, M labelled
tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForImageTextToText, GenerationConfig

from rime_pl.backbone import tower
from rime_pl.backbone.adapters import attach_adapters, load_adapter_weights, read_contract
from rime_pl.backbone.base_path import find_base
from rime_pl.backbone.config import BackboneConfig, LoadSettings
from rime_pl.backbone.fingerprint import base_fingerprint, embedding_fingerprint
from rime_pl.backbone.head import Sampling, Table, token_logprobs
from rime_pl.backbone.lora import add_in_place, trained_table
from rime_pl.backbone.packing import TAKE_MASKS, Packing, not_usable, pack_rows
from rime_pl.backbone.patch_embedding import multiply_patches
from rime_pl.backbone.pooling import first_position, pool_at
from rime_pl.backbone.precision import check_device
from rime_pl.backbone.quantization import keep_packed_weights, quantization_config
from rime_pl.backbone.shared_prompts import SharedPrompts, continued_positions
from rime_pl.backbone.vision_attention import attend_pictures_together
from rime_pl.errors import RimeError
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import LATENT_TOKEN
from rime_pl.types import Completions, Prompts

#: Kind of media ("image", "video") -> their features, as the Hugging Face model takes them.
MediaFeatures = dict[str, Any]


@dataclass
class BackboneOutput:
    """The results of one forward."""

    disc: Tensor  # (R, D) float32, normalised
    gen: Tensor | None  # (N, D) float32, normalised; None without completions
    gen_found: Tensor | None  # (N,) bool: whether the completion holds <gen_emb>; else its row of gen is 0
    logprobs: Tensor | None  # (M,) float32, in nats: of the labels, row by row
    entropy: Tensor | None  # (M,) float32, in nats, without gradient; None unless the sampling wants it
    alternative: Tensor | None = None  # (R, D) float32, normalised: of the alternatives


class Backbone(nn.Module):
    """A multimodal language model with an adapter and two mode tokens at which embeddings are read.

    Args:
        config: Checkpoint, bits and adapter.
        processor: Its tokenizer knows the ids of the mode tokens.
        device: Device of the weights; None is the CPU.
        lora: False for a checkpoint into which LoRA was merged, which needs none.
    """

    def __init__(
        self,
        config: BackboneConfig,
        processor: RimeProcessor,
        device: str | torch.device | None = None,
        lora: bool = True,
    ):
        super().__init__()
        self.config = config
        self.processor = processor
        model = _load(config, device)
        self.base_hash = base_fingerprint(config.name_or_path)
        self.old_base_hash = embedding_fingerprint(model)  # before rows are added
        self.adapt(model, lora)

    def adapt(self, model: Any, lora: bool = True) -> None:
        """Freeze a loaded model, add rows for new mode tokens and attach the adapters."""
        config, processor = self.config, self.processor
        if config.attn_implementation == "sdpa":
            attend_pictures_together(model)
        pack_rows(model, config.attn_implementation)
        multiply_patches(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
            # Large checkpoints have spare rows; the tiny one has none. mean_resizing would compute the
            # covariance of a 150k x 1.5k table for minutes, and the new rows are set below anyway.
            model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
        if processor.new_tokens:
            _start_new_rows(model, processor)
        self.peft = attach_adapters(model, config, processor.learned_ids, lora)
        add_in_place(self.peft)
        keep_packed_weights(self)
        if config.gradient_checkpointing:
            self.language_model.gradient_checkpointing_enable({"use_reentrant": False})
            # it asks for gradients of inputs, and the patch embedding of some vision towers counts as one
            self.language_model.disable_input_require_grads()
        self.train()  # from_pretrained returns eval mode, and Lightning does not change it

    @property
    def language_model(self) -> Any:
        """Return the Hugging Face model, with LoRA inside."""
        return self.peft.get_base_model()

    def forward(
        self,
        prompts: Prompts,
        completions: Completions | None = None,
        labels: Tensor | None = None,
        features: MediaFeatures | None = None,
        alternatives: Completions | None = None,
        sampling: Sampling | None = None,
    ) -> BackboneOutput:
        """Run one forward over R prompts, each with its completions behind it.

        Args:
            prompts: R rows.
            completions: N = R * G rewrites with <gen_emb>, the G of a prompt together; None gives only the
                discriminative embedding.
            labels: (N, C) int64, the tokens whose log-probability is wanted at each place of the completions;
                -100 where none is. None for none at all.
            features: From :meth:`encode_media`, so that several forwards share one pass of the tower.
            alternatives: R further rewrites where G is 1, of any width, only to be embedded.
            sampling: The distribution of the log-probabilities; None is the model's own.

        Raises:
            RimeError: If a prompt has no discriminative token.
        """
        alone = alternatives is not None and self.config.attn_implementation not in TAKE_MASKS
        behind = [part for part in (completions, None if alone else alternatives) if part is not None]
        hidden = self._hidden(prompts, behind, features)  # (R, P, D), then (N, C, D) for each
        out = BackboneOutput(self.read_disc(prompts, hidden[0]), None, None, None, None)
        if completions is not None:
            out.gen, out.gen_found = self.read_gen(completions, hidden[1])
            if labels is not None:
                labelled = labels != -100  # (N, C), M of them True
                # the token at completion position c is predicted one position earlier
                start = hidden[0][:, -1:].repeat_interleave(len(completions) // len(prompts), dim=0)
                before = torch.cat([start, hidden[1][:, :-1]], dim=1)  # (N, C, D)
                out.logprobs, out.entropy = token_logprobs(
                    before[labelled],
                    self.head(),
                    labels[labelled],
                    sampling or Sampling(),
                )
        if alternatives is not None:
            last = self._hidden(prompts, [alternatives], features) if alone else hidden
            out.alternative, _ = self.read_gen(alternatives, last[-1])
        return out

    def head(self) -> Table:
        """Return the table of the head, whose rows of the mode tokens train."""
        return trained_table(self.language_model.lm_head.token_adapter)

    def read_gen(self, completions: Completions, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return embeddings (N, D) from hidden states (N, C, D), and (N,) bool: which rows hold <gen_emb>."""
        at, found = first_position(completions.ids, completions.mask, self.processor.gen_id)
        return pool_at(hidden, at, found), found

    def read_disc(self, prompts: Prompts, hidden: Tensor) -> Tensor:
        """Return the discriminative embeddings (R, D) of prompts from their hidden states (R, P, D).

        Raises:
            RimeError: If a prompt has no discriminative token.
        """
        at, found = first_position(prompts.input_ids, prompts.attention_mask, self.processor.disc_id)
        if not bool(found.all()):
            raise RimeError(
                f"Each prompt must hold {self.processor.prompt.disc_token}, but one lacks it. Is it cut off?"
            )
        return pool_at(hidden, at, found)

    def _hidden(
        self, prompts: Prompts, behind: list[Completions], features: MediaFeatures | None
    ) -> list[Tensor]:
        """Return the hidden states of prompts (R, P, D), then those of the completions behind, (N, C, D)."""
        counts = [len(part) // len(prompts) for part in behind]
        several = sum(counts) > 1
        if several and self.config.attn_implementation not in TAKE_MASKS:
            (count,) = set(counts)
            every = torch.arange(len(prompts), device=prompts.input_ids.device).repeat_interleave(count)
            read, *written = self._hidden(prompts.select(every), behind, None)
            return [read[::count], *written]
        features = self._encode_media(prompts) if features is None else features
        valid = [part.mask for part in behind]
        dtype = self.language_model.get_input_embeddings().weight.dtype
        packing = (
            SharedPrompts.of(prompts.attention_mask, valid, dtype)
            if several
            else Packing.of(prompts.attention_mask, *valid)
        )
        read_at = self.prompt_positions(prompts)
        output = self.language_model.model(
            input_ids=packing.pick(prompts.input_ids, *(part.ids for part in behind)),
            position_ids=packing.pick(read_at, *(continued_positions(read_at, part.ids) for part in behind)),
            **self._attention_inputs(packing),
            **({} if features is None else {"mm_encoder_outputs": features}),
            use_cache=False,
        )
        return [*packing.put_back(output.last_hidden_state)]

    def _attention_inputs(self, packing: Packing | SharedPrompts) -> dict[str, Any]:
        """Return what tells attention the rows apart, and the completions of a prompt."""
        kernel = self.config.attn_implementation
        if isinstance(packing, Packing) and kernel not in TAKE_MASKS:
            return packing.borders()
        if isinstance(packing, Packing) and kernel == "sdpa":
            return {"packing": packing}  # causal
        weight = self.language_model.get_input_embeddings().weight
        # a mask of four dimensions goes through transformers as it is, in place of one of N * N numbers
        whole = packing.with_masks(weight.dtype) if kernel == "eager" else packing
        return {"packing": whole, "attention_mask": weight.new_zeros(1, 1, 1, 1)}

    def run(self, **inputs: Any) -> Any:
        """Run the model below its head; a sharded one gathers its weights as in ``forward``."""
        return self.language_model.model(**inputs)

    def media_inputs(self, prompts: Prompts, features: MediaFeatures | None = None) -> dict[str, Any]:
        """Return the media arguments of the Hugging Face model; empty if there are no media.

        Args:
            prompts: Their media.
            features: From :meth:`encode_media`; None to run the vision tower here.
        """
        features = self.encode_media(prompts) if features is None else features
        return {} if features is None else {"mm_encoder_outputs": features}

    def pixels(self, prompts: Prompts) -> Tensor:
        """Return the patches of all media (patches, patch_dim) float32, on the device of the tokens."""
        assert prompts.pixel_values is not None, "only rows with media have pixels"
        return self.processor.media.normalised(prompts.pixel_values.to(prompts.input_ids.device))

    def layout(self, prompts: Prompts, ids: Tensor) -> dict[str, Any]:
        """Return what the Hugging Face model makes positions of: grids, seconds and kinds of tokens.

        Args:
            prompts: Their media.
            ids: (R, L) int64, the tokens of the prompts and of what follows.
        """
        if prompts.grid_thw is None or prompts.seconds is None:
            return {}
        clips = prompts.seconds > 0
        kinds = (ids == self.processor.image_id).int() + 2 * (ids == self.processor.video_id).int()
        found: dict[str, Any] = {"mm_token_type_ids": kinds, "image_grid_thw": prompts.grid_thw[~clips]}
        if bool(clips.any()):
            found["video_grid_thw"] = prompts.grid_thw[clips]
            found["second_per_grid_ts"] = prompts.seconds[clips].tolist()
        return found

    def prompt_positions(self, prompts: Prompts) -> Tensor:
        """Return the rotary positions (time, height, width) of left-padded prompts.

        Returns:
            (3, R, P) int64; the three are equal at text tokens. Text behind a clip of a Qwen2-VL or
            Qwen2.5-VL starts where transformers 5 lets it start, which may be within the time of the clip.
        """
        if prompts.grid_thw is None:
            counted = (prompts.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
            return counted.expand(3, -1, -1)
        positions: Tensor
        positions, _ = self.language_model.model.get_rope_index(
            input_ids=prompts.input_ids,
            attention_mask=prompts.attention_mask,
            **self.layout(prompts, prompts.input_ids),
        )
        return positions

    def encode_media(self, prompts: Prompts) -> MediaFeatures | None:
        """Run the vision tower once over all media of the rows, for one or several forwards.

        FSDP2 gathers what this needs, so it must not be called inside another method that FSDP2 knows.

        Returns:
            The features of pictures with pages and those of clips; without media None, or, where processes
            wait for each other in the tower, features of no token.
        """
        return self._encode_media(prompts)

    def _encode_media(self, prompts: Prompts) -> MediaFeatures | None:
        model, trains = self.language_model, self.config.trains_tower
        if prompts.pixel_values is None or prompts.grid_thw is None or prompts.seconds is None:
            if isinstance(model.model.visual, FSDPModule) or (trains and self.training):
                return tower.encode_nothing(model, prompts.input_ids.device, trains)
            return None
        clips = (prompts.seconds > 0).tolist()
        return tower.encode(model, self.pixels(prompts), prompts.grid_thw, clips, trains)


def load_backbone(
    adapter: str | Path,
    device: str | torch.device | None = None,
    base: str | Path | None = None,
    settings: LoadSettings = LoadSettings(),
) -> Backbone:
    """Load the trained backbone of an adapter folder, in eval mode.

    Args:
        adapter: The folder.
        device: Device of the weights; None is the CPU.
        base: Folder or Hugging Face name of the base model (default: where the adapter says that it lies).
        settings: What is to be otherwise than in training.

    Raises:
        RimeError: If the folder holds no adapter, or one that does not fit its base model.
    """
    contract = read_contract(adapter)
    config = BackboneConfig(**settings.applied(contract["backbone"]))
    config.name_or_path = find_base(adapter, contract, base)
    processor = RimeProcessor.from_adapter(adapter)
    config.prompt = processor.prompt
    backbone = Backbone(config, processor, device)
    load_adapter_weights(backbone.peft, adapter, processor, backbone.base_hash, backbone.old_base_hash)
    return backbone.eval()


def _load(config: BackboneConfig, device: str | torch.device | None) -> Any:
    check_device(device)
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            config.name_or_path,
            dtype=getattr(torch, config.dtype),
            quantization_config=quantization_config(config),
            attn_implementation=config.attn_implementation,
            device_map={"": device or "cpu"},
            use_safetensors=True,  # a pickle can run code
        )
    except ValueError as error:
        if "attn_implementation" not in str(error):
            raise
        raise not_usable(config.attn_implementation) from error
    except OSError as error:
        raise RimeError(
            "model.backbone.name_or_path must be a Hugging Face name or a folder, but no checkpoint could be "
            f"loaded from {config.name_or_path!r} ({error}). `rime base` makes the tiny base model."
        ) from error
    # generate() fills what a call leaves out from the checkpoint's generation_config.json, such as a
    # repetition penalty, which also punishes the words of the query, or beams
    model.generation_config = GenerationConfig()
    return model


def _start_new_rows(model: Any, processor: RimeProcessor) -> None:
    """Start the rows of new mode tokens as copies of "assistant" and of end of turn; a latent one of ".".

    With random rows, the embeddings of all items start nearly equal (cosine 0.9999 with the tiny base model),
    and the contrastive losses stay at chance for hundreds of steps. Language models sum up at these two
    tokens, so these copies start at cosines of 0.84 to 0.98. The two rows differ, because with equal rows
    the modes would be half aligned before any alignment.
    """
    tokenizer = processor.tokenizer
    prompt = processor.prompt
    starts = {prompt.disc_token: tokenizer.convert_tokens_to_ids(tokenizer.tokenize("assistant"))[0]}
    starts[prompt.gen_token] = processor.turn_end_id
    starts[LATENT_TOKEN] = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("."))[0]
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
        for token in processor.new_tokens:
            layer.weight.data[tokenizer.convert_tokens_to_ids(token)] = layer.weight.data[starts[token]]
