"""Shard decoder and vision tower of the backbone with FSDP2, without changing the packed 4-bit bytes.

Called by ``RimeModule.configure_model`` under ``ModelParallelStrategy`` of Lightning. FSDP2 must not cast
parameters here, because a cast of ``quant_storage`` changes the packed bits.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from rime_pl.backbone.config import BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import packed_digests
from rime_pl.errors import RimeError


def check_sharding(config: BackboneConfig, sharded: bool) -> None:
    """Refuse a setting that would do nothing.

    Args:
        config: Of the backbone.
        sharded: Whether FSDP2 shards the model.

    Raises:
        RimeError: If the vision tower is to be divided, and nothing is.
    """
    if config.shard_tower and not sharded:
        raise RimeError(
            "model.backbone.shard_tower=true needs FSDP2, which divides the model among processes. Add "
            "--config configs/overlays/fsdp.yaml, or set it to false."
        )


def shard_backbone(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Shard every decoder layer over the mesh, and the other trained weights at the root.

    Frozen parts outside the decoder (embedding table, vision tower) stay whole on every rank. They are small
    compared with the layers, and the trained token rows of PEFT index the whole table. With
    ``config.shard_tower``, the tower is sharded, too: block by block, and then the rest of it. Ranks wait for
    each other in there, so the backbone runs a sharded tower in each forward, with or without media.

    Raises:
        RimeError: If an all-gather does not return the packed 4-bit weights bit by bit.
    """
    layers = backbone.language_model.model.language_model.layers
    before = [packed_digests(layer) for layer in layers]
    visual, config = backbone.language_model.model.visual, backbone.config
    tower = [*visual.blocks, visual] if config.shard_tower else []
    divided = [*(layers if config.shard_base else []), *tower]
    in_them = {id(p) for part in divided for p in part.parameters()}
    whole = {p for p in backbone.parameters() if not p.requires_grad and id(p) not in in_them}
    for part in (*layers, *tower):
        fully_shard(part, mesh=mesh, ignored_params=whole)
    fully_shard(backbone, mesh=mesh, ignored_params=whole, reshard_after_forward=False)
    for method in ("run", "encode_media"):
        register_fsdp_forward_method(backbone, method)
    for number, layer in enumerate(layers):
        if gathered_digests(layer) != before[number]:
            raise RimeError(
                f"FSDP must return the packed 4-bit weights unchanged, but those of decoder layer {number} "
                "changed. Set model.backbone.shard_base=false (a whole base model on each process), or use "
                "the versions in constraints.txt."
            )


def gathered_digests(layer: FSDPModule) -> dict[str, str]:
    """Return the digests of a sharded layer, gathered and freed as in its forward."""
    layer.unshard()
    digests = packed_digests(layer)  # type: ignore[arg-type]
    layer.reshard()
    return digests
