"""Time of an RL step against TRL's GRPOTrainer, and of its sampling against a plain loop.

`python benchmarks/rl_step.py --base models/tiny-scenes --data data/scenes`, after `make base DATA=scenes`.

The two take their steps in turn, in CPU time of one thread. Both have the same base model in NF4, LoRA of
the same rank on the same layers without dropout, the same queries with pictures, G = 8 rewrites of exactly
32 new tokens, a KL penalty against the frozen start, and AdamW. A step is all from raw items to the update:
tokenising, sampling, the forward of the reference, rewards, and forward and backward of the policy. The
reward of TRL is a constant function. Ours does more: it embeds, compares with anchors, and also trains the
two token rows. All other settings of TRL are its defaults.

Sampling is measured after a short SFT, so that rewrites have the lengths that the model has learned. The
plain loop has the layers of PEFT, which copy the table for each token, and the cache and the mask of
transformers. It writes one side after the other, and decodes rows that have ended until the last one ends.
Both must give the same rewrites, token by token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor
from transformers import AutoModelForImageTextToText, DynamicCache, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rime_pl.backbone.adapters import trained_values
from rime_pl.backbone.config import LANGUAGE_LINEARS, BackboneConfig
from rime_pl.backbone.lora import merged
from rime_pl.backbone.mllm import Backbone
from rime_pl.backbone.quantization import linear_4bit_modules, quantization_config
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.generation.decoding import prefill, suppressed_tokens
from rime_pl.generation.rewriting import finish_rewrites
from rime_pl.generation.rollouts import PromptPart, distribution, sample_rollouts, sample_tokens
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.modules.settings import OptimizerSettings, RolloutSettings
from rime_pl.modules.sft import SFTModule
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.types import Batch, Pair, Rollouts

NUM_GENERATIONS, NEW_TOKENS, RANK = 8, 32, 16
#: Writes a conversation in our layout, so that both read the same tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def base_config(base: Path) -> BackboneConfig:
    return BackboneConfig(str(base), dtype="float32", lora_r=RANK, prompt=PromptConfig())


def read_pairs(data: Path, count: int) -> list[Pair]:
    """Return training pairs whose query holds one picture, all marked as one task."""
    reader, pairs = ShardReader(read_split(data, "train")), []
    for number in range(len(reader)):
        pair = reader.read(number)
        if pair.query and len(pair.query.media) == 1:
            pairs.append(replace(pair, dataset="one"))
        if len(pairs) == count:
            return pairs
    raise SystemExit(f"{data} must hold {count} training queries with one picture, but has {len(pairs)}.")


class Ours:
    """Refine-RL without a trainer, on raw pairs."""

    def __init__(self, backbone: Backbone, pairs: list[Pair], items: int) -> None:
        self.processor, self.pairs, self.items, self.position = backbone.processor, pairs, items, 0
        self.seed = 0
        self.logged: dict[str, float] = {}
        rollouts = RolloutSettings(NUM_GENERATIONS, max_new_tokens=NEW_TOKENS - 1, sides="query")
        self.module = RefineRLModule(backbone.config, rollouts=rollouts, optimizer=OptimizerSettings(3e-5, 0))
        without_trainer(self.module, backbone, self.logged)
        self.module.reference = trained_values(backbone)
        self.module.prepare(self)

    def anchor_batches(self, num_anchors: int) -> list[Batch]:
        return [self.processor.training_batch(self.pairs)]

    def sample_batches(self, num_samples: int) -> list[Batch]:
        return []

    def step(self) -> None:
        """Tokenise and take a step; every rewrite has NEW_TOKENS tokens, the last of them <gen_emb>."""
        start = self.position * self.items
        pairs = [self.pairs[(start + n) % len(self.pairs)] for n in range(self.items)]
        self.module.training_step(self.processor.training_batch(pairs, self.position), self.position)
        self.position += 1
        assert self.logged["train/rewrite_length"] == NEW_TOKENS - 1, "the last token is <gen_emb>"


def without_trainer(module: Any, backbone: Backbone, logged: dict[str, float]) -> None:
    """Give a stage its backbone and what it asks of Lightning's trainer."""
    module.backbone = backbone
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=3e-5)
    module.optimizers = lambda: optimizer
    module.lr_schedulers = lambda: SimpleNamespace(step=lambda: None)
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    module.backward_part = lambda loss, last: loss.backward()


def never_stop(backbone: Backbone) -> Any:
    """Exactly NEW_TOKENS tokens, like min_new_tokens in TRL."""
    stops = torch.tensor([backbone.processor.gen_id, backbone.processor.turn_end_id])
    return backbone.language_model.lm_head.register_forward_hook(
        lambda module, args, logits: logits.index_fill(-1, stops, -1e4)
    )


class InTurn(TrainerCallback):
    """Measures each step of a Hugging Face trainer, with the update, and after it one of ours."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step
        self.theirs: list[float] = []
        self.mine: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.theirs.append(time.process_time() - self.start)
        self.mine.append(seconds(self.step)[0])


def seconds(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Return the CPU time of a call, and its result."""
    start = time.process_time()
    result = function(*args)
    return time.process_time() - start, result


def peer_rows(pairs: list[Pair], prompt: PromptConfig) -> Dataset:
    rows = []
    for pair in pairs:
        assert pair.query is not None
        words = "\n".join(part for part in (pair.query.instruction, pair.query.text) if part)
        text = f"{words}\n{prompt.disc_token}\n{prompt.rewrite_instruction}"
        content = [{"type": "image"}, {"type": "text", "text": text}]
        rows.append({"prompt": [{"role": "user", "content": content}], "images": list(pair.query.media)})
    return Dataset.from_list(rows)


def step_times(base: Path, pairs: list[Pair], items: int, steps: int) -> tuple[list[float], list[float]]:
    """Return the seconds of each step of TRL, and of each of ours."""
    config = base_config(base)
    processor = RimeProcessor.from_pretrained(str(base), config.prompt)
    backbone = Backbone(config, RimeProcessor.from_pretrained(str(base), config.prompt))
    never_stop(backbone)
    timer = InTurn(Ours(backbone, pairs, items).step)
    processor.processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
    model: Any = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, quantization_config=quantization_config(config), device_map={"": "cpu"}
    )
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    assert len(linear_4bit_modules(model)) == len(linear_4bit_modules(backbone)) > 0
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=by_turns,
            args=peer_settings(folder, items, steps),
            train_dataset=peer_rows(pairs, config.prompt),
            processing_class=processor.processor,
            peft_config=LoraConfig(
                r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=LANGUAGE_LINEARS
            ),
            callbacks=[timer],
        )
        trainer.train()
    lengths = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    assert lengths and all(row["completions/mean_length"] == NEW_TOKENS for row in lengths), lengths
    return timer.theirs, timer.mine


def by_turns(completions: list[Any], **_: Any) -> list[float | None]:
    """Return rewards that differ within a group, so that there is a gradient."""
    return [float(number % 2) for number in range(len(completions))]


def peer_settings(folder: str, items: int, steps: int) -> GRPOConfig:
    return GRPOConfig(
        folder,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=items * NUM_GENERATIONS,
        steps_per_generation=1,
        num_generations=NUM_GENERATIONS,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        temperature=1.0,
        beta=0.04,
        loss_type="dapo",
        epsilon_high=0.28,
        learning_rate=3e-5,
        max_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=steps,
        shuffle_dataset=False,
    )


@torch.no_grad()
def sample_plainly(backbone: Backbone, parts: list[PromptPart]) -> list[Rollouts]:
    """Sample one side after the other: no merged weights, no dropped row, only PEFT and transformers."""
    rollouts, processor = [], backbone.processor
    for part in parts:
        state = prefill(backbone, part.prompts, NUM_GENERATIONS, part.images)
        cache, mask, position, hidden = plain_cache(state.cache), state.mask, state.next_position, state.last
        tokens: list[Tensor] = []
        done = torch.zeros(len(part.numbers), dtype=torch.bool)
        for step in range(part.numbers.shape[1]):
            logits = backbone.language_model.lm_head(hidden)
            suppressed = suppressed_tokens(processor, logits.shape[-1], logits.device)
            tokens.append(sample_tokens(distribution(logits, suppressed, 1.0), part.numbers[:, step]))
            done |= (tokens[-1] == processor.gen_id) | (tokens[-1] == processor.turn_end_id)
            if step + 1 == part.numbers.shape[1] or bool(done.all()):
                break
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            hidden = backbone.run(
                input_ids=tokens[-1].unsqueeze(1),
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
            position = position + 1
        budget = part.numbers.shape[1] - 1
        rollouts.append(finish_rewrites(torch.stack(tokens, dim=1), processor, budget))
    return rollouts


@contextmanager
def layers_of_peft(backbone: Backbone) -> Iterator[None]:
    """Inside, all adapted layers compute as in PEFT."""
    ours: dict[Any, Any] = {
        m: m.forward for m in backbone.modules() if isinstance(m, LoraLayer | TrainableTokensLayer)
    }
    try:
        for layer in ours:
            layer.forward = partial(type(layer).forward, layer)
        yield
    finally:
        for layer, forward in ours.items():
            layer.forward = forward


def plain_cache(cache: Any) -> DynamicCache:
    """Return keys and values in a cache of transformers, which copies all of them for each token."""
    plain = DynamicCache()
    for number, layer in enumerate(cache.layers):
        plain.update(layer.keys, layer.values, number)
    return plain


def sample_as_we_do(backbone: Backbone, parts: list[PromptPart]) -> list[Rollouts]:
    with merged(backbone):
        return sample_rollouts(backbone, parts)


def learn_to_write(backbone: Backbone, pairs: list[Pair], steps: int) -> None:
    """Train the adapter on the reference rewrites of the pairs, so that rewrites end as a trained model's."""
    module: Any = SFTModule(backbone.config)
    without_trainer(module, backbone, {})
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=2e-3)
    for number in range(steps):
        chosen = [pairs[(number * 16 + n) % len(pairs)] for n in range(16)]
        module.backward(module.training_step(backbone.processor.training_batch(chosen), number))
        optimizer.step()
        optimizer.zero_grad()


def sampling_times(
    base: Path, pairs: list[Pair], items: int, rounds: int, learning_steps: int
) -> tuple[list[float], list[float], Tensor]:
    """Return the seconds of the plain loop, those of ours, and the lengths of all rewrites."""
    config = base_config(base)
    backbone = Backbone(config, RimeProcessor.from_pretrained(str(base), config.prompt))
    learn_to_write(backbone, pairs, learning_steps)
    module = RefineRLModule(config, rollouts=RolloutSettings(NUM_GENERATIONS))
    without_trainer(module, backbone, {})
    backbone.eval()
    before, now, lengths = [], [], []
    for position in range(rounds):
        start = position * items
        some = [pairs[(start + n) % len(pairs)] for n in range(items)]
        batch = backbone.processor.training_batch(some, position)
        rows = torch.arange(items)
        with torch.no_grad():
            parts = [module.prompt_part(batch, side, rows) for side in module.sides]
        with layers_of_peft(backbone):
            took, old = seconds(sample_plainly, backbone, parts)
        before.append(took)
        took, new = seconds(sample_as_we_do, backbone, parts)
        now.append(took)
        for expected, rollouts in zip(old, new, strict=True):
            assert rollouts.labels.equal(expected.labels), "the rewrites are not the same"
            lengths.append(rollouts.lengths)
    return before, now, torch.cat(lengths)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--base", type=Path, default=Path("models/tiny-scenes"), help="Base model (default: %(default)s)")
    add("--data", type=Path, default=Path("data/scenes"), help="Corpus (default: %(default)s)")
    add("--items", type=int, default=4, help="Queries in a step (default: %(default)s)")
    add("--steps", type=int, default=8, help="Measured steps (default: %(default)s)")
    add("--warm_up", type=int, default=2, help="Steps before the measured ones (default: %(default)s)")
    add("--sampled_items", type=int, default=8, help="Pairs whose sides are sampled (default: %(default)s)")
    add("--learning_steps", type=int, default=150, help="SFT steps before sampling (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warm, count = args.warm_up, args.warm_up + args.steps
    pairs = read_pairs(args.data, 256)
    theirs, mine = (times[warm:] for times in step_times(args.base, pairs[:32], args.items, count))
    before, now, lengths = sampling_times(args.base, pairs, args.sampled_items, count, args.learning_steps)
    before, now = before[warm:], now[warm:]
    for name, times in (
        ("TRL GRPOTrainer, step", theirs),
        ("Refine-RL, step", mine),
        ("plain loop, sampling", before),
        ("Refine-RL, sampling", now),
    ):
        print(f"{name:<22} {statistics.median(times):.3f} s CPU, median of {args.steps}")
    quarters = lengths.float().quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])).tolist()
    print(f"tokens of the sampled rewrites, quartiles: {', '.join(f'{value:.0f}' for value in quarters)}")
    ratios = [trl / ours for trl, ours in zip(theirs, mine, strict=True)]
    over_before = [new / old for old, new in zip(before, now, strict=True)]
    print(f"TRL over ours: {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"sampling over the plain loop: {min(over_before):.2f} to {max(over_before):.2f}")
    medians = statistics.median(ratios), statistics.median(over_before)
    print(json.dumps(dict(zip(("ratio", "sampling_over_before"), medians, strict=True))))


if __name__ == "__main__":
    main()
