"""The settings of a stage's run, as `rime plan` and `rime doctor` need them. The command line reads them."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from dataclasses import dataclass
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

    def module(
        self, kind: type[RimeModule], groups: dict[str, dict[str, Any]], backbone: BackboneConfig
    ) -> RimeModule:
        """Return a stage with these settings; of another stage's, those that it has, too.

        Args:
            kind: The stage's class.
            groups: Settings to change: group -> name -> value.
            backbone: In place of the run's.
        """
        given = self.values.model.as_dict()
        types = typing.get_type_hints(kind.__init__)
        chosen: dict[str, Any] = {"backbone": backbone}
        for name in inspect.signature(kind).parameters:
            if name == "backbone" or name not in given:
                continue
            value = given[name]
            if dataclasses.is_dataclass(types[name]):
                value = types[name](**{**value, **groups.get(name, {})})
            chosen[name] = value
        return kind(**chosen)
