"""What each stage is compared with, and what its claim needs.

Read by all files of ``rime_pl/study``. A *variant* (ours) is the run under study or one of its controls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MEAN = "mean of the four modes"
#: Variants that train for a given time: their number of steps differs from machine to machine.
OF_TIME = {"further_cma_same_seconds"}
EMPTY = "trace/empty"


@dataclass(frozen=True)
class Difference:
    """recall@1 in one variant minus recall@1 in another, over the same test queries."""

    first: str  # variant
    second: str  # variant
    mode: str  # a pair of MODE_PAIRS, MEAN, or another column of ranks.json
    at_least: float | None = None  # what the claim needs; None: shown, but no part of the claim
    second_mode: str = ""  # default: ``mode``
    label: str = ""  # default: mode and labels of the variants

    @property
    def key(self) -> str:
        """Return its name in a record: ``refine_rl gen-gen - before gen-gen``."""
        return f"{self.first} {self.mode} - {self.second} {self.second_mode or self.mode}"

    def verdict(self, found: Mapping[str, Any]) -> str:
        """Return whether the interval and each seed lie above what the claim needs; equal is not above.

        >>> need = Difference("a", "b", "gen-gen", at_least=0.0)
        >>> bounds = ((0.1, 0.2), (-0.1, 0.1), (-0.2, -0.1), (0.0, 0.0))
        >>> [need.verdict({"lower": low, "upper": high, "seeds": [high]}) for low, high in bounds]
        ['holds', 'not shown', 'does not hold', 'not shown']
        >>> need.verdict({"lower": 0.1, "upper": 0.2, "seeds": [0.4, -0.1]})
        'not shown'
        """
        if self.at_least is None:
            return "-"
        if min(found["lower"], *found["seeds"]) > self.at_least:
            return "holds"
        return "does not hold" if found["upper"] < self.at_least else "not shown"


@dataclass(frozen=True)
class Comparison:
    """One stage beside its controls."""

    title: str
    corpora: Sequence[str]  # where `make claims` checks it
    subject: str  # the variant under study
    variants: Mapping[str, tuple[str, str]]  # name -> label and colour, in the order of the tables
    differences: Sequence[Difference]

    def label(self, difference: Difference) -> str:
        """Return a difference as a reader sees it: ``gen-gen: Refine-RL - CMA (before)``."""
        first, second = self.variants[difference.first][0], self.variants[difference.second][0]
        second = f"({second})" if ", " in second else second
        mode = "gen-gen with an empty rewrite" if difference.mode == EMPTY else difference.mode
        return difference.label or f"{mode}: {first} - {second}"


COMPARISONS = {
    "sft": Comparison(
        "SFT",
        ("scenes", "mini"),
        "rewrite",
        {
            "discriminative_only": ("discriminative loss only", "#b8c2cf"),
            "latent_tokens": ("latent tokens", "#8e6fc9"),
            "filler_tokens": ("filler tokens", "#6b7785"),
            "chain_of_thought_same_tokens": (
                "chain of thought + rewrite, same number of training tokens",
                "#c9a227",
            ),
            "chain_of_thought": ("chain of thought + rewrite, same number of training steps", "#e08a00"),
            "rewrite": ("rewrite", "#2f6bde"),
        },
        (
            Difference("rewrite", "chain_of_thought", "gen-gen", -0.02),
            Difference("rewrite", "chain_of_thought_same_tokens", "gen-gen", 0.0),
            Difference("rewrite", "filler_tokens", "gen-gen", 0.0),
            Difference("rewrite", "latent_tokens", "gen-gen", 0.0),
            Difference(
                *("rewrite", "discriminative_only", "gen-gen", 0.0, "disc-disc"),
                "gen-gen with rewrites - disc-disc of a model trained without them",
            ),
            Difference("rewrite", "chain_of_thought", "disc-disc"),
            Difference("rewrite", "discriminative_only", "disc-disc"),
        ),
    ),
    "cma": Comparison(
        "CMA",
        ("openmoji", "scenes", "mini"),
        "cma",
        {
            "before": ("SFT (before)", "#b8c2cf"),
            "further_sft": ("further SFT for the same number of steps", "#6b7785"),
            "without_decisive": ("CMA without the decisive term", "#e08a00"),
            "cma": ("CMA", "#2f6bde"),
        },
        (
            Difference("cma", "further_sft", "gen-disc", 0.3),
            Difference("cma", "further_sft", "disc-gen", 0.3),
            Difference("cma", "further_sft", "disc-disc", -0.02),
            Difference("cma", "cma", "gen-gen", 0.5, EMPTY, "gen-gen after CMA: own rewrite - empty rewrite"),
            Difference("without_decisive", "cma", EMPTY, 0.0),
            Difference("cma", "without_decisive", MEAN, -0.02),
            Difference("cma", "before", "disc-disc"),
            Difference("cma", "cma", "gen-gen", None, "disc-disc", "after CMA: gen-gen - disc-disc"),
        ),
    ),
    "refine_rl": Comparison(
        "Refine-RL",
        ("openmoji", "scenes"),
        "refine_rl",
        {
            "before": ("CMA (before)", "#b8c2cf"),
            "further_cma": ("further CMA for the same number of steps", "#8a96a3"),
            "further_cma_same_seconds": ("further CMA for the same time", "#5b6670"),
            "shuffled_rewards": ("RL with shuffled rewards", "#c9a227"),
            "ume_r1": ("RL with the reward of UME-R1", "#e08a00"),
            "rollout_anchors": ("RL with rollouts of the batch as anchors", "#8e6fc9"),
            "greedy_anchors": ("RL with greedy rewrites of the reference as anchors", "#5f9e8f"),
            "batch_anchors": ("RL with disc anchors of the batch only", "#6fa8e0"),
            "refine_rl": ("Refine-RL", "#2f6bde"),
        },
        (
            Difference("refine_rl", "before", "gen-gen", 0.0),
            Difference(
                *("refine_rl", "refine_rl", "crossed/new-old", 0.0, "crossed/old-old"),
                "gen-gen with the old embedder: new rewrites - old rewrites",
            ),
            Difference("refine_rl", "further_cma", "gen-gen", 0.0),
            Difference("refine_rl", "further_cma_same_seconds", "gen-gen", 0.0),
            Difference("refine_rl", "shuffled_rewards", "gen-gen", 0.0),
            Difference("batch_anchors", "rollout_anchors", "gen-gen"),
            Difference("refine_rl", "batch_anchors", "gen-gen"),
            Difference("refine_rl", "greedy_anchors", "gen-gen"),
            Difference("refine_rl", "ume_r1", "gen-gen"),
            Difference("refine_rl", "before", "disc-disc", -0.02),
        ),
    ),
}
