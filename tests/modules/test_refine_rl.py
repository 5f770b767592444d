"""Refine-RL on the micro model: rewards by hand, every switch, parts, a reward that rises, and safe stops."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rime_pl.backbone.adapters import adapter_values, trained_values
from rime_pl.errors import DivergedError, RimeError
from rime_pl.generation.rollouts import PromptPart, random_numbers, sample_rollouts, score_rollouts
from rime_pl.modules import refine_rl
from rime_pl.modules.refine_rl import RefineRLModule
from rime_pl.modules.settings import RewardSettings
from rime_pl.processing import RimeProcessor
from rime_pl.types import Batch, Pair, Side
from tests.conftest import MakeBackbone
from tests.micro import RewardPairs, randomise_adapter, refine_rl_module, rl_settings

MakeModule = Callable[..., RefineRLModule]


@pytest.fixture(scope="module")
def pairs(train_pairs: list[Pair]) -> list[Pair]:
    """8 pairs of one task; the last target is a duplicate of the first."""
    chosen = [replace(pair, dataset="one") for pair in train_pairs[:8]]
    chosen[7] = replace(chosen[7], target=replace(chosen[7].target, content_id=chosen[0].target.content_id))
    return chosen


@pytest.fixture(scope="module")
def rl_batch(processor: RimeProcessor, pairs: list[Pair]) -> Batch:
    return processor.training_batch(pairs[:4], position=3)


@pytest.fixture(scope="module")
def make_module(make_backbone: MakeBackbone, pairs: list[Pair]) -> MakeModule:
    def make(**groups: dict[str, Any]) -> RefineRLModule:
        module = refine_rl_module(make_backbone(), **groups)
        module.prepare(RewardPairs(module.model.processor, pairs))
        return module

    return make


def logged(module: RefineRLModule) -> dict[str, float]:
    return module.logged_values  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize(
    ("side", "other", "embedder"), [("query", "target", "reference"), ("target", "query", "policy")]
)
def test_the_reward_of_each_rewrite_by_hand(
    side: Side, other: Side, embedder: str, make_module: MakeModule, rl_batch: Batch
) -> None:
    """Through plain forwards: one side with its rewrite, against all d of the other but the duplicate's."""
    module = make_module(reward={"embedder": embedder})
    randomise_adapter(module.model.peft, seed=5, scale=0.02)
    parts, anchors = module.sample(rl_batch)
    rewards = module.scorer.rewards(parts, rl_batch, anchors)
    number, group = ("query", "target").index(side), module.rollouts.num_generations
    part, reward, model = parts[number], rewards[number], module.model
    rows = torch.arange(4).repeat_interleave(group)
    prompts = {"query": rl_batch.query.prompts, "target": rl_batch.target.prompts}
    with torch.no_grad():
        gens = {"policy": model(prompts[side].select(rows), part.rollouts.completions).gen}
        with adapter_values(model, module.reference):
            gens["reference"] = model(prompts[side].select(rows), part.rollouts.completions).gen
            own = model(prompts[other]).disc
        table = module.scorer.tables["one"]
    gen = gens[embedder]
    assert (gens["policy"] - gens["reference"]).abs().max() > 0.01
    known = table.contents.tolist()
    for row in range(len(part.rollouts)):
        item = row // group
        negatives = [own[j] for j in range(4) if j != item]
        negatives += [
            table.embeddings[other][j]
            for j, (query, target) in enumerate(known)
            if query != rl_batch.query_content[item] and target != rl_batch.target_content[item]
        ]
        assert len(negatives) == 3 + (6 if item == 0 else 7)  # itself, and the duplicate
        scores = torch.stack([own[item], *negatives]) @ gen[row] / 0.05
        expected = (scores.log_softmax(0)[0] + torch.tensor(len(scores)).log()).item()
        assert reward.embedding[row].item() == pytest.approx(expected, abs=1e-3)
        formed = part.rollouts.well_formed[row].item()
        assert reward.total[row].item() == pytest.approx(1 + expected if formed else 0.0, abs=1e-3)
    assert 0 < part.rollouts.well_formed.sum() < len(part.rollouts)


@pytest.mark.parametrize(
    "settings",
    [
        {"rollouts": {"sides": "query"}},
        {"advantages": {"scaling": "std"}},
        {
            "reward": {
                "form": "rank_margin",
                "anchors": "rollouts",
                "embedder": "policy",
                "num_anchors": 0,
            }
        },
        {"policy": {"loss_type": "grpo", "num_updates": 3, "drift_coef": 2.0}},
        {
            "policy": {"loss_type": "dr_grpo"},
            "reward": {"num_anchors": 0, "weight_length": 0.5, "free_length": 3},
        },
        {"reward": {"shuffle": True}},
        {"reward": {"anchors": "greedy"}},
    ],
)
def test_every_switch_trains(settings: dict[str, Any], make_module: MakeModule, rl_batch: Batch) -> None:
    module = make_module(**settings)
    before = trained_values(module.model)
    module.training_step(rl_batch, 0)
    after = trained_values(module.model)
    assert all(not before[name].equal(after[name]) for name in before if "lora_B" in name)
    assert {"train/reward", "train/gain", "train/no_signal", "train/kl", "train/entropy"} <= set(
        logged(module)
    )
    assert all(torch.isfinite(torch.tensor(value)) for value in logged(module).values())


def test_every_setting_reaches_what_it_sets(
    make_module: MakeModule, rl_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[dict[str, Any]] = []
    advantages: list[dict[str, Any]] = []

    def spy(function: Any, calls: list[dict[str, Any]]) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(function).bind(*args, **kwargs)
            calls.append(dict(bound.arguments))
            return function(*args, **kwargs)

        return called

    monkeypatch.setattr(refine_rl, "policy_loss", spy(refine_rl.policy_loss, losses))
    monkeypatch.setattr(refine_rl, "group_advantages", spy(refine_rl.group_advantages, advantages))
    rewards: dict[str, Any] = {"weight_format": 0.7, "weight_embedding": 1.3, "weight_length": 0.2}
    of_loss = {"loss_type": "grpo", "clip_low": 0.11, "clip_high": 0.33, "kl_coef": 0.07}
    scaling = {"scaling": "std", "min_spread": 0.01}
    rewards |= {"free_length": 5, "num_anchors": 5, "form": "rank_margin", "temperature": 0.2}
    module = make_module(
        reward=rewards,
        policy={**of_loss, "num_updates": 2, "max_grad_norm": 1e-3},
        advantages={**scaling, "scale": 2.0},
    )
    norms: list[float] = []

    def measure(optimizer: Any, args: Any, kwargs: Any) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    module.optimizers().register_step_pre_hook(measure)  # type: ignore[union-attr]
    module.training_step(rl_batch, 0)
    assert len(losses) == 4 and len(advantages) == 2  # two sides, two updates
    assert all({name: call[name] for name in of_loss} == of_loss for call in losses)
    assert all({name: call[name] for name in scaling} == scaling for call in advantages)
    assert all(call["scale"] == 2.0 for call in advantages)
    assert module.scorer.settings == RewardSettings(**rewards)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2) and logged(module)["train/grad_norm"] > 1e-2
    assert all(p.grad is None for p in module.parameters()), "no gradient is left for the next batch"


def test_another_position_draws_other_rewrites(make_module: MakeModule, rl_batch: Batch) -> None:
    module = make_module(rollouts={"sides": "query"})
    drawn = [
        module.sample(replace(rl_batch, position=position))[0][0].rollouts.labels for position in (3, 3, 4)
    ]
    assert drawn[0].equal(drawn[1])
    assert drawn[0].shape != drawn[2].shape or not drawn[0].equal(drawn[2])


def test_parts_change_nothing(make_module: MakeModule, rl_batch: Batch) -> None:
    gradients = []
    for size, together in ((None, None), (1, None), (3, 1)):
        module = make_module(
            rollouts={"items_per_pass": size, "passes_per_sampling": together},
            optimizer={"learning_rate": 0.0},
            policy={"max_grad_norm": 1e9, "drift_coef": 0.5},
        )
        randomise_adapter(module.model.peft, seed=5, scale=0.02)  # the start has no drift
        module.optimizers().zero_grad = lambda: None  # type: ignore[union-attr,method-assign]
        module.training_step(rl_batch, 0)
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.requires_grad})
    for other in gradients[1:]:
        for name, expected in gradients[0].items():
            assert expected is not None and other[name] is not None
            error = (other[name] - expected).norm() / expected.norm().clamp(min=1e-12)
            assert error < 1e-4, (name, float(error))


def test_one_temperature_draws_and_scores(make_module: MakeModule, rl_batch: Batch) -> None:
    module = make_module(rollouts={"temperature": 0.7, "sides": "query"})
    module.training_step(rl_batch, 0)  # were one pass at another temperature, policy and reference differed
    assert logged(module)["train/kl"] == pytest.approx(0, abs=1e-6)
    module = make_module(rollouts={"temperature": 0.7, "sides": "query"})
    (part,), _ = module.sample(rl_batch)
    names = [f"query {row}" for row in range(4)]
    numbers = random_numbers(module.seed, rl_batch.position, names, module.rollouts.num_generations, 9)
    asked = [PromptPart(part.prompts, numbers)]
    drawn = {t: sample_rollouts(module.model, asked, t)[0].labels for t in (0.7, 1.0)}
    assert part.rollouts.labels.equal(drawn[0.7])
    assert drawn[1.0].shape != drawn[0.7].shape or not drawn[1.0].equal(drawn[0.7])


def test_the_first_update_has_no_divergence_and_later_ones_clip(
    make_module: MakeModule, rl_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(optimizer={"learning_rate": 3e-2}, policy={"num_updates": 4, "kl_coef": 0.0})
    seen: list[dict[str, float]] = []
    monkeypatch.setattr(module, "log_means", lambda size, values, sync_dist=False: seen.append(values))
    module.training_step(rl_batch, 0)
    steps = [values for values in seen if "kl" in values]
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[0]["clip_fraction"] == 0
    assert steps[-1]["kl"] > 1e-3 and steps[-1]["clip_fraction"] > 0


def test_the_reward_rises(make_module: MakeModule, rl_batch: Batch) -> None:
    """4 pairs again and again, other rollouts each time; with shuffled rewards it does not."""
    rises = {}
    for shuffle in (False, True):
        module = make_module(
            optimizer={"learning_rate": 1e-2},
            reward={"shuffle": shuffle},
            rollouts={"sides": "query"},
            policy={"kl_coef": 0.0},
        )
        rewards = []
        for position in range(14):
            module.training_step(replace(rl_batch, position=position), 0)
            rewards.append(logged(module)["train/reward"])
        rises[shuffle] = sum(rewards[-4:]) / 4 - sum(rewards[:4]) / 4
    assert rises[False] > 0.2 and rises[False] > rises[True] + 0.15, rises


def test_the_drift_penalty_holds_both_embeddings(make_module: MakeModule, rl_batch: Batch) -> None:
    """The same steps move the embeddings several times less, and the words still change."""
    found: list[tuple[float, float, float]] = []  # drift, that of the queries by hand, k2
    for coefficient in (0.0, 30.0):
        module = make_module(
            optimizer={"learning_rate": 1e-2}, policy={"kl_coef": 0.0, "drift_coef": coefficient}
        )
        for position in range(8):
            module.training_step(replace(rl_batch, position=position), 0)
        with torch.no_grad():
            now = module.model(rl_batch.query.prompts).disc
            with adapter_values(module.model, module.reference):
                moved = float((1 - (now * module.model(rl_batch.query.prompts).disc).sum(1)).mean())
        found.append((logged(module)["train/drift"], moved, logged(module)["train/k2"]))
    free, held = found
    assert held[0] < 0.3 * free[0] and held[1] < 0.3 * free[1] and held[2] > 1e-4, found


def test_the_reference_stands_still(make_module: MakeModule, rl_batch: Batch) -> None:
    module = make_module()
    before = {name: value.clone() for name, value in module.reference.items()}
    module.training_step(rl_batch, 0)
    assert all(module.reference[name].equal(value) for name, value in before.items())


def test_policy_and_reference_each_see_with_their_own_tower(
    make_backbone: MakeBackbone, pairs: list[Pair], rl_batch: Batch
) -> None:
    module = refine_rl_module(make_backbone(lora_tower="all", load_in_4bit=False))
    module.prepare(RewardPairs(module.model.processor, pairs))
    randomise_adapter(module.model.peft, seed=3, scale=0.05)  # as after some steps
    other = make_backbone(lora_tower="all", load_in_4bit=False)  # that has the reference's values for good
    other.load_state_dict(module.reference, strict=False)
    other.language_model.lm_head.token_adapter.base_layer = (
        module.model.language_model.lm_head.token_adapter.base_layer
    )
    assert any(".visual." in name for name in module.reference)
    for part in module.sample(rl_batch)[0]:
        with torch.no_grad():
            seen = score_rollouts(other, part.prompts, part.rollouts)
            with_policys_tower = score_rollouts(
                other, part.prompts, part.rollouts, features=module.model.encode_media(part.prompts)
            )
        torch.testing.assert_close(part.reference.logprobs, seen.logprobs, atol=1e-5, rtol=0)
        torch.testing.assert_close(part.reference.gen, seen.gen, atol=1e-5, rtol=0)
        if part.prompts.pixel_values is not None:
            assert (with_policys_tower.gen - seen.gen).norm() > 1e-3


def test_a_step_is_a_function_of_seed_and_position(make_module: MakeModule, rl_batch: Batch) -> None:
    """Whatever happened before, and whatever torch's own generator says: so a resumed run is the same."""
    results = []
    for noise in (0, 1):
        module = make_module()
        torch.manual_seed(noise)
        module.training_step(rl_batch, 0)
        results.append(trained_values(module.model))
    assert all(results[0][name].equal(results[1][name]) for name in results[0])


def test_exploding_divergence_stops_before_the_step(make_module: MakeModule, rl_batch: Batch) -> None:
    module = make_module(policy={"max_kl": 1e-6})
    randomise_adapter(module.model.peft, seed=5)
    before = trained_values(module.model)
    with pytest.raises(DivergedError, match=r"step 0 \(batch 3, update 0\).*max_kl=1e-06") as caught:
        module.training_step(rl_batch, 0)
    assert all(key in str(caught.value) for key in rl_batch.keys)
    after = trained_values(module.model)
    assert all(before[name].equal(after[name]) for name in before)


def test_one_token_that_the_reference_finds_likelier_does_not_stop_the_run(
    make_module: MakeModule, rl_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(policy={"max_kl": 10.0})
    inner = refine_rl.policy_loss

    def surprised(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, *rest: Any) -> Any:
        reference = rest[0].clone()
        reference[0, 0] += 11.0  # k3 of this token: 6e4 nats, over a few hundred tokens; k2: 60
        return inner(logprobs, old, advantages, mask, reference, *rest[1:])

    monkeypatch.setattr(refine_rl, "policy_loss", surprised)
    module.training_step(rl_batch, 0)
    watched = logged(module)
    assert watched["train/kl"] > 10 > watched["train/k2"] > 0


@pytest.mark.parametrize("where", ["reward", "weights"])
def test_what_is_no_number_stops_the_run(where: str, make_module: MakeModule, rl_batch: Batch) -> None:
    module = make_module()
    if where == "weights":
        parameter = next(p for n, p in module.named_parameters() if "lora_B" in n)
        with torch.no_grad():
            parameter[0, 0] = float("nan")
    else:
        inner = module.scorer.rewards

        def broken(*given: Any) -> Any:
            rewards = inner(*given)
            rewards[0].total[0] = float("nan")
            return rewards

        module.scorer.rewards = broken  # type: ignore[method-assign]
    with pytest.raises(DivergedError, match="not finite"):
        module.training_step(rl_batch, 0)


def test_the_table_of_rewrites(make_module: MakeModule, pairs: list[Pair]) -> None:
    module = make_module()
    same = module.rewrite_changes()
    assert [one.key for one in same] == RewardPairs.sample_keys(module.before)
    queries = [pair.query for pair in pairs[2:5] if pair.query]
    assert [one.query for one in same] == [f"{item.instruction} {item.text}" for item in queries], "no layout"
    assert all(one.before == one.after and one.reward_before == one.reward_after for one in same)
    randomise_adapter(module.model.peft, seed=1, scale=3.0)
    assert any(one.before != one.after for one in module.rewrite_changes())


def test_an_item_that_nothing_is_compared_with_is_told(make_module: MakeModule, rl_batch: Batch) -> None:
    module = make_module(reward={"num_anchors": 0})
    module.scorer.tables.clear()
    lonely = replace(rl_batch, target_content=torch.full_like(rl_batch.target_content, 7))
    with pytest.raises(RimeError, match=r"model.reward.anchors=discriminative: .* 'one' has no negative"):
        module.training_step(lonely, 0)


def test_settings_that_make_no_sense_are_named(make_module: MakeModule, shared_backbone: Any) -> None:
    config = shared_backbone.config
    both: dict[str, Any] = {"reward": {"anchors": "rollouts"}, "rollouts": {"sides": "query"}}
    more_than_the_budget = {"weight_length": 0.1, "free_length": 32}
    for groups, message in [
        ({"rollouts": {"num_generations": 1}}, "model.rollouts.num_generations must be 2 or more, but is 1"),
        (both, "model.reward.anchors=rollouts needs rollouts of both sides"),
        ({"reward": {"temperature": 0.0}}, "model.reward.temperature must be greater than 0, but is 0.0"),
        ({"rollouts": {"items_per_pass": 0}}, "model.rollouts.items_per_pass must be greater than 0"),
        ({"rollouts": {"passes_per_sampling": 0}}, "rollouts.passes_per_sampling must be greater than 0"),
        ({"rollouts": {"max_new_tokens": 0}}, "model.rollouts.max_new_tokens must be greater than 0"),
        ({"policy": {"clip_low": -0.1}}, "model.policy.clip_low must be 0 or more, but is -0.1"),
        ({"policy": {"num_updates": 0}}, "model.policy.num_updates must be greater than 0, but is 0"),
        ({"reward": more_than_the_budget}, "below the budget of 8 tokens, but is 32"),
    ]:
        with pytest.raises(RimeError, match=message):
            RefineRLModule(config, **rl_settings(**groups))
    with pytest.raises(RimeError, match=r"lora_dropout must be 0 in Refine-RL, but is 0.1"):
        RefineRLModule(replace(config, lora_dropout=0.1))
    with pytest.raises(RimeError, match="init_adapter_from is missing"):
        RefineRLModule(config).configure_model()


def test_hard_negatives_are_refused(
    make_module: MakeModule, processor: RimeProcessor, pairs: list[Pair]
) -> None:
    """No reward would look at them."""
    batch = processor.training_batch(pairs, further=True)
    with pytest.raises(RimeError, match=r"data.hard_negatives and data.positives must be 0 in Refine-RL"):
        make_module().training_step(batch, 0)
