"""What a stage does, in one table and one picture: before, the controls, the run itself.

Called by `rime compare` with the numbers of one or several seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, mode
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rime_pl.types import MODE_PAIRS, REWRITE_ABLATION

#: Instead of one of MODE_PAIRS: the mean of all four.
MEAN = "mean"


@dataclass(frozen=True)
class Difference:
    """recall@1 of ``pair`` in one variant minus that of ``other_pair`` (the same one) in another."""

    name: str
    variant: str
    other: str
    pair: str  # of MODE_PAIRS, their mean, or another column of ranks.json, such as trace/empty
    label: str
    other_pair: str | None = None
    at_least: float | None = None  # what the claim needs


@dataclass(frozen=True)
class Comparison:
    """What is shown of a stage."""

    subject: str  # the variant that the others are the controls of
    claim: str  # what the differences with ``at_least`` would show, together
    variants: dict[str, tuple[str, str]]  # name -> how a reader should call it, and its colour
    differences: tuple[Difference, ...]


COMPARISONS = {
    "sft": Comparison(
        "rewrite",
        "A short rewrite does what steps of reasoning do, for fewer tokens, and it is its words that do it.",
        {
            "disc_only": ("discriminative alone", "#b8c2cf"),
            "pause": ("pauses in place of words", "#6b7785"),
            "cot_tokens": ("steps + rewrite, equal tokens", "#c9a227"),
            "cot": ("steps + rewrite, equal steps", "#e08a00"),
            "rewrite": ("rewrite", "#2f6bde"),
        },
        (
            Difference(
                *("rewrite_minus_cot", "rewrite", "cot", "gen-gen"),
                label="gen-gen with the rewrite minus with steps + rewrite, equal training steps",
                at_least=-0.02,
            ),
            Difference(
                *("rewrite_minus_cot_tokens", "rewrite", "cot_tokens", "gen-gen"),
                label="gen-gen with the rewrite minus with steps + rewrite, equal training tokens",
                at_least=0.0,
            ),
            Difference(
                *("rewrite_minus_pause", "rewrite", "pause", "gen-gen"),
                label="gen-gen with the rewrite minus with pauses",
                at_least=0.0,
            ),
            Difference(
                *("rewrite_minus_disc_only", "rewrite", "disc_only", "gen-gen"),
                label="gen-gen with the rewrite minus disc-disc of training that alone",
                other_pair="disc-disc",
                at_least=0.0,
            ),
        ),
    ),
    "cma": Comparison(
        "decisive",
        "Alignment lets any mode find any mode, and the decisive term keeps the rewrite in use.",
        {
            "before": ("SFT (before)", "#b8c2cf"),
            "control": ("as many further SFT steps", "#6b7785"),
            "plain": ("CMA, plain", "#e08a00"),
            "decisive": ("CMA, decisive", "#2f6bde"),
        },
        (
            Difference(
                *("gen_disc_minus_control", "decisive", "control", "gen-disc"),
                label="gen-disc after decisive CMA minus after as many further SFT steps",
                at_least=0.3,
            ),
            Difference(
                *("disc_gen_minus_control", "decisive", "control", "disc-gen"),
                label="disc-gen after decisive CMA minus after as many further SFT steps",
                at_least=0.3,
            ),
            Difference(
                *("disc_minus_control", "decisive", "control", "disc-disc"),
                label="disc-disc after decisive CMA minus after as many further SFT steps",
                at_least=-0.02,
            ),
            Difference(
                *("own_minus_empty", "decisive", "decisive", "gen-gen"),
                label="gen-gen with the own rewrite minus with an empty one, after decisive CMA",
                other_pair="trace/empty",
                at_least=0.5,
            ),
            Difference(
                *("empty_of_plain", "plain", "decisive", "trace/empty"),
                label="gen-gen with an empty rewrite after plain CMA minus after decisive CMA",
                at_least=0.0,
            ),
            Difference(
                *("decisive_minus_plain", "decisive", "plain", MEAN),
                label="mean of the four modes after decisive CMA minus after plain CMA",
                at_least=-0.02,
            ),
            Difference(
                *("disc_minus_before", "decisive", "before", "disc-disc"),
                label="disc-disc after decisive CMA minus before",
            ),
            Difference(
                *("gen_minus_disc", "decisive", "decisive", "gen-gen"),
                label="gen-gen minus disc-disc, both after decisive CMA",
                other_pair="disc-disc",
            ),
        ),
    ),
    "refine_rl": Comparison(
        "refined",
        "Reinforcement learning improves the rewrite, on pairs that nobody annotated.",
        {
            "before": ("CMA (before)", "#b8c2cf"),
            "further_steps": ("further CMA, equal steps", "#8a96a3"),
            "further_seconds": ("further CMA, equal seconds", "#5b6670"),
            "shuffled": ("RL, shuffled rewards", "#c9a227"),
            "ancestor": ("RL, the ancestor's reward", "#e08a00"),
            "rollout_anchors": ("RL, anchors: rollouts of the batch", "#8e6fc9"),
            "batch_anchors": ("RL, anchors: disc of the batch", "#6fa8e0"),
            "refined": ("Refine-RL", "#2f6bde"),
        },
        (
            Difference(
                *("gen_minus_before", "refined", "before", "gen-gen"),
                label="gen-gen after Refine-RL minus before",
                at_least=0.0,
            ),
            Difference(
                *("new_words", "refined", "refined", "crossed/new-old"),
                label="new rewrites minus old ones, both read by the old embedder",
                other_pair="crossed/old-old",
                at_least=0.0,
            ),
            Difference(
                *("gen_minus_steps", "refined", "further_steps", "gen-gen"),
                label="gen-gen after Refine-RL minus after as many steps of further CMA",
                at_least=0.0,
            ),
            Difference(
                *("gen_minus_seconds", "refined", "further_seconds", "gen-gen"),
                label="gen-gen after Refine-RL minus after as many seconds of further CMA",
                at_least=0.0,
            ),
            Difference(
                *("gen_minus_shuffled", "refined", "shuffled", "gen-gen"),
                label="gen-gen after Refine-RL minus with shuffled rewards",
                at_least=0.0,
            ),
            Difference(
                *("disc_minus_rollout_anchors", "batch_anchors", "rollout_anchors", "gen-gen"),
                label="gen-gen after RL with anchors of the batch: its discriminative minus its rollouts",
            ),
            Difference(
                *("table_minus_batch", "refined", "batch_anchors", "gen-gen"),
                label="gen-gen after Refine-RL minus with anchors of the batch alone",
            ),
            Difference(
                *("gen_minus_ancestor", "refined", "ancestor", "gen-gen"),
                label="gen-gen after Refine-RL minus with the ancestor's reward",
            ),
            Difference(
                *("disc_minus_before", "refined", "before", "disc-disc"),
                label="disc-disc after Refine-RL minus before",
                at_least=-0.02,
            ),
        ),
    ),
}


def comparison_markdown(result: Mapping[str, Any], differences: bool = True) -> str:
    """Markdown tables: means over the seeds with the lowest and highest seed, and the paired differences."""
    shown, runs = COMPARISONS[result["stage"]], result["runs"]
    subject = shown.subject
    gallery, chance = runs[0][subject]["gallery"], runs[0][subject]["chance"]
    seeds = ", ".join(str(run[subject]["seed"]) for run in runs)
    several = " In brackets lowest and highest seed; s/step: the least disturbed." if len(runs) > 1 else ""
    lines = [
        f"recall@1 on the test split, mean over the headline tasks; gallery {gallery}, chance {chance:.4f}; "
        f"seeds {seeds}.{several}",
        "",
    ]
    columns = {pair: ("recall@1", pair) for pair in MODE_PAIRS}
    columns |= {f"trace {name}": ("trace", name) for name in REWRITE_ABLATION}
    if all("slot_f1" in v["rewrite"] for run in runs for v in run.values()) and result["stage"] != "sft":
        columns["slot F1"] = ("rewrite", "slot_f1")  # beside SFT each is measured against what it was taught
    head = ["run", "steps", "s/step", *columns, "tokens"]
    rows = []
    # times of one machine's settings alone: those of most seeds
    threads = mode(run[subject].get("threads") for run in runs)
    for name, (label, _) in shown.variants.items():
        of_seeds = [run[name] for run in runs if name in run]
        if not of_seeds:
            continue
        timed = [
            v["seconds_per_step"] for v in of_seeds if v["seconds_per_step"] and v.get("threads") == threads
        ]
        steps = sorted({v["steps"] for v in of_seeds})
        cells = [label, "-".join(map(str, steps)), f"{min(timed):.2f}" if timed else "-"]
        cells += [_spread([v[group][name] for v in of_seeds]) for group, name in columns.values()]
        rows.append([*cells, f"{mean(written_tokens(name, v) for v in of_seeds):.1f}"])
    lines += [*_table(head, rows), ""]
    if differences:
        lines += differences_table(result)
    if runs[0][subject]["crossed"]:
        lines += ["", *_crossed_table([run[subject]["crossed"] for run in runs])]
    if runs[0][subject]["curves"]:
        lines += ["", *_curves_table(shown, runs)]
    lines += ["", f"recall@1 of each task, {shown.variants[subject][0]}:", ""]
    tasks = sorted(runs[0][subject]["per_task"])
    lines += _table(
        ["task", *MODE_PAIRS],
        [
            [task, *(_spread([run[subject]["per_task"][task][pair] for run in runs]) for pair in MODE_PAIRS)]
            for task in tasks
        ],
    )
    return "\n".join(lines) + "\n"


def differences_table(result: Mapping[str, Any]) -> list[str]:
    """Every paired difference, what the claim needs of it, and whether that was found."""
    rows = []
    for d in COMPARISONS[result["stage"]].differences:
        if found := result["differences"].get(d.name):
            seeds = ", ".join(f"{value:+.3f}" for value in found["seeds"])
            interval = f"{found['lower']:+.3f} to {found['upper']:+.3f}"
            needed = "-" if d.at_least is None else f"{d.at_least:+.2f}"
            rows.append([d.label, f"{found['mean']:+.3f}", interval, seeds, needed, verdict(d, found)])
    head = [
        "difference of recall@1, queries paired",
        "mean",
        "95 % bootstrap",
        "each seed",
        "needed",
        "verdict",
    ]
    return _table(head, rows)


def verdict(difference: Difference, found: Mapping[str, Any]) -> str:
    """Where the interval of a difference, and each seed, lie beside what its claim needs.

    Equal runs are no gain: a bar of 0 wants more than 0.

    >>> need = Difference("name", "a", "b", "gen-gen", "label", at_least=0.0)
    >>> bounds = ((0.1, 0.2), (-0.1, 0.1), (-0.2, -0.1), (0.0, 0.0))
    >>> [verdict(need, {"lower": low, "upper": high, "seeds": [high]}) for low, high in bounds]
    ['holds', 'not shown', 'does not hold', 'not shown']
    >>> verdict(need, {"lower": 0.1, "upper": 0.2, "seeds": [0.4, -0.1]})
    'not shown'
    """
    if difference.at_least is None:
        return "-"
    if min(found["lower"], *found["seeds"]) > difference.at_least:
        return "holds"
    return "does not hold" if found["upper"] < difference.at_least else "not shown"


def written_tokens(variant: str, numbers: Mapping[str, Any]) -> float:
    """Generated tokens of an item; none where the generative mode was not trained."""
    return 0.0 if variant == "disc_only" else float(numbers["rewrite"]["mean_length"])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _crossed_table(crossed: Sequence[Mapping[str, float]]) -> list[str]:
    """gen-gen recall@1 by who writes and who embeds."""
    rows = [
        [
            f"{writer} rewrites",
            *(_spread([c[f"{writer}-{embedder}"] for c in crossed]) for embedder in ("old", "new")),
        ]
        for writer in ("old", "new")
    ]
    return _table(["gen-gen recall@1", "old embedder", "new embedder"], rows)


def _curves_table(shown: Comparison, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Means over the run of what Refine-RL logs."""
    rows = []
    for name, (label, _) in shown.variants.items():
        of_seeds = [run[name]["curves"] for run in runs if run.get(name, {}).get("curves", {}).get("kl")]
        if of_seeds:
            rows.append([label, *(f"{mean(c[field] for c in of_seeds):.3f}" for field in of_seeds[0])])
            fields = list(of_seeds[0])
    return _table(["mean over the logged steps", *fields], rows) if rows else []


def _spread(values: Sequence[float]) -> str:
    text = f"{mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.2f}-{max(values):.2f})"


def comparison_figure(result: Mapping[str, Any]) -> Figure:
    """Bars of the four modes and of the trace probe for each variant; dots are the seeds."""
    variants = {
        name: look
        for name, look in COMPARISONS[result["stage"]].variants.items()
        if all(name in run for run in result["runs"])
    }
    against_length = result["stage"] == "sft"
    width = 14 + 1.5 * max(0, len(variants) - 4) + (6 if against_length else 0)
    figure = Figure(figsize=(width, 5), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    modes, probe, *more = figure.subplots(1, 3 if against_length else 2, sharey=True)
    for axes, field, names, title in (
        (modes, "recall@1", MODE_PAIRS, "recall@1: query mode - target mode"),
        (probe, "trace", REWRITE_ABLATION, "gen-gen recall@1 by the query's rewrite"),
    ):
        width = 0.8 / len(variants)
        for place, (variant, (label, colour)) in enumerate(variants.items()):
            xs = [i + (place - (len(variants) - 1) / 2) * width for i in range(len(names))]
            values = [[run[variant][field][name] for run in result["runs"]] for name in names]
            axes.bar(xs, [mean(v) for v in values], width * 0.92, color=colour, label=label, zorder=2)
            for x, dots in zip(xs, values, strict=True):
                axes.plot([x] * len(dots), dots, ".", color="#1f2933", markersize=4, zorder=3)
                look = {"ha": "center", "fontsize": 7.5, "rotation": 90 if len(variants) > 5 else 0}
                axes.text(x, max(dots) + 0.022, f"{mean(dots):.2f}", **look)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylim(0, 1.12)
        axes.set_title(title, fontsize=11, loc="left")
        axes.grid(axis="y", color="#e4e8ee", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    modes.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
    for axes in more:
        _recall_against_length(axes, result["runs"], variants)
    figure.tight_layout()
    return figure


def _recall_against_length(
    axes: Any, runs: Sequence[Mapping[str, Any]], variants: Mapping[str, tuple[str, str]]
) -> None:
    """A dot a seed: what a variant writes on the way to its embedding, and what it finds."""
    for name, (label, colour) in variants.items():
        alone = name == "disc_only"  # writes nothing
        xs = [written_tokens(name, run[name]) for run in runs]
        ys = [run[name]["recall@1"]["disc-disc" if alone else "gen-gen"] for run in runs]
        axes.scatter(xs, ys, color=colour, label=label, s=45, zorder=3)
    axes.set_title("recall@1 against generated tokens", fontsize=11, loc="left")
    axes.set_xlabel("tokens a query and target write, on average")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.grid(color="#e4e8ee", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
