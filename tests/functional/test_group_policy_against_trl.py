"""The pieces of GRPO and its relatives against TRL's trainer, whose own methods are run here.

Only what surrounds the formulas is replaced: generation, reward functions, the model's forward
pass and the accelerator. Skipped where TRL is not installed.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from esscher.functional.advantages import group_advantages, overlong_mask, overlong_penalty
from esscher.functional.kl import kl_k3_terms
from esscher.functional.reductions import aggregate, aggregation_denominator
from esscher.functional.surrogates import clip_fraction, clipped_ratio_terms, sequence_log_ratio

GRPOTrainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer

END, LIMIT = 9, 6
LENGTHS = [1, 6, 2, 5, 3, 6, 4, 2]


def trainer(rewards=None, completions=None, logps=None, **settings):
    """What TRL's methods read from `self`, and nothing of its construction."""
    return SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            num_processes=1,
            process_index=0,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
        ),
        args=SimpleNamespace(
            delta=settings.pop("delta", None),
            use_bias_correction_kl=False,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=settings.get("current_gradient_accumulation_steps", 1),
        ),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        _tokenizer=SimpleNamespace(pad_token_id=0),
        eos_token_ids=[END],
        _metrics={"train": defaultdict(list)},
        _logs={"prompt": [], "completion": [], "advantages": [], "rewards": defaultdict(list)},
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda prompts: ([[1]] * 8, completions, None, [""] * 8, None, {}, None, None),
        _calculate_rewards=lambda *_: rewards.unsqueeze(1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        reward_weights=torch.ones(1),
        reward_func_names=["reward"],
        reward_funcs=[None],
        num_generations=4,
        environment_factories=None,
        environments=None,
        tools=None,
        pad_to_multiple_of=None,
        off_policy_mask_threshold=None,
        **{
            "multi_objective_aggregation": "sum_then_normalize",
            "mask_truncated_completions": False,
            "scale_rewards": "group",
            "num_iterations": 1,
            "use_vllm": False,
            "log_multimodal": False,
            "aux_loss_enabled": False,
            "_entropy_bonus_enabled": False,
            "top_entropy_quantile": 1.0,
            "importance_sampling_level": "token",
            "beta": 0.0,
            "epsilon_low": 0.2,
            "epsilon_high": 0.28,
            "max_completion_length": LIMIT,
            "current_gradient_accumulation_steps": 1,
            **settings,
        },
    )


def scored(rewards, lengths=LENGTHS, **settings):
    """TRL's batch for two prompts with four responses each; those at the limit have no end."""
    completions = [[2] * (n - 1) + [END if n < LIMIT else 2] for n in lengths]
    fake = trainer(torch.tensor(rewards), completions, **settings)
    prompts = [{"prompt": ""} for _ in rewards]
    return GRPOTrainer._generate_and_score_completions(fake, prompts)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "rewards",
    [[1.0, 0, 0, 0, 1, 1, 1, 0], [0.3, -2, 0.5, 4, 1, 1, 1, 1], [0.1] * 8],
    ids=["binary", "one flat group", "all equal"],
)
def test_advantages(rewards, scale):
    expected = scored(rewards, scale_rewards=scale)["advantages"]
    group = torch.tensor([5] * 4 + [2] * 4)
    found = group_advantages(torch.tensor(rewards), group, std=scale, epsilon=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rows_without_a_reward(scale):
    rewards = [1.0, 0, float("nan"), 0, 1, 3, 1, 0]
    expected = scored(rewards, scale_rewards=scale)["advantages"]
    reward, group = torch.tensor(rewards), torch.arange(8) // 4
    found = group_advantages(reward, group, std=scale, epsilon=1e-4, valid=~reward.isnan())
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert expected[2] == 0


def test_overlong_responses():
    rewards = [1.0, 0, 0, 0, 1, 1, 1, 0]
    expected = scored(rewards, mask_truncated_completions=True)
    mask = torch.arange(LIMIT) < torch.tensor(LENGTHS)[:, None]
    found = overlong_mask(mask, torch.tensor(LENGTHS) < LIMIT)
    assert (found == expected["completion_mask"].bool()).all()
    assert aggregation_denominator(found, "token_mean") == expected["num_items_in_batch"]
    # Their rewards still count.
    torch.testing.assert_close(expected["advantages"], scored(rewards)["advantages"])

    from trl.rewards import get_soft_overlong_punishment

    lengths = list(range(30))
    expected = get_soft_overlong_punishment(20, 8)([[0] * n for n in lengths])
    found = overlong_penalty(torch.tensor(lengths), 20, 8)
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.fixture
def batch():
    torch.manual_seed(0)
    logp = -torch.rand(8, LIMIT, dtype=torch.float64)
    return {
        "logp": logp.requires_grad_(),
        "old_logp": logp.detach() + 0.6 * torch.randn(8, LIMIT, dtype=torch.float64),
        "ref_logp": logp.detach() + 0.6 * torch.randn(8, LIMIT, dtype=torch.float64),
        "advantage": torch.randn(8, dtype=torch.float64),
        "mask": torch.arange(LIMIT) < torch.tensor([*LENGTHS[:-1], 0])[:, None],
    }


def trl_loss(batch, rows=slice(None), **settings):
    fake = trainer(logps=batch["logp"][rows], **settings)
    inputs = {
        "prompt_ids": torch.ones(8, 1)[rows],
        "prompt_mask": torch.ones(8, 1)[rows],
        "completion_ids": torch.ones(8, LIMIT)[rows],
        "completion_mask": batch["mask"][rows].long(),
        "advantages": batch["advantage"][rows],
        "old_per_token_logps": batch["old_logp"][rows],
        "ref_per_token_logps": batch["ref_logp"][rows],
        "num_items_in_batch": batch["mask"].sum(),
    }
    return GRPOTrainer._compute_loss(fake, fake.model, inputs), fake._metrics["train"]


def ours(batch, how, rows=slice(None), sequence=False, beta=0.0, dual_clip=None):
    mask, advantage = batch["mask"][rows], batch["advantage"][rows].unsqueeze(1)
    log_ratio = batch["logp"][rows] - batch["old_logp"][rows]
    if sequence:
        log_ratio = sequence_log_ratio(log_ratio, mask)
    terms = clipped_ratio_terms(log_ratio, advantage, 0.2, 0.28, dual_clip=dual_clip)
    terms = terms + beta * kl_k3_terms(batch["logp"][rows] - batch["ref_logp"][rows])
    denominator = aggregation_denominator(batch["mask"], how, max_length=LIMIT)
    return aggregate(terms, mask, how, denominator)


def same(batch, found, expected):
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    slopes = [
        torch.autograd.grad(x, batch["logp"], retain_graph=True)[0] for x in (found, expected)
    ]
    torch.testing.assert_close(*slopes, atol=1e-6, rtol=1e-6)
    assert slopes[0].abs().max() > 1e-3


HOW = {
    "grpo": "sequence_mean_token_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "dr_grpo": "constant_length",
    "luspo": "sequence_mean_token_sum",
}


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", HOW)
def test_losses_of_a_full_batch_with_a_masked_row(batch, loss_type, beta):
    expected, _ = trl_loss(batch, loss_type=loss_type, beta=beta)
    same(batch, ours(batch, HOW[loss_type], beta=beta), expected)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
def test_losses_accumulated_over_two_micro_batches(batch, loss_type):
    halves = [slice(0, 4), slice(4, 8)]
    settings = {"loss_type": loss_type, "current_gradient_accumulation_steps": 2}
    expected = sum(trl_loss(batch, rows, **settings)[0] for rows in halves)
    same(batch, sum(ours(batch, HOW[loss_type], rows) for rows in halves), expected)


def test_sequence_ratios(batch):
    expected, _ = trl_loss(batch, loss_type="grpo", importance_sampling_level="sequence")
    same(batch, ours(batch, HOW["grpo"], sequence=True), expected)


def test_dual_clip_is_trls_delta_where_that_exceeds_the_upper_bound(batch):
    expected, _ = trl_loss(batch, loss_type="dapo", delta=1.4)
    same(batch, ours(batch, "token_mean", dual_clip=1.4), expected)
    assert (ours(batch, "token_mean") - expected).abs() > 1e-3


def test_clip_fraction(batch):
    _, metrics = trl_loss(batch, loss_type="dapo")
    log_ratio = batch["logp"] - batch["old_logp"]
    found = clip_fraction(log_ratio, batch["advantage"].unsqueeze(1), batch["mask"], 0.2, 0.28)
    assert found.item() == pytest.approx(metrics["clip_ratio/region_mean"][0], abs=1e-6)
    assert 0.1 < found.item() < 0.9
