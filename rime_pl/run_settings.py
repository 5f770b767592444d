"""The settings of a run that has not started, and the module and the data that they describe.

Read by rime_pl/commands/settings.py, for `rime run`, `rime plan` and `rime doctor`.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from rime_pl.backbone.config import BackboneConfig
from rime_pl.datamodules.datamodule import RimeDataModule
from rime_pl.modules.base import RimeModule
from rime_pl.processing import RimeProcessor


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

    def data(self, processor: RimeProcessor | None) -> RimeDataModule:
        """Return the run's data module, not set up."""
        linked = {"name_or_path": self.backbone.name_or_path, "prompt": self.backbone.prompt}
        types, values = typing.get_type_hints(RimeDataModule.__init__), self.values.data.as_dict()
        for name, value in values.items():
            if is_dataclass(types[name]) and isinstance(value, dict):
                values[name] = types[name](**value)
        data = RimeDataModule(**values | linked)
        data.processor = processor
        return data
