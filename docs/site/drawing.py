"""Draws how the parts of the code depend on each other, and the way of a batch through them, as SVG.

Called by build.py, with what imports.py reads from the source. What the code contradicts stops the build.
python -m docs.site.drawing renews the drawings in docs/explanation, for readers without the site.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

from docs.site.imports import Graph, between_rooms, imports, layers, without_detours

#: Room of the drawing -> the modules and packages in it, and what it does.
ROOMS: dict[str, tuple[str, str]] = {
    "contracts": ("types prompts errors bounds places bars", "what all share"),
    "items": ("media clips page_process visual_inputs processing", "tokens and patches"),
    "losses": ("losses", "losses, rewards"),
    "metrics": ("metrics", "recall, intervals"),
    "training texts": ("training_texts", "words of a training"),
    "options": ("options quiet", "one parser"),
    "run folder": ("run_folder run_lock run_files checkpoints", "what a run leaves"),
    "backbone": ("backbone", "the model, adapters"),
    "datamodules": ("datamodules", "shards in, batches out"),
    "generation": ("generation", "writes rewrites"),
    "scaling": ("scaling", "one large batch"),
    "report": ("report", "tables, pictures"),
    "pipeline": ("pipeline corpus_places", "what a stage needs"),
    "modules": ("modules", "the three stages"),
    "callbacks": ("callbacks", "watch a training"),
    "inference": ("inference", "a model in use"),
    "miniature": ("miniature", "makes small models"),
    "teacher": ("teacher", "asks for rewrites"),
    "study": ("study", "controls, claims"),
    "evaluation": ("evaluation", "public benchmarks"),
    "export": ("export", "for other libraries"),
    "demo": ("demo", "the search page"),
    "settings": ("run_settings", "of a run to come"),
    "preflight": ("preflight", "plan, doctor"),
    "command line": ("cli commands __main__", "ties all together"),
}
METHOD = {
    "contracts",
    "items",
    "losses",
    "metrics",
    "backbone",
    "generation",
    "scaling",
    "datamodules",
    "modules",
    "callbacks",
}
#: The way of a batch: module, what comes out of it, and the import that carries it on: (importer, imported).
WAY: list[tuple[str, str, tuple[str, str]]] = [
    (
        "datamodules.shards",
        "a sample of a shard (.tar) -> Pair: two items and their rewrites",
        ("datamodules.loading", "datamodules.shards"),
    ),
    (
        "processing",
        "Pairs -> Batch: tokens, patches, labels of both sides",
        ("datamodules.loading", "processing"),
    ),
    (
        "datamodules.datamodule",
        "the order of the batches, one task in each",
        ("cli", "datamodules.datamodule"),
    ),
    (
        "modules.contrastive",
        "training_step of SFT and CMA: the loss, written out",
        ("modules.cma", "modules.contrastive"),
    ),
    (
        "backbone.mllm",
        "one forward -> log-probabilities of the labels, d and g",
        ("modules.contrastive", "backbone.mllm"),
    ),
    (
        "scaling.gradient_cache",
        "micro-batches: the same gradients in less memory",
        ("modules.contrastive", "scaling.gradient_cache"),
    ),
    ("scaling.gather", "d and g of all processes", ("modules.contrastive", "scaling.gather")),
    ("losses.contrastive", "InfoNCE of gen-gen and disc-disc", ("modules.contrastive", "losses.contrastive")),
    ("losses.alignment", "CMA: across the modes, and the decisive term", ("modules.cma", "losses.alignment")),
    (
        "losses.language_modeling",
        "cross-entropy of the rewrites",
        ("modules.contrastive", "losses.language_modeling"),
    ),
    (
        "callbacks.retrieval_recall",
        "after an epoch: writes rewrites, embeds, ranks",
        ("cli", "callbacks.retrieval_recall"),
    ),
    (
        "metrics.retrieval",
        "ranks -> recall@k of each mode pair",
        ("callbacks.retrieval_recall", "metrics.retrieval"),
    ),
    (
        "callbacks.adapter_checkpoint",
        "adapter and state to resume from",
        ("cli", "callbacks.adapter_checkpoint"),
    ),
    (
        "inference.retriever",
        "the adapter in use: encode, search",
        ("inference.loading", "inference.retriever"),
    ),
    ("export.exporting", "for other libraries", ("export.exporting", "inference.retriever")),
]
INK, SOFT, LINE = "#1f2933", "#52606d", "#9aa5b1"
COLOURS = {True: "#e3f0ff", False: "#f3f4f6"}
WIDTH = 1000
BOX, HEIGHT, ROW = 146, 52, 116
#: The room that imports all others: it is drawn as a roof, without lines.
ROOF = "command line"
#: Lines of one room have one colour, so that the eye can follow them.
LINES = ("#2f6bde", "#c2410c", "#15803d", "#7e22ce", "#0e7490", "#a16207", "#be185d", "#475569")


def rooms() -> Graph:
    """Return who imports whom among ROOMS.

    Raises:
        ValueError: If a module of ours has no room.
    """
    named = {f"rime_pl.{part}": room for room, (parts, _) in ROOMS.items() for part in parts.split()}
    graph = imports()
    for name in graph:
        if name != "rime_pl" and not any(name == one or name.startswith(f"{one}.") for one in named):
            raise ValueError(f"{name} has no room in docs/site/drawing.py. Add it to ROOMS.")
    found = between_rooms(graph, named)
    return {room: found.get(room, set()) for room in ROOMS}


def way() -> list[tuple[str, str]]:
    """Return the modules of WAY with what comes out of each.

    Raises:
        ValueError: If the code has no such import.
    """
    graph = imports()
    for _, _, (importer, imported) in WAY:
        if f"rime_pl.{imported}" not in graph[f"rime_pl.{importer}"]:
            raise ValueError(
                f"rime_pl.{importer} does not import rime_pl.{imported}: correct WAY in docs/site/drawing.py."
            )
    return [(module, what) for module, what, _ in WAY]


def architecture() -> str:
    """Return the drawing of the rooms: each imports those below that its lines lead to."""
    graph = without_detours(rooms())
    del graph[ROOF]
    rows = placed(graph)
    depth = max(row for _, row in rows.values()) + 1
    corner = {room: (x, 10 + (depth - row) * ROW) for room, (x, row) in rows.items()}
    parts = []
    for number, (room, ones) in enumerate(graph.items()):
        for one in sorted(ones):
            (x, y), (to_x, to_y) = corner[room], corner[one]
            across, down = to_x - x, to_y - y - HEIGHT
            start, half = f"M{x + BOX / 2:.0f},{y + HEIGHT:.0f}", f"{down / 2:.0f}"
            way = f"{start} c0,{half} {across:.0f},{half} {across:.0f},{down:.0f}"
            colour = LINES[number % len(LINES)]
            parts.append(f'<path d="{way}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
    for room, (x, y) in corner.items():
        parts += _box(x, y, BOX, room, ROOMS[room][1], room in METHOD)
    parts += _box(
        10,
        10,
        WIDTH - 20,
        ROOF,
        "stands above all parts, and ties the stages, the data and the callbacks together",
        False,
    )
    return _svg(WIDTH, (depth + 1) * ROW, parts, "The parts of rime_pl, and which of them imports which")


def placed(graph: Graph) -> dict[str, tuple[float, int]]:
    """Return the left edge and the row of each room; row 0 imports nothing."""
    row_of = layers(graph)
    found: dict[str, tuple[float, int]] = {}
    for row in range(max(row_of.values()) + 1):
        here = [room for room in graph if row_of[room] == row]

        def below(room: str) -> float:
            places = [found[one][0] for one in graph[room]]
            return sum(places) / len(places) if places else WIDTH / 2

        gap = (WIDTH - 20) / len(here)
        for place, room in enumerate(sorted(here, key=below)):
            found[room] = (10 + place * gap + (gap - BOX) / 2, row)
    return found


def batch_way() -> str:
    """Return the drawing of the way of a batch, from top to bottom."""
    parts, step, left, wide = [], 62, 10, 560
    steps = way()
    for number, (module, what) in enumerate(steps):
        y = 10 + number * step
        parts += _box(
            left, y, wide, f"rime_pl.{module}", what, module.split(".")[0] in METHOD | {"processing"}
        )
        if number + 1 < len(steps):
            x = left + wide / 2
            parts.append(f'<path d="M{x:.0f},{y + 46} v{step - 46}" stroke="{LINE}" stroke-width="2"/>')
    return _svg(wide + 20, 10 + len(steps) * step, parts, "The way of a batch, from a shard to a search")


def _box(x: float, y: float, width: float, title: str, text: str, method: bool) -> list[str]:
    middle, height = x + width / 2, 46 if width > BOX else HEIGHT
    frame = f'x="{x:.0f}" y="{y:.0f}" width="{width}" height="{height}" rx="8"'
    centred = f'x="{middle:.0f}" text-anchor="middle"'
    large = f'font-size="15" font-weight="600" fill="{INK}"'
    return [
        f'<rect {frame} fill="{COLOURS[method]}" stroke="{LINE}"/>',
        f'<text {centred} y="{y + 20:.0f}" {large}>{escape(title)}</text>',
        f'<text {centred} y="{y + 38:.0f}" font-size="12.5" fill="{SOFT}">{escape(text)}</text>',
    ]


def _svg(width: float, height: float, parts: list[str], title: str) -> str:
    style = "font-family:system-ui,'DejaVu Sans',sans-serif"
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{style}" role="img">'
    paper = f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>'
    return "\n".join([head, f"<title>{escape(title)}</title>", paper, *parts, "</svg>", ""])


def main(folder: Path = Path(__file__).parents[1] / "explanation") -> None:
    """Write both drawings."""
    (folder / "architecture.svg").write_text(architecture())
    (folder / "batch-way.svg").write_text(batch_way())


if __name__ == "__main__":
    main()
