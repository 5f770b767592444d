"""A step of each stage beside the memory that `rime plan` predicts.

Parts of `rime gpu-check`. What they measure is kept in ``Bench.runs`` for the part on throughput.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightning as L
from torch import Tensor

from rime_pl.backbone.adapters import adapter_state, save_adapter
from rime_pl.backbone.mllm import Backbone
from rime_pl.errors import RimeError
from rime_pl.modules.base import RimeModule
from rime_pl.modules.cma import CMAModule
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.modules.sft import SFTModule
from rime_pl.preflight.gpu.bench import Bench
from rime_pl.preflight.gpu.report import Part
from rime_pl.preflight.gpu.watch import Seen
from rime_pl.preflight.plan.arithmetic import StagePlan

#: The stages that learn from annotated rewrites.
STAGES: dict[str, type[RimeModule]] = {"sft": SFTModule, "cma": CMAModule}
#: Items that go through Refine-RL together, as in configs/refine_rl.yaml: logits of 2 x 8 rewrites at a time.
ITEMS_PER_PASS = 2


def run_stage(bench: Bench, stage: str) -> Seen:
    """The run of a stage, once for all parts.

    Raises:
        RimeError: If an earlier part has tried in vain.
    """
    if stage not in bench.runs:
        bench.runs[stage] = "it failed before; see its own part"
        bench.runs[stage] = _refine_rl(bench) if stage == "refine_rl" else _plain(bench, stage)
    seen = bench.runs[stage]
    if isinstance(seen, str):
        raise RimeError(seen)
    return seen


def _plain(bench: Bench, stage: str) -> Seen:
    return bench.fit(STAGES[stage](bench.config(), warmup_steps=0), bench.batch(bench.num_pairs))


def _policy(bench: Bench) -> RefineRLModule:
    return RefineRLModule(
        bench.config(),
        init_adapter_from=str(bench.adapter),
        num_generations=bench.amounts.num_generations,
        max_new_tokens=bench.amounts.new_tokens,
        num_anchors=bench.amounts.rl_pairs,
        items_per_pass=ITEMS_PER_PASS,
        warmup_steps=0,
    )


def _refine_rl(bench: Bench) -> Seen:
    """From an adapter that does nothing yet: LoRA's own start."""
    backbone = Backbone(bench.config(), bench.processor, bench.device)
    state, base = adapter_state(backbone.peft), backbone.base_hash
    save_adapter(bench.adapter, backbone.peft, state, bench.processor, backbone.config, base)
    del backbone
    amounts = bench.amounts
    module = _policy(bench)
    return bench.fit(module, bench.batch(amounts.rl_pairs), more=[Ending(amounts.new_tokens)])


class Ending(L.Callback):
    """Makes <gen_emb> likelier while rewrites are drawn.

    A random model hardly ever ends a rewrite, and where none ends there is no reward and no gradient.

    Args:
        new_tokens: Two of three rewrites end within as many.
    """

    def __init__(self, new_tokens: int) -> None:
        self.new_tokens = new_tokens

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, RimeModule)
        processor = pl_module.model.processor
        # all words equally likely, this makes <gen_emb> one in new_tokens
        bonus = math.log(max(1.0, len(processor.tokenizer) / self.new_tokens))

        def favour(layer: Any, inputs: Any, logits: Tensor) -> Tensor:
            bias = logits.new_zeros(logits.shape[-1])
            bias[processor.gen_id] = bonus
            return logits + bias

        pl_module.model.language_model.get_output_embeddings().register_forward_hook(favour)


# -- the parts --------------------------------------------------------------------------------------------


def sft(bench: Bench, out: Part) -> None:
    """Stage 1."""
    _measured(bench, out, "sft")


def cma(bench: Bench, out: Part) -> None:
    """Stage 2; every query is encoded once more, with a wrong rewrite."""
    _measured(bench, out, "cma")


def refine_rl(bench: Bench, out: Part) -> None:
    """Stage 3; two of three rewrites end by themselves."""
    amounts = bench.amounts
    seen = run_stage(bench, "refine_rl")
    out.add("pairs", "pairs of a step", amounts.rl_pairs)
    out.add("num_generations", "rewrites of an item, both sides", amounts.num_generations)
    out.add("new_tokens", "most tokens of a rewrite", amounts.new_tokens)
    _step(out, seen)
    _planned(out, seen, lambda: bench.plan(_policy(bench), bench.batch(amounts.rl_pairs)))
    for key, what in (
        ("rewrite_length", "tokens of a rewrite, mean"),
        ("reward_format", "rewrites that end by themselves, share"),
        ("no_signal", "items without signal, share"),
    ):
        out.add(key, what, seen.logged[f"train/{key}"], "ratio")
    sound(out, seen)


def _measured(bench: Bench, out: Part, stage: str) -> None:
    seen = run_stage(bench, stage)
    out.add("pairs", "pairs of a step", bench.num_pairs)
    _step(out, seen)
    module = STAGES[stage](bench.config())
    _planned(out, seen, lambda: bench.plan(module, bench.batch(bench.num_pairs)))
    sound(out, seen)


def _planned(out: Part, seen: Seen, plan: Callable[[], StagePlan]) -> None:
    """Refine-RL's is a bound: as if every rewrite took its whole budget."""
    with out.attempt("rime plan"):
        predicted = plan().peak
        out.add("plan_bytes", "peak that `rime plan` predicts", predicted, "bytes")
        error = None if seen.step_peak is None else predicted / seen.step_peak - 1
        out.add("plan_error", "predicted over measured, minus 1", error, "share")


def _step(out: Part, seen: Seen) -> None:
    out.add("load_seconds", "load in 4 bits", seen.load_seconds, "s")
    out.add("load_peak_bytes", "peak while loading", seen.load_peak, "bytes")
    out.add("step_seconds", "a step", seen.seconds, "s")
    out.add("step_peak_bytes", "peak of a step, weights included", seen.step_peak, "bytes")


def sound(out: Part, seen: Seen) -> None:
    """Whether it trained, and nothing but what shall train."""
    out.add("losses", "loss of each step", seen.losses)
    moved = seen.moved / seen.trained
    out.add("moved", "trained numbers that moved, share", moved, "ratio")
    out.require(moved > 0.9, f"only {moved:.0%} of the trained numbers have moved: the rest is rounded away")
    out.add("intact", "packed 4-bit weights unchanged", seen.intact)
    out.require(seen.intact, "the packed 4-bit weights changed while training")
