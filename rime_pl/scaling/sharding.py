"""FSDP2 for the backbone: decoder layers sharded, the packed 4-bit bytes untouched.

Called by ``RimeModule.configure_model`` under Lightning's ``ModelParallelStrategy``. No parameter cast: a
cast of ``quant_storage`` would change the packed bits.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import packed_digests
from rime_pl.errors import RimeError


def shard_backbone(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Shard every decoder layer over the mesh; the rest of what trains is sharded at the root.

    Frozen parts outside the decoder (vision tower, embedding table) stay whole on every rank: they are small
    beside the layers, and PEFT's trained token rows index the whole table. So no rank waits for another in
    the vision tower, whether it has pictures or not.

    Raises:
        RimeError: If packed 4-bit weights do not come back from an all-gather bit by bit.
    """
    layers = backbone.language_model.model.language_model.layers
    before = [packed_digests(layer) for layer in layers]
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    frozen = {p for p in backbone.parameters() if not p.requires_grad}
    whole = {p for p in frozen if id(p) not in in_layers} if backbone.config.shard_base else frozen
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(backbone, mesh=mesh, ignored_params=whole, reshard_after_forward=False)
    for number, layer in enumerate(layers):
        if gathered_digests(layer) != before[number]:
            raise RimeError(
                f"the packed 4-bit weights of decoder layer {number} changed on their way through FSDP's "
                "all-gather. Set model.backbone.shard_base=false (a whole base on each process), or use the "
                "versions in constraints.txt."
            )


def gathered_digests(layer: FSDPModule) -> dict[str, str]:
    """Of a sharded layer, by the way that its forward takes: all-gather, read, free."""
    layer.unshard()
    digests = packed_digests(layer)  # type: ignore[arg-type]
    layer.reshard()
    return digests
