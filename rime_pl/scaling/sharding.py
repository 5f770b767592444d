"""Shard the decoder layers of the backbone with FSDP2, without changing the packed 4-bit bytes.

Called by ``RimeModule.configure_model`` under ``ModelParallelStrategy`` of Lightning. FSDP2 must not cast
parameters here, because a cast of ``quant_storage`` changes the packed bits.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import packed_digests
from rime_pl.errors import RimeError


def shard_backbone(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Shard every decoder layer over the mesh, and the other trained weights at the root.

    Frozen parts outside the decoder (vision tower, embedding table) stay whole on every rank. They are small
    compared with the layers, and the trained token rows of PEFT index the whole table. So no rank waits for
    another in the vision tower, even if only one of them has pictures.

    Raises:
        RimeError: If an all-gather does not return the packed 4-bit weights bit by bit.
    """
    layers = backbone.language_model.model.language_model.layers
    before = [packed_digests(layer) for layer in layers]
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    frozen = {p for p in backbone.parameters() if not p.requires_grad}
    whole = {p for p in frozen if id(p) not in in_layers} if backbone.config.shard_base else frozen
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(backbone, mesh=mesh, ignored_params=whole, reshard_after_forward=False)
    register_fsdp_forward_method(backbone, "run")
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
