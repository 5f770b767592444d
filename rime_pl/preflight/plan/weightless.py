"""A backbone without weights: the real classes, PEFT and bitsandbytes layers, on tensors that hold no values.

Built from a config.json alone, by predict.py and by `rime doctor`. Nothing is read, and no memory is taken.
"""

from __future__ import annotations

from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.utils import cached_file

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import linear_4bit_modules, quantization_config
from rime_pl.errors import RimeError
from rime_pl.miniature.random_checkpoint import SHAPES, model_config
from rime_pl.processing import RimeProcessor

#: The checkpoint of configs/*.yaml, which can be planned for without a download.
KNOWN = {"Qwen/Qwen2-VL-2B-Instruct": SHAPES["2b"]}
#: How long the hub may take to answer.
HUB_SECONDS = 5
#: Token ids where there is no tokenizer. 0 is what a model without values samples, so it stands for a word.
WORD, DISC, GEN, TURN_END, PAD = range(5)

aten = torch.ops.aten
_INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
_COMPARISONS = (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)


class NoValues(FakeTensorMode):
    """Where a value is asked for that is not there, the tensor counts as zeros.

    Tensors of this mode have a shape, a type and say that they lie on the CPU. The mode is never entered: it
    acts on operations that such a tensor takes part in. Token ids, masks and positions are small and real.
    """

    avoid_device_init = False  # torch's own answer asks the GPU's driver at each operation

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._inside:  # an operation that another one is made of
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func is aten._local_scalar_dense.default:
            return 0.0
        if func._overloadpacket in _INDEXING:  # how many rows a mask picks is known: it is real
            args = (args[0], _as_numbers(args[1]), *args[2:])
        if func is aten.masked_select.default:
            func, args = aten.index.Tensor, (args[0], _as_numbers([args[1].expand(args[0].shape)]))
        self._inside = True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        finally:
            self._inside = False
        if func._overloadpacket in _COMPARISONS:
            return func(*tree_map(_zeros, args))
        return tree_map(_zeros_of_whole_numbers, out)


def _as_numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Boolean masks among the indices as row numbers."""
    found: list[Tensor | None] = []
    for index in indices:
        found += index.nonzero().unbind(1) if index is not None and index.dtype == torch.bool else [index]
    return found


def _zeros(value: Any) -> Any:
    return torch.zeros((), dtype=value.dtype).expand(value.shape) if isinstance(value, FakeTensor) else value


def _zeros_of_whole_numbers(value: Any) -> Any:
    """Sampled tokens and the like become real, so that lengths can follow from them."""
    whole = isinstance(value, FakeTensor) and value.dtype in (torch.int64, torch.int32, torch.bool)
    return torch.zeros(value.shape, dtype=value.dtype) if whole else value


def local_folder(name_or_path: str) -> str | None:
    """Return the folder of a checkpoint's config.json: the one given, or one in the hub's cache."""
    try:
        config = cached_file(name_or_path, "config.json", local_files_only=True)
    except OSError:
        return None
    return config and str(Path(config).parent)


def read_architecture(name_or_path: str) -> PretrainedConfig:
    """Return the config.json of a checkpoint: a folder, a download, or the one shape that is built in.

    Raises:
        RimeError: If there is none, or it is of another kind of model.
    """
    try:
        folder = local_folder(name_or_path)
        if folder is None and name_or_path in KNOWN:
            return model_config(KNOWN[name_or_path])
        found = AutoConfig.from_pretrained(folder or _download(name_or_path))
    except Exception as error:  # the hub's client has errors of its own for a network that is not there
        reason = str(error).split("\n")[0] or f"the hub does not answer within {HUB_SECONDS} s"
        raise RimeError(
            f"model.backbone.name_or_path: no config.json for {name_or_path!r} ({reason}). Give a folder "
            f"with the checkpoint's config.json (weights are not needed), or {', '.join(KNOWN)}."
        ) from error
    if not {"vision_config", "image_token_id"} <= found.to_dict().keys():
        kinds = "must be a Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint"
        raise RimeError(f"model.backbone.name_or_path {kinds}, but {name_or_path} is {found.model_type!r}.")
    return found


def _download(name: str) -> str:
    """Return the folder of a checkpoint's small files, without its weights.

    The hub is asked once before, because its client tries again for minutes if there is no network.
    """
    with ThreadPool(1) as pool:  # nothing waits for this thread, also not the end of the process
        pool.apply_async(HfApi().model_info, (name,)).get(HUB_SECONDS)
    return snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.jinja"])


def read_own_processor(config: BackboneConfig) -> RimeProcessor | None:
    """Return the checkpoint's processor, if it is on this machine.

    Raises:
        RimeError: If its files or the limits of the prompt are refused.
    """
    folder = local_folder(config.name_or_path)
    if folder is None or not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    return RimeProcessor.from_pretrained(folder, config.prompt)


def read_processor(config: BackboneConfig, architecture: PretrainedConfig) -> RimeProcessor:
    """Return the checkpoint's processor, or a stand-in with made-up token ids where there is none."""
    if (own := read_own_processor(config)) is not None:
        return own
    stand_in: Any = SimpleNamespace(
        disc_id=DISC,
        gen_id=GEN,
        learned_ids=[DISC, GEN],
        turn_end_id=TURN_END,
        pad_id=PAD,
        image_id=architecture.image_token_id,
        video_id=architecture.video_token_id,
        special_ids=[DISC, GEN, TURN_END, PAD, architecture.image_token_id],
        new_tokens=[],  # big checkpoints have spare rows for them
        decode=lambda completions: [""] * len(completions),
        media=SimpleNamespace(normalised=lambda pixels: pixels.float()),
        tokenizer=range(architecture.text_config.vocab_size),
        prompt=config.prompt,
    )
    return stand_in  # type: ignore[no-any-return]


class WeightlessBackbone(Backbone):
    """The backbone as it trains, adapters included, on tensors without values.

    Args:
        config: Bits, dtype, adapters, checkpointing.
        architecture: From :func:`read_architecture`; the processor from :func:`read_processor`.

    Raises:
        RimeError: If ``lora_targets`` or ``lora_tower`` does not fit the layers of the checkpoint.
    """

    def __init__(
        self, config: BackboneConfig, architecture: PretrainedConfig, processor: RimeProcessor
    ) -> None:
        nn.Module.__init__(self)
        self.config, self.processor, self.base_hash = config, processor, ""
        self.values = NoValues()
        dtype = getattr(torch, config.dtype)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                architecture, dtype=dtype, attn_implementation=config.attn_implementation
            )
            settings: Any = quantization_config(config)
            if settings is not None:
                skipped = settings.llm_int8_skip_modules
                model = replace_with_bnb_linear(model, skipped, quantization_config=settings)
                model.is_loaded_in_4bit = True
                for layer in linear_4bit_modules(model).values():
                    for stored in layer.parameters():  # in the type that weights and biases are stored in
                        stored.data = stored.data.to(dtype)
            self.adapt(model)
        self._drop_values(dtype)

    def _drop_values(self, dtype: torch.dtype) -> None:
        """Turn meta tensors into tensors that say they lie on the CPU, so that its operations are chosen."""
        packed = {id(layer.weight) for layer in linear_4bit_modules(self).values()}
        made: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones are kept: an id is unique among the living
        for module in self.modules():
            groups: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for group, name, old in [(one, *item) for one in groups for item in one.items()]:
                if old is None:
                    continue
                if id(old) not in made:
                    with self.values:
                        new = torch.empty(old.shape, dtype=old.dtype)
                    if id(old) in packed:
                        new = _pack(new, dtype)
                    elif group is module._parameters:
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    made[id(old)] = (old, new)
                group[name] = made[id(old)][1]

    def tensors(self) -> list[Tensor]:
        """Every weight and buffer once, the 4-bit state included."""
        found: list[Tensor] = [*self.parameters(), *self.buffers()]
        for layer in linear_4bit_modules(self).values():
            found += state_tensors(layer.weight.quant_state)
        return found


def _pack(weight: Tensor, dtype: torch.dtype) -> nn.Parameter:
    """An NF4 weight with its double-quantised state, by bitsandbytes itself."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, compress_statistics=True, quant_type="nf4", quant_storage=dtype)
    parameter: Any = nn.Parameter(packed, requires_grad=False)
    parameter.quant_state = state
    return parameter


def state_tensors(state: Any) -> list[Tensor]:
    """Return the tensors of a bitsandbytes quantisation state, those of its scales included."""
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]
