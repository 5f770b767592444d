"""Time of one RL step with pictures: GRPOTrainer of TRL against Refine-RL, in the same run.

`python benchmarks/rl_step.py --base models/tiny-scenes --data data/scenes`, after `make base DATA=scenes`.

Both have the same base model in float32, LoRA of the same rank on the same layers, the same queries with
pictures, G = 8 rewrites of exactly 32 new tokens, a KL penalty against the frozen start, and AdamW. A step
is all from raw items to the update: tokenising, sampling, the forward of the reference, rewards, and
forward and backward of the policy. The reward of TRL is a constant function. Ours does more: it embeds,
compares with anchors, and also trains the two token rows. All other settings of TRL are its defaults.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForImageTextToText, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rime_pl.backbone.adapters import adapter_state, save_adapter
from rime_pl.backbone.config import LANGUAGE_LINEARS, BackboneConfig
from rime_pl.backbone.mllm import Backbone
from rime_pl.datamodules.shards import ShardReader, read_split
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.modules.settings import OptimizerSettings, RolloutSettings
from rime_pl.processing import RimeProcessor
from rime_pl.prompts import PromptConfig
from rime_pl.types import Batch, Pair

NUM_GENERATIONS, NEW_TOKENS, RANK = 8, 32, 16
#: Writes a conversation in our layout, so that both read the same tokens.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_pairs(data: Path, count: int) -> list[Pair]:
    """Return training pairs whose query holds one picture, all marked as one task."""
    reader, pairs = ShardReader(read_split(data, "train")), []
    for number in range(len(reader)):
        pair = reader.read(number)
        if pair.query and len(pair.query.images) == 1:
            pairs.append(replace(pair, dataset="one"))
        if len(pairs) == count:
            return pairs
    raise SystemExit(f"{data} must hold {count} training queries with one picture, but has {len(pairs)}.")


class Items(L.LightningDataModule):
    """Raw pairs, tokenised inside the measured step as in TRL."""

    seed = 0

    def __init__(self, processor: RimeProcessor, pairs: list[Pair], items: int, steps: int) -> None:
        super().__init__()
        self.processor, self.pairs, self.items, self.steps = processor, pairs, items, steps

    def anchor_batches(self, num_anchors: int) -> list[Batch]:
        return [self.processor.training_batch(self.pairs)]

    def sample_batches(self, num_samples: int) -> list[Batch]:
        return []

    def train_dataloader(self) -> list[int]:
        """Return the numbers of the batches; the step looks up their items."""
        return list(range(self.steps))

    def batch(self, position: int) -> Batch:
        start = position * self.items
        pairs = [self.pairs[(start + n) % len(self.pairs)] for n in range(self.items)]
        return self.processor.training_batch(pairs, position)


class Timed(RefineRLModule):
    """Refine-RL that tokenises in its step, and records the seconds of each step."""

    seconds: list[float]

    def on_train_start(self) -> None:
        super().on_train_start()
        processor = self.model.processor
        stops = torch.tensor([processor.gen_id, processor.turn_end_id])

        def never_stop(module: Any, args: Any, logits: torch.Tensor) -> torch.Tensor:
            # exactly NEW_TOKENS, like min_new_tokens in TRL
            return logits.index_fill(-1, stops, -1e4)

        self.model.language_model.lm_head.register_forward_hook(never_stop)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        start = time.perf_counter()
        items: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        super().training_step(items.batch(batch), batch_idx)
        self.seconds.append(time.perf_counter() - start)


def ours(base: Path, pairs: list[Pair], items: int, steps: int) -> list[float]:
    config = BackboneConfig(
        str(base), load_in_4bit=False, dtype="float32", lora_r=RANK, prompt=PromptConfig()
    )
    processor = RimeProcessor.from_pretrained(str(base), config.prompt)
    with tempfile.TemporaryDirectory() as folder:
        start = Backbone(config, processor)
        save_adapter(folder, start.peft, adapter_state(start.peft), processor, config, start.base_hash)
        del start
        module = Timed(
            config,
            folder,
            rollouts=RolloutSettings(NUM_GENERATIONS, max_new_tokens=NEW_TOKENS - 1, sides="query"),
            optimizer=OptimizerSettings(3e-5, warmup_steps=0),
        )
        module.seconds = []
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, datamodule=Items(processor, pairs, items, steps))
        assert trainer.callback_metrics["train/rewrite_length"] == NEW_TOKENS - 1, (
            "the last token is <gen_emb>"
        )
    return module.seconds


class StepSeconds(TrainerCallback):
    """Records the wall seconds of each step of a Hugging Face trainer, with the update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def peer(base: Path, pairs: list[Pair], items: int, steps: int) -> list[float]:
    prompt = PromptConfig()
    processor = RimeProcessor.from_pretrained(str(base), prompt)
    processor.processor.chat_template = processor.tokenizer.chat_template = CHAT_TEMPLATE
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    if len(processor.tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    rows = []
    for pair in pairs:
        assert pair.query is not None
        words = "\n".join(part for part in (pair.query.instruction, pair.query.text) if part)
        text = f"{words}\n{prompt.disc_token}\n{prompt.rewrite_instruction}"
        content = [{"type": "image"}, {"type": "text", "text": text}]
        rows.append({"prompt": [{"role": "user", "content": content}], "images": list(pair.query.images)})
    timer = StepSeconds()
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
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
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **kwargs: [float(n % 2) for n in range(len(completions))],
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=processor.processor,
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=LANGUAGE_LINEARS),
            callbacks=[timer],
        )
        trainer.train()
    lengths = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    assert lengths and all(row["completions/mean_length"] == NEW_TOKENS for row in lengths), lengths
    return timer.seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", type=Path, default=Path("models/tiny-scenes"), help="Base model (default: %(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, default=Path("data/scenes"), help="Corpus (default: %(default)s)"
    )
    parser.add_argument("--items", type=int, default=4, help="Queries in a step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="Measured steps (default: %(default)s)")
    parser.add_argument(
        "--warm_up", type=int, default=2, help="Steps before the measured ones (default: %(default)s)"
    )
    args = parser.parse_args()
    pairs = read_pairs(args.data, 32)
    steps = args.warm_up + args.steps
    seconds = {
        name: statistics.median(run(args.base, pairs, args.items, steps)[args.warm_up :])
        for name, run in (("TRL GRPOTrainer", peer), ("Refine-RL", ours))
    }
    for name, value in seconds.items():
        print(f"{name:<16} {value:.3f} s per step, median of {args.steps}")
    trl, mine = seconds.values()
    facts = {"items": args.items, "generations": NUM_GENERATIONS, "new_tokens": NEW_TOKENS}
    facts |= {"threads": torch.get_num_threads()}
    print(json.dumps({"ratio": trl / mine, "trl_seconds": trl, "seconds": mine, **facts}))


if __name__ == "__main__":
    main()
