"""Mutated settings files: parsed as the command line parses them, up to the first trained batch."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from rime_pl.commands.settings import complete_settings
from tests.torture.damage import BYTES, byte_changes, json_changes
from tests.torture.sources import Sources, first_step
from tests.torture.watched import MARKER, Case, Reading, digest

FILE = "sft.yaml"
#: Settings without a meaning; each must be refused.
REFUSED: dict[str, tuple[Any, ...]] = {
    "model.temperature": (float("nan"), float("inf"), 0, -1, "warm", None, [1]),
    "model.lambda_ce": (float("nan"), float("inf"), "much"),
    "model.optimizer.learning_rate": (float("nan"), float("inf"), -1e-3, "fast"),
    "model.optimizer.weight_decay": (float("nan"), -1),
    "model.optimizer.warmup_steps": (-5, 1.5),
    "model.backbone.lora_r": (0, -1, 1 << 40, 2.5),
    "model.backbone.lora_alpha": (0, -3),
    "model.backbone.lora_dropout": (float("nan"), -1, 2, 1),
    "model.backbone.lora_targets": ("(", "", ".*", "x" * 5000),
    "model.backbone.dtype": ("float99", "int8", 32),
    "model.backbone.attn_implementation": ("quick", ""),
    "model.backbone.name_or_path": ("", "../nowhere", "\0", "/dev/null"),
    "model.backbone.prompt.max_rewrite_tokens": (0, -1),
    "model.backbone.prompt.max_text_tokens": (0, -1),
    "model.backbone.prompt.max_pixels": (0, -1, 1),
    "model.backbone.prompt.min_pixels": (0, 1 << 60),
    "model.backbone.prompt.gen_token": ("", "<disc_emb>", "<|im_end|>", "the"),
    "model.backbone.prompt.disc_token": ("", "<|image_pad|>"),
    "model.backbone.prompt.rewrite_instruction": ("<|im_end|>", "<gen_emb>"),
    "model.backbone.prompt.system_prompt": ("<|im_start|>", "<disc_emb>"),
    "data.batch_size": (0, -1, 1, 1 << 40),
    "data.eval_batch_size": (0, -1),
    "data.steps_per_epoch": (0, -1),
    "data.num_workers": (-1,),
    "data.limit_val_queries": (-1, 0),
    "data.limit_val_gallery": (-1, "some"),
    "data.test_modes": (["generative"], ["both"], "discriminative"),
    "data.val_modes": ([], ["generative"], ["both"], "discriminative"),
    "data.tasks": ([], ["no such task"], "relative"),
    "data.max_broken_share": (float("nan"), -1, 2),
    "data.annotated_share": (0, float("nan"), 2),
    "data.path": ("", "\0", "../nowhere", "/etc"),
    "checkpoint.every_n_steps": (0, -1),
    "trainer.max_epochs": (-7, "many"),
    "trainer.gradient_clip_val": (float("nan"),),
    "trainer.accumulate_grad_batches": (0, -1),
    "trainer.devices": (0, -3, "two"),
    "trainer.strategy": ("quick", ""),
    "trainer.accelerator": ("abacus", "gpu"),
    "trainer.precision": ("3-true", 7),
    "recall.ks": ([0], [-1], []),
    "recall.chunk_size": (0, -1),
    "num_threads": (-1, 0, 1 << 40),
    "seed_everything": (-1, 1 << 70, "x"),
}


def source(sources: Sources) -> dict[str, Any]:
    """All settings of a short run in one file."""
    words = [*sources.arguments(Path("unused")), "--data.limit_val_queries", "2"]
    values = complete_settings("sft", words[2:])
    del values["run_dir"], values["ckpt_path"]
    return values


def _texts(text: str) -> Iterator[tuple[str, str]]:
    """Changes of the file as text: what YAML can do and settings cannot."""
    marker = f"../{MARKER}"
    for tag in ("python/object/apply:os.system", "python/object/new:os.system", "python/object:os.system"):
        yield f"!!{tag}", f"{text}num_threads: !!{tag} ['touch {marker}']\n"
    yield "!!python/name", f"{text}num_threads: !!python/name:os.system\n"
    yield "!!python/module", f"{text}num_threads: !!python/module:antigravity\n"
    yield "!!binary", f"{text}num_threads: !!binary aGVsbG8=\n"
    yield "!!set", f"{text}num_threads: !!set {{a, b}}\n"
    yield "an unknown tag", f"{text}num_threads: !mine 3\n"
    yield "a date that is none", f"{text}num_threads: 2026-13-45\n"
    yield "an int that is none", f"{text}num_threads: !!int x\n"
    yield "an int of 10,000 digits", f"{text}num_threads: {'9' * 10_000}\n"
    yield "a setting twice", text + "num_threads: 1\n"
    yield "a group twice", text + "model:\n  temperature: 0.5\n"
    yield "a setting twice in a group", text.replace("  lambda_ce:", "  temperature: 0.5\n  lambda_ce:", 1)
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    yield "a list of 9^9 entries by aliases", bomb + text
    yield "a list of 9^9 entries as the value of a setting", text + bomb.replace("a8:", "num_threads:")
    maps = "a0: &a0 {x: 1, y: 1, z: 1}\n"
    maps += "".join(f"a{n}: &a{n} {{x: *a{n - 1}, y: *a{n - 1}, z: *a{n - 1}}}\n" for n in range(1, 16))
    yield "groups of 3^16 settings by aliases", maps + text
    yield "an alias of itself", text + "num_threads: &a [*a]\n"
    yield "a group of itself", text + "extra: &a {b: *a}\n"
    yield "an alias of nothing", text + "num_threads: *nothing\n"
    yield "a merged group", text + "extra: &e {a: 1}\nmodel2:\n  <<: *e\n"
    yield "nested without end", "model: " + "[" * 20_000
    yield "groups nested without end", "".join(f"{' ' * n}a:\n" for n in range(2_000))
    yield "tabs", text.replace("  ", "\t")
    yield "two documents", text + "---\n" + text
    yield "a key that is a number", text + "3: 4\n"
    yield "a key that is null", text + "null: 4\n"
    yield "a key that is a list", text + "? [a, b]\n: 4\n"
    yield "a control character", text + "num_threads: \x07\n"
    yield "only a comment", "# nothing\n"
    yield "a key with dots", text + "model.temperature: 0.5\n"
    yield "an option in the place of a key", text + "--model.temperature: 0.5\n"
    yield (
        "a file of settings in the place of a group",
        text.replace("trainer:\n", "trainer: ../outside.txt\nx:\n"),
    )
    yield "another class", text + "model2:\n  class_path: os.system\n  init_args: {command: touch x}\n"
    yield (
        "a class as a strategy",
        text.replace(
            "  strategy: auto",
            "  strategy:\n    class_path: subprocess.Popen\n    init_args: {args: [touch, ../unpickled]}",
        ),
    )


def changes(values: dict[str, Any], rng: random.Random) -> Iterator[tuple[str, bytes, bool]]:
    """Yield what was changed, the file, and whether it must be refused; without end."""
    text = yaml.safe_dump(values, sort_keys=False)
    for what, changed in _texts(text):
        yield what, changed.encode(errors="surrogatepass"), False
    wrong = [(name, value) for name, values_ in REFUSED.items() for value in values_]
    for name, value in rng.sample(wrong, len(wrong)):
        yield f"{name} is {value!r:.30}", _with(values, name, value), True
    for what, data in islice(byte_changes(text.encode(), rng, BYTES), 12):
        yield what, data, False
    for what, changed in json_changes(values, rng):
        yield what, yaml.safe_dump(changed, sort_keys=False, allow_unicode=False).encode(), False


def _with(values: dict[str, Any], name: str, value: Any) -> bytes:
    *above, last = name.split(".")
    found = yaml.safe_load(yaml.safe_dump(values))
    at = found
    for key in above:
        at = at[key] if isinstance(at.get(key), dict) else at.setdefault(key, {})
    at[last] = value
    return yaml.safe_dump(found, sort_keys=False).encode()


def cases(sources: Sources, count: int, rng: random.Random) -> list[Case]:
    values = source(sources)
    text = yaml.safe_dump(values, sort_keys=False)
    everything = list(islice(changes(values, rng), max(count, 190)))
    chosen = everything[:count] if count >= 190 else rng.sample(everything, count)
    names = tuple({FILE, *names_of(values)})
    return [_case(what, data, must, names, digest(text)) for what, data, must in chosen]


def names_of(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for name, value in values.items():
        yield f"{above}{name}"
        if isinstance(value, dict):
            yield from names_of(value, f"{above}{name}.")


def _case(what: str, data: bytes, must: bool, names: tuple[str, ...], original: str) -> Case:
    def write(folder: Path) -> None:
        (folder / FILE).write_bytes(data)

    def read(folder: Path) -> Reading:
        first_step(["sft", "fit", "--config", str(folder / FILE), "--run_dir", str(folder / "run")])
        return Reading(digest(data.decode(errors="replace")))

    return Case(what, write, read, names, original, must)
