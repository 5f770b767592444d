"""FSDP2 for the backbone: decoder layers sharded, the packed 4-bit bytes untouched.

Called by ``RimeModule.configure_model`` under Lightning's ``ModelParallelStrategy``. No parameter cast: a
cast of ``quant_storage`` would change the packed bits.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from rime_pl.backbone.mllm import Backbone


def shard_backbone(backbone: Backbone, mesh: DeviceMesh) -> None:
    """Shard every decoder layer over the mesh; the rest of what trains is sharded at the root.

    Frozen parts outside the decoder (vision tower, embedding table) stay whole on every rank: they are small
    beside the layers, and PEFT's trained token rows index the whole table.
    """
    layers = backbone.language_model.model.language_model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    in_layers = {id(p) for layer in layers for p in layer.parameters()}
    frozen = {p for p in backbone.parameters() if id(p) not in in_layers and not p.requires_grad}
    fully_shard(backbone, mesh=mesh, ignored_params=frozen, reshard_after_forward=False)
