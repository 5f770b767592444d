"""The settings of a stage's run, as `rime plan` and `rime doctor` need them. The command line reads them."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from rime_pl.backbone.config import BackboneConfig
from rime_pl.modules.base import RimeModule


@dataclass(frozen=True)
class RunSettings:
    """The settings of a stage's run."""

    stage: str
    module_class: type[RimeModule]
    values: Any  # the namespace of the stage's parser
    backbone: BackboneConfig
    num_processes: int
    strategy: str  # "single", "ddp" or "fsdp"

    def module(self, kind: type[RimeModule], changes: Mapping[str, dict[str, Any]] = {}) -> RimeModule:
        """Return a stage with these settings, changed by group -> name -> value; of another stage, too."""
        types = typing.get_type_hints(kind.__init__)
        chosen = {name: value for name, value in self.values.model.as_dict().items() if name in types}
        for name, value in chosen.items():
            if name != "backbone" and is_dataclass(types[name]):
                chosen[name] = types[name](**value | changes.get(name, {}))
        return kind(**chosen | {"backbone": replace(self.backbone, **changes.get("backbone", {}))})
