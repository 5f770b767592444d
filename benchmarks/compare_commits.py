"""Compare the training step of this working tree with that of another commit: time, loss and gradients.

    python -m benchmarks.compare_commits 2f5904f
    python -m benchmarks.compare_commits 1622ef6 --against 2bc7295

Each commit is checked out into a temporary worktree. Both sides run the same SFT step, with gradient
checkpointing and 4-bit weights, on the miniature Qwen2-VL (miniature.py). Each has a process of its own with
one thread, and they take turns, step by step. The last line is JSON: the median ratio of CPU seconds (time of
this tree over time of the commit), the largest relative difference of a gradient, and the seconds of the
vision tower's forward and of the gradient through it on both sides.

The processes import only what the commits have in common: the backbone, the processor and the SFT stage.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
MICRO_BATCH_TOKENS = 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="The commit to compare with, or internal: the folder to serve")
    parser.add_argument("--against", metavar="COMMIT", help="A second commit (default: this working tree)")
    parser.add_argument("--pairs", type=int, default=32, help="Pairs in a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="Measured rounds (default: %(default)s)")
    parser.add_argument("--lora_dropout", type=float, default=0.0, help="(default: %(default)s)")
    parser.add_argument("--whole", action="store_true", help="One forward per side, without micro-batches")
    parser.add_argument("--serve", action="store_true", help="internal: run steps on demand")
    args = parser.parse_args()
    if args.serve:
        serve(Path(args.commit), args.lora_dropout, args.whole)
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rime-commits-")))
        write_inputs(folder, args.pairs)
        trees = [stack.enter_context(worktree(args.commit))]
        trees.append(stack.enter_context(worktree(args.against)) if args.against else ROOT)
        options = ["--lora_dropout", str(args.lora_dropout), *(["--whole"] if args.whole else [])]
        sides = [stack.enter_context(Side(tree, folder, options)) for tree in trees]
        print(json.dumps(compare(sides, args.rounds)))


def write_inputs(folder: Path, pairs: int) -> None:
    """Write the checkpoint and the pairs that both sides read."""
    from benchmarks.miniature import make_proportioned, mixed_pairs  # not of the other commit

    make_proportioned(folder / "base")
    packed = [[pair.key, packed_item(pair.query), packed_item(pair.target)] for pair in mixed_pairs(pairs)]
    (folder / "pairs.json").write_text(json.dumps(packed))


def packed_item(item: Any) -> dict[str, Any]:
    """Return an item as JSON that both trees read: their types may differ."""
    files = []
    for image in item.media:
        image.save(buffer := io.BytesIO(), "PNG")
        files.append(base64.b64encode(buffer.getvalue()).decode())
    words = {name: getattr(item, name) for name in ("text", "content_id", "instruction", "rewrite")}
    return words | {"images": files}


def read_pairs(file: Path) -> list[Any]:
    """Return the pairs of a file, of the types of this tree."""
    from PIL import Image

    from rime_pl.types import Item, Pair

    def item(packed: dict[str, Any]) -> Item:
        files = [io.BytesIO(base64.b64decode(one)) for one in packed.pop("images")]
        made: Any = Item
        field = "media" if "media" in Item.__dataclass_fields__ else "images"  # of an older commit
        return made(**packed, **{field: tuple(Image.open(one).convert("RGB") for one in files)})

    found = json.loads(file.read_text())
    return [Pair(key, "mixed", "all", item(query), item(target)) for key, query, target in found]


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """Check a commit out into a temporary folder."""
    git = ["git", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory(prefix="rime-worktree-") as folder:
        tree = Path(folder) / "tree"
        done = subprocess.run([*git, "add", "--detach", str(tree), commit], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{commit!r} must be a commit of this repository. {done.stderr.strip()}")
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


class Side:
    """A process that imports the package of one tree and runs steps on demand.

    Args:
        tree: Folder of the source tree.
        inputs: Folder with the checkpoint and the pairs.
        options: Words for the process.
    """

    def __init__(self, tree: Path, inputs: Path, options: list[str]) -> None:
        env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        words = [sys.executable, str(Path(__file__).resolve()), str(inputs), "--serve", *options]
        self.process = subprocess.Popen(
            words, env=env, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        where = self.ask("where")
        if where != str(tree / "rime_pl"):
            raise SystemExit(f"The package must be that of {tree}, but is {where}.")

    def ask(self, work: str) -> Any:
        """Send one line and return the answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(work + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                return json.loads(line.removeprefix("answer "))
        raise SystemExit("A process ended before its answer; its error is above.")

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # the end of its input ends it


def compare(sides: list[Side], rounds: int) -> dict[str, Any]:
    """Let both sides take turns and return the ratios."""
    seen: list[list[dict[str, float]]] = []
    for number in range(rounds + 1):
        answers = [side.ask("step") for side in sides]
        for side, answer in zip(sides, answers, strict=True):
            answer["without"] = side.ask("step without gradient through the tower")["seconds"]
        if number:  # the first round only warms up
            seen.append(answers)
    ratios = [new["seconds"] / old["seconds"] for old, new in seen]
    for name, number in (("commit", 0), ("this tree", 1)):
        seconds = ", ".join(f"{answers[number]['seconds']:.3f}" for answers in seen)
        print(f"{name}: loss {seen[-1][number]['loss']:.9g}, CPU seconds {seconds}")
    print(f"ratios from {min(ratios):.3f} to {max(ratios):.3f}")
    with tempfile.TemporaryDirectory(prefix="rime-gradients-") as folder:
        files = [Path(folder) / str(number) for number in range(2)]
        for side, file in zip(sides, files, strict=True):
            side.ask(f"gradients {file}")
        old, new = (torch.load(file, weights_only=True) for file in files)
    difference = largest_difference(old, new)
    equal = difference == 0 and seen[-1][0]["loss"] == seen[-1][1]["loss"]
    print("losses and gradients are equal bit by bit" if equal else "losses or gradients differ")
    return {
        "ratio": round(statistics.median(ratios), 3),
        "bit_equal": equal,
        "largest_relative_difference": difference,
        "tower_seconds": [
            {
                "forward": round(statistics.median(a[number]["tower"] for a in seen), 3),
                "gradient": round(
                    statistics.median(a[number]["seconds"] - a[number]["without"] for a in seen), 3
                ),
            }
            for number in range(2)
        ],
    }


def largest_difference(old: dict[str, torch.Tensor], new: dict[str, torch.Tensor]) -> float:
    """Return the largest L2 distance of two gradients of a parameter over the norm of the first."""
    if old.keys() != new.keys():
        raise SystemExit(f"Both must train the same, but one has only {sorted(old.keys() ^ new.keys())[:3]}.")
    shares = [float((new[name] - one).norm() / one.norm()) for name, one in old.items() if one.any()]
    silent = [float(new[name].norm()) for name, one in old.items() if not one.any()]
    return max([*shares, *silent])


# -- in the process of one side ---------------------------------------------------------------------------


def serve(folder: Path, lora_dropout: float, whole: bool) -> None:
    """Answer each line of the standard input: where, step, step without ..., gradients FILE."""
    import rime_pl

    torch.set_num_threads(1)
    module, batch, tower = make_step(folder, lora_dropout, whole)
    for line in sys.stdin:
        work, _, rest = line.strip().partition(" ")
        answer: Any = str(Path(rime_pl.__file__).parent)
        if work == "step":
            answer = run_step(module, batch, tower, gradient=not rest)
        elif work == "gradients":
            run_step(module, batch, tower, gradient=True)
            trained = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            torch.save(trained, rest)
        print("answer " + json.dumps(answer), flush=True)


class Tower:
    """Times the forward of the vision tower and can keep gradients out of it."""

    def __init__(self, model: Any) -> None:
        self.seconds, self.gradient, self.forward = 0.0, True, model.forward
        model.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        with torch.set_grad_enabled(self.gradient and torch.is_grad_enabled()):
            out = self.forward(*args, **kwargs)
        self.seconds += time.process_time() - start
        return out


def make_step(folder: Path, lora_dropout: float, whole: bool) -> tuple[Any, Any, Tower]:
    """Return the SFT stage, a batch and the vision tower."""
    from rime_pl.backbone.config import BackboneConfig
    from rime_pl.backbone.mllm import Backbone
    from rime_pl.modules.settings import MicroBatchSettings
    from rime_pl.modules.sft import SFTModule
    from rime_pl.processing import RimeProcessor
    from rime_pl.prompts import PromptConfig

    prompt = PromptConfig(rewrite_instruction="Rewrite.", max_rewrite_tokens=400)
    base = str(folder / "base")
    config = BackboneConfig(
        base,
        load_in_4bit=True,
        dtype="float32",
        lora_r=2,
        lora_alpha=4,
        lora_dropout=lora_dropout,
        gradient_checkpointing=True,
        prompt=prompt,
    )
    torch.manual_seed(0)
    backbone = Backbone(config, RimeProcessor.from_pretrained(base, prompt))
    for name, parameter in backbone.named_parameters():
        if parameter.requires_grad and "lora_B" in name:  # at 0 they would leave lora_A without a gradient
            torch.nn.init.normal_(parameter, std=0.02)
    tokens = None if whole else MICRO_BATCH_TOKENS
    micro_batches = MicroBatchSettings(tokens=tokens, gradient_cache=whole)
    module: Any = SFTModule(config, micro_batches=micro_batches)
    module.backbone = backbone
    module.log = module.log_dict = lambda *_, **__: None
    batch = backbone.processor.training_batch(read_pairs(folder / "pairs.json"))
    return module, batch, Tower(backbone.language_model.model.visual)


def run_step(module: Any, batch: Any, tower: Tower, gradient: bool) -> dict[str, float]:
    """Run one step and return its CPU seconds, those of the tower's forward, and the loss."""
    module.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    tower.seconds, tower.gradient = 0.0, gradient
    start = time.process_time()
    loss = module.training_step(batch, 0)
    module.backward(loss)
    return {"seconds": time.process_time() - start, "tower": tower.seconds, "loss": float(loss.detach())}


if __name__ == "__main__":
    main()
