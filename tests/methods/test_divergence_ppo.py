"""PPO on tokens with a penalty of choice: rewards by hand, one update against a slow reference."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from esscher.distributions.autoregressive import LanguageModel, TextSpec
from esscher.errors import UserError
from esscher.methods.language.divergence_ppo import Config, DivergencePPO
from esscher.models import tiny_llama
from esscher.runtime.device import Runtime
from esscher.types import Completions, Scored

PENALTIES: dict[str, Any] = {  # k = pi_ref / pi, from the sheet, alpha = 0.5
    "reverse_kl": lambda k: -math.log(k) + (k - 1),
    "forward_kl": lambda k: k * math.log(k) - (k - 1),
    "js": lambda k: k * math.log(k) - (k + 1) * math.log((k + 1) / 2),
    "alpha": lambda k: (k**0.5 - 0.5 * k + 0.5 - 1) / (0.5 * (0.5 - 1)),
}


def method_of(seed: int = 0, **settings: Any) -> DivergencePPO:
    torch.manual_seed(seed)
    model, tokenizer = tiny_llama(layers=1, width=16, heads=2, characters="abcd")
    policy = LanguageModel(model, end_tokens=[2], pad_token=0)
    defaults = {"batch_size": 4, "num_minibatches": 1, "epochs": 1, "max_new_tokens": 4}
    spec = TextSpec(model=policy, tokenizer=tokenizer, max_length=16)
    method = DivergencePPO(Config(**{**defaults, **settings}), spec, Runtime())
    with torch.no_grad():  # Away from the reference.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return method


def scored(method: DivergencePPO, valid: tuple[bool, ...] = (True,) * 4) -> Scored:
    """Prompts of 1 or 2 tokens padded on the left, answers of 1 to 4 tokens on the right."""
    tokens = torch.tensor(
        [
            [0, 3, 4, 5, 6, 2],
            [3, 4, 5, 2, 0, 0],
            [0, 6, 2, 0, 0, 0],
            [5, 5, 3, 3, 2, 0],
        ]
    )
    begin, end = torch.tensor([[2], [2], [2], [2]]), torch.tensor([[6], [4], [3], [5]])
    place = torch.arange(6)
    return Scored(
        completions=Completions(
            tokens=tokens,
            prompt_mask=(place < begin) & (tokens > 0),
            completion_mask=(place >= begin) & (place < end),
            logp=torch.zeros(4, 6),
            group=torch.arange(4),
            finished=torch.ones(4, dtype=torch.bool),
        ),
        reward=torch.tensor([1.0, -1.0, 0.5, 2.0]),
        valid=torch.tensor(valid),
        parts={},
    )


@pytest.mark.parametrize("divergence", PENALTIES)
def test_each_token_pays_inside_the_reward_and_the_last_one_is_paid(divergence: str) -> None:
    method = method_of(divergence=divergence, coefficient=0.3)
    log_ratio = torch.tensor([[0.0, 0.4, -0.7, 0.2], [0.0, -0.1, 0.0, 0.0]])
    mask = torch.tensor([[False, True, True, True], [False, True, False, False]])
    reward, last = method.token_rewards(torch.tensor([5.0, -2.0]), log_ratio, mask)
    pay = [0.3 * PENALTIES[divergence](math.exp(-x)) for x in (0.4, -0.7, 0.2, -0.1)]
    assert min(pay) > 0
    expected = [[0.0, -pay[0], -pay[1], 5 - pay[2]], [0.0, -2 - pay[3], 0.0, 0.0]]
    torch.testing.assert_close(reward, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert last.tolist() == [[False, False, False, True], [False, True, False, False]]
    at_loss = method_of(divergence=divergence, placement="loss")
    reward, _ = at_loss.token_rewards(torch.tensor([5.0, -2.0]), log_ratio, mask)
    assert reward.tolist() == [[0, 0, 0, 5], [0, -2, 0, 0]]


def slow_rows(method: DivergencePPO, batch: Scored) -> list[dict[str, Any]]:
    """Of each completion: its tokens one by one, by the whole softmax."""
    rows, completions = [], batch.completions
    for k in range(4):
        used = completions.prompt_mask[k] | completions.completion_mask[k]
        tokens = completions.tokens[k][used].unsqueeze(0)
        begin = int(completions.prompt_mask[k].sum())

        def logp(model: Any, tokens: Any = tokens, begin: int = begin) -> Any:
            found = model(input_ids=tokens).logits[0].log_softmax(-1)
            return torch.stack([found[t - 1, tokens[0, t]] for t in range(begin, tokens.shape[1])])

        states = method.critic.model(input_ids=tokens).last_hidden_state[0]
        value = method.critic.head(states).squeeze(-1)[begin - 1 : -1]
        rows.append({"logp": logp, "value": value})
    return rows


@pytest.mark.parametrize("placement", ["reward", "loss"])
@pytest.mark.parametrize("divergence", PENALTIES)
def test_one_update_is_that_of_a_slow_reference(
    divergence: str, placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"divergence": divergence, "placement": placement}
    settings |= {"coefficient": 0.5, "discount": 0.9, "gae_lambda": 0.8, "max_grad_norm": 1e9}
    method = method_of(**settings)
    valid = (True, True, False, True)
    batch = scored(method, valid)
    taken: dict[str, Any] = {}
    for name in ("opt", "critic_opt"):
        opt = getattr(method, name)
        monkeypatch.setattr(opt, "apply", lambda g, name=name: taken.__setitem__(name, g))
    method.update(batch, 0)

    model, reference = method.model.model, method._reference.model
    rows = slow_rows(method, batch)
    advantages, targets = [], []
    for k, row in enumerate(rows):
        with torch.no_grad():
            ratio = (row["logp"](model) - row["logp"](reference)).tolist()
        value = row["value"].tolist()
        reward = [0.0] * len(ratio)
        reward[-1] = batch.reward[k].item()
        if placement == "reward":
            pay = [0.5 * PENALTIES[divergence](math.exp(-x)) for x in ratio]
            reward = [r - p for r, p in zip(reward, pay, strict=True)]
        found, carried = [0.0] * len(value), 0.0
        for t in reversed(range(len(value))):
            following = value[t + 1] if t + 1 < len(value) else 0.0
            carried = reward[t] + 0.9 * following - value[t] + 0.9 * 0.8 * carried
            found[t] = carried
        advantages.append(found)
        targets.append([a + v for a, v in zip(found, value, strict=True)])
    flat = torch.tensor([a for k, row in enumerate(advantages) if valid[k] for a in row])
    mean, std, count = flat.mean(), flat.std(correction=0), len(flat)

    loss = value_loss = torch.zeros(())
    for k, row in enumerate(rows):
        if not valid[k]:
            continue
        logp = row["logp"](model)
        advantage = (torch.tensor(advantages[k]) - mean) / (std + 1e-8)
        loss = loss - ((logp - logp.detach()).exp() * advantage).sum() / count
        if placement == "loss":
            with torch.no_grad():
                ref_logp = row["logp"](reference)
            k_ = (ref_logp - logp).exp()
            penalty = {
                "reverse_kl": -k_.log() + k_ - 1,
                "forward_kl": k_ * k_.log() - k_ + 1,
                "js": k_ * k_.log() - (k_ + 1) * ((k_ + 1) / 2).log(),
                "alpha": (k_.sqrt() - 0.5 * k_ - 0.5) / -0.25,
            }[divergence]
            loss = loss + 0.5 * penalty.sum() / count
        error = (row["value"] - torch.tensor(targets[k])).square()
        value_loss = value_loss + 0.5 * error.sum() / count
    expected = torch.autograd.grad(loss, method.model.trained, allow_unused=True)
    for found, want in zip(taken["opt"], expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-6)
    expected = torch.autograd.grad(value_loss, method.critic.trained, allow_unused=True)
    for found, want in zip(taken["critic_opt"], expected, strict=True):
        want = torch.zeros_like(found) if want is None else want
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-6)


def test_micro_batches_make_the_same_step() -> None:
    weights = []
    for micro in (0, 1, 3):
        method = method_of(micro_batch_size=micro, learning_rate=1e-2)
        torch.manual_seed(5)
        method.update(scored(method), 0)
        weights.append([p.detach().clone() for p in method.model.trained])
    for other in weights[1:]:
        for one, two in zip(weights[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_bad_settings() -> None:
    with pytest.raises(UserError, match="num_minibatches must be a divisor of batch_size 4, got 3"):
        method_of(num_minibatches=3)
    with pytest.raises(UserError, match="alpha must be in"):
        replace(Config(), alpha=1.0)
