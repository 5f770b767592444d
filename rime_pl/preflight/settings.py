"""The settings of a run that has not started: what `rime plan` and `rime doctor` look at.

Read by rime_pl/commands/settings.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jsonargparse import ArgumentParser

from rime_pl.backbone.config import BackboneConfig
from rime_pl.errors import RimeError
from rime_pl.modules.base import RimeModule


@dataclass(frozen=True)
class RunSettings:
    """The settings of a stage's run."""

    stage: str
    values: Any  # the namespace of the stage's parser
    num_processes: int
    strategy: str  # "single", "ddp" or "fsdp"
    modules: Mapping[str, type[RimeModule]]  # of all stages

    @property
    def backbone(self) -> BackboneConfig:
        """The settings of the backbone alone."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(BackboneConfig, "backbone")
        chosen = parser.get_defaults()
        chosen.backbone = self.values.model.backbone
        config: BackboneConfig = parser.instantiate_classes(chosen).backbone
        return config

    @property
    def local_rows(self) -> int:
        """Pairs of a batch on one process."""
        total, processes = self.values.data.batch_size, self.num_processes
        if total < processes or total % processes:
            raise RimeError(
                f"data.batch_size={total} cannot be divided among {processes} processes; give a multiple."
            )
        return int(total // processes)

    def module(self, stage: str | None = None) -> RimeModule:
        """Build the module of a stage, without a backbone; another stage takes the settings that it knows."""
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(self.modules[stage or self.stage], "model")
        chosen = parser.get_defaults()
        for key in list(chosen.model.keys()):
            if key in self.values.model:
                chosen.model[key] = self.values.model[key]
        module: RimeModule = parser.instantiate_classes(chosen).model
        return module

    def change(self, values: Mapping[str, Any]) -> RunSettings:
        """The same settings with other values, by names such as ``model.temperature``."""
        changed = self.values.clone()
        for name, value in values.items():
            changed[name] = value
        return replace(self, values=changed)
