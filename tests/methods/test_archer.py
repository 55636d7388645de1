"""ArCHer: targets and losses by hand, exact policy gradients, who learns from what, its baselines."""

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esscher
import llamas
from esscher.critics import Values
from esscher.critics.text import TextEncoder, TokenValue, TwinTextCritic, body_of, twin_of
from esscher.distributions.autoregressive import LanguageModel, TextSpec
from esscher.errors import UserError
from esscher.experience.turns import Turn, TurnReplay, Turns
from esscher.methods.language.archer import ArCHer, Config, critic_terms, token_advantages
from esscher.models import character_tokenizer
from esscher.registry import recipes
from esscher.runtime import run as runner
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Prompts
from llamas import shaken
from support import assert_same_run, smoke, train, train_until

PAD, END, VOCABULARY = 0, 1, 7
RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")


def llama(adapters: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    return llamas.llama(
        VOCABULARY,
        dtype,
        adapters,
        size=0.2,
        max_position_embeddings=32,
        pad_token_id=PAD,
        eos_token_id=END,
    )


def method_of(model: Any = None, **changes: Any) -> ArCHer:
    policy = LanguageModel(model or llama(), end_tokens=(END,), pad_token=PAD)
    settings: dict[str, Any] = {
        "max_new_tokens": 2,
        "batch_size": 4,
        "micro_batch_size": 0,
        "buffer_size": 100,
        "critic_updates": 2,
        "actor_updates": 1,
        "warmup": 0,
        "episodes": 2,
        "critic_learning_rate": 1e-2,
        "actor_learning_rate": 1e-2,
    }
    spec = TextSpec(model=policy, tokenizer=None, max_length=16)
    torch.manual_seed(1)
    return ArCHer(Config(**(settings | changes)), spec, Runtime(RUNTIME))


def turn(seen: list[int], said: list[int], reward: float = 0.0, **more: Any) -> Turn:
    fields = {"next_prompt": [5], "terminated": False, "truncated": False} | more
    return Turn(seen, said, reward, **fields)


TURNS = Turns.of(
    [
        turn([2, 3], [4, END], 1.0, next_prompt=[2, 3, 4], episode_return=4.0),
        turn([2, 3, 4], [5, 6], 3.0, terminated=True, next_prompt=[], episode_return=4.0),
        turn([6], [END], -2.0, next_prompt=[6, 2], episode_return=-1.5),
        turn([6, 2], [2, END], 0.5, truncated=True, next_prompt=[6, 2, 2], episode_return=-1.5),
    ]
)


def replay(turns: Turns = TURNS) -> TurnReplay:
    found = TurnReplay(100, 16)
    found.add(turns)
    return found


def snapshot(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module: nn.Module, before: list[Tensor]) -> list[bool]:
    return [not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True)]


class Table(nn.Module):
    """Twin values by rule: Q_i of the first token said, V_i of the last token seen."""

    def __init__(self, q: Any, v: Any):
        super().__init__()
        self.q, self.v, self.asked = q, v, []

    def forward(self, seen: Any, said: Any) -> tuple[Values, Values]:
        first = said[0][:, 0].tolist()
        self.asked.append(first)
        return Values(mean=self._of(self.q, first)), self.value(*seen)

    def value(self, tokens: Tensor, mask: Tensor) -> Values:
        last = [int(t[m][-1]) for t, m in zip(tokens, mask, strict=True)]
        return Values(mean=self._of(self.v, last))

    def _of(self, rule: Any, tokens: list[int]) -> Tensor:
        return torch.tensor([[float(rule(i, t)) for t in tokens] for i in (0, 1)])


# ---- the critic


def test_critic_terms_by_hand() -> None:
    q, v = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [5.0]])
    q_target, v_target = torch.tensor([[4.0], [1.0]]), torch.tensor([[2.0], [3.0]])
    # Q: (1 - 4)^2 + (2 - 1)^2 = 10; V: too low by 2, too high by 2: 4 + 4.
    assert critic_terms(q, v, q_target, v_target).tolist() == [18.0]
    # 0.9 * 4 where V is too low, 0.1 * 4 where it is too high.
    assert critic_terms(q, v, q_target, v_target, 0.8).tolist() == pytest.approx([10 + 3.2 + 0.8])
    q.requires_grad_(), v.requires_grad_(), q_target.requires_grad_(), v_target.requires_grad_()
    critic_terms(q, v, q_target, v_target).sum().backward()
    assert q.grad.tolist() == [[-6.0], [2.0]] and v.grad.tolist() == [[-4.0], [4.0]]  # type: ignore[union-attr]
    assert q_target.grad is None and v_target.grad is None


def test_targets_are_each_twins_own_and_stop_at_the_end() -> None:
    method = method_of(discount=0.5)
    method.target_critic = Table(lambda i, t: 100 * i + t, lambda i, t: 10 * (i + 1) + t)
    method.critic = Table(lambda i, t: 1e6, lambda i, t: 1e6)  # Never to be asked for a target.
    fresh = replace(TURNS, tokens=TURNS.tokens.clone())
    for row, token in enumerate((6, 2, 3, 5)):
        fresh.tokens[row, TURNS.prompt_length[row]] = token
    q_target, v_target = method._targets(TURNS, fresh)
    # r + 0.5 Vbar_i(o'), o' ending in 4, (end), 2, 2; a cut bootstraps.
    expected = [1 + 0.5 * 14, 3.0, -2 + 0.5 * 12, 0.5 + 0.5 * 12]
    other = [1 + 0.5 * 24, 3.0, -2 + 0.5 * 22, 0.5 + 0.5 * 22]
    assert q_target.tolist() == [expected, other]
    assert v_target.tolist() == [[6, 2, 3, 5], [106, 102, 103, 105]]


def test_the_value_is_of_what_the_model_would_say_now() -> None:
    """Not of what was said; and the expectile variant asks for exactly that."""
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[3] = 10.0  # Now it always says 3.
    method = method_of(model)
    method.target_critic = table = Table(lambda i, t: t, lambda i, t: 0)
    told = []
    for target, said in (("policy", [3, 3, 3, 3]), ("expectile", [4, 5, 1, 2])):
        method.cfg = replace(method.cfg, value_target=target)
        critic, method.critic = method.critic, copy.deepcopy(method.critic)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("esscher.methods.language.archer.polyak", lambda *a: None)
            told.append(method.learn_critic(TURNS))
        method.critic = critic
        assert table.asked[-1] == said


def test_the_critic_learns_its_targets_and_nothing_else_moves() -> None:
    method = method_of(tau=0.25)
    before = {n: snapshot(getattr(method, n)) for n in ("model", "critic", "target_critic")}
    told = method.learn_critic(TURNS)
    assert all(moved(method.critic, before["critic"]))
    assert not any(moved(method.model, before["model"]))
    after = zip(
        method.target_critic.parameters(),
        before["target_critic"],
        method.critic.parameters(),
        strict=True,
    )
    for target, old, new in after:
        torch.testing.assert_close(target, 0.75 * old + 0.25 * new)
    assert not any(p.requires_grad for p in method.target_critic.parameters())
    assert all(p.grad is None for p in method.model.parameters())
    assert {"q_loss", "v_loss", "q", "v", "q_target_std"} == set(told)


def test_the_critic_finds_the_values_of_a_chain() -> None:
    """Two turns, (a) -> (b) -> end with rewards 1 and 2: V(b) = 2, V(a) = 1 + 0.9 * 2."""
    chain = Turns.of(
        [
            turn([2], [4, END], 1.0, next_prompt=[3]),
            turn([3], [4, END], 2.0, next_prompt=[], terminated=True),
        ]
    )
    method = method_of(discount=0.9, tau=0.5, value_target="expectile", expectile=0.5)
    for rate in (5e-3, 5e-4):
        method.critic_opt.learning_rate = rate
        for _ in range(50):
            method.learn_critic(chain)
    q, v = (x.mean for x in method.critic(chain.seen(), chain.said()))
    exact = torch.tensor([2.8, 2.0]).expand(2, 2)
    torch.testing.assert_close(q, exact, atol=0.1, rtol=0)
    torch.testing.assert_close(v, exact, atol=0.1, rtol=0)


@pytest.mark.parametrize("what", ["critic", "actor", "cloning", "ppo", "baseline"])
def test_micro_batches_change_nothing(what: str) -> None:
    def stepped(micro: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        learner = {"cloning": "filtered_cloning", "ppo": "ppo"}.get(what, "archer")
        options = {"learner": learner, "token_baseline": what == "baseline"}
        method = method_of(micro_batch_size=micro, epochs=2, **options)
        torch.manual_seed(3)
        if what == "critic":
            told = method.learn_critic(TURNS)
        elif what == "cloning":
            told = method.imitate(TURNS)
        elif what == "ppo":
            told = method.learn_tokens(TURNS)[-1]
        else:
            told = method.learn_actor(TURNS)
        return told, method.state_dict()

    told, whole = stepped(0)
    for micro in (1, 3):
        other, cut = stepped(micro)
        for name, value in told.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5, msg=name)
        for name, value in whole.items():
            if torch.is_tensor(value) and "moment" not in name:
                # Adam's first step is the sign of the gradient, which may be a rounding error.
                close = torch.isclose(value, cut[name], rtol=1e-2, atol=1e-4).float().mean()
                assert close > 0.97, name


# ---- the actor


def test_the_advantage_takes_the_smaller_of_each_pair_of_the_online_critic() -> None:
    method = method_of()
    method.critic = Table(lambda i, t: t if i == 0 else 8 - 2 * t, lambda i, t: -1 if i else 3)
    method.target_critic = Table(lambda i, t: 1e6, lambda i, t: 1e6)
    q, v = method._smaller(method.critic, TURNS.seen(), TURNS.said())
    # First tokens 4, 5, 1, 2: min(4, 0), min(5, -2), min(1, 6), min(2, 4).
    assert q.tolist() == [0, -2, 1, 2] and v.tolist() == [-1] * 4
    torch.manual_seed(0)
    told = method.learn_actor(TURNS)
    said = torch.tensor(method.critic.asked[-1], dtype=torch.float)
    expected = torch.minimum(said, 8 - 2 * said) + 1
    assert told["advantage"].item() == pytest.approx(expected.mean().item())
    assert told["advantage_std"].item() == pytest.approx(expected.std(correction=0).item())


def every_utterance() -> list[list[int]]:
    """Of at most two tokens: END, or any other token and then whatever."""
    others = [t for t in range(VOCABULARY) if t != END]
    return [[END], *([a, b] for a, b in itertools.product(others, range(VOCABULARY)))]


def worth_of(said: list[int]) -> float:
    """Depends on both tokens, and on when it ends."""
    return math.sin(1.7 * said[0] + (0.9 * said[1] if len(said) > 1 else 5.0))


def gradient(loss: Tensor, method: ArCHer) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, method.model.trained)])


@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
@pytest.mark.parametrize("baseline", [False, True])
def test_the_actors_gradient_is_that_of_the_expected_return(
    kl_weight: float, baseline: bool
) -> None:
    """Over all utterances, each with its probability: the gradient of (1 - c) E[A] - c KL."""
    method = method_of(kl_weight=kl_weight, token_baseline=baseline)
    torch.manual_seed(2)
    shaken(method.model.trained, 0.1)  # Away from the reference.
    said = every_utterance()
    turns = Turns.of([turn([2, 3], u) for u in said])
    advantage = torch.tensor([worth_of(u) for u in said])
    logp, _ = method._scores(turns)
    probability = logp.sum(-1).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5), "the end token is counted"
    values = method._token_values(turns).detach() if baseline else None
    terms = method.actor_terms(turns, logp, advantage, values)
    ours = gradient((probability.detach() * terms).sum(), method)
    mask = turns.said_mask
    expected = (probability * advantage).sum()
    logp, _ = method._scores(turns)
    total = logp.sum(-1)
    objective = (total.exp() * advantage).sum()
    if kl_weight:
        reference = method._reference.log_prob(turns.tokens, turns.token_mask, mask).sum(-1)
        divergence = (total.exp() * (total - reference)).sum()
        assert divergence > 0.005
        objective = (1 - kl_weight) * objective - kl_weight * divergence
    torch.testing.assert_close(ours, -gradient(objective, method), rtol=1e-3, atol=1e-5)
    assert expected.isfinite()


def test_a_baseline_is_subtracted_token_by_token() -> None:
    method = method_of(token_baseline=True)
    logp = torch.tensor([[0.0, 0.0, -1.0, -2.0, 0.0]])
    baseline = torch.tensor([[9.0, 9.0, 0.5, 3.0, 9.0]])
    turns = Turns.of([turn([2, 3], [4, END])]).index(slice(0, 1))
    turns = replace(turns, tokens=torch.nn.functional.pad(turns.tokens, (0, 1)))
    terms = method.actor_terms(turns, logp, torch.tensor([2.0]), baseline)
    # -[(2 - 0.5) * -1 + (2 - 3) * -2]
    assert terms.tolist() == [1.5 - 2.0]


def test_awr_by_hand() -> None:
    method = method_of(actor_loss="awr", inverse_temperature=2.0)
    logp = torch.tensor([[0.0, 0.0, -1.0, -2.0]] * 3)
    turns = Turns.of([turn([2, 3], [4, END])] * 3)
    terms = method.actor_terms(turns, logp, torch.tensor([0.5, -1.0, 1e3]))
    assert terms[:2].tolist() == pytest.approx([3 * math.e, 3 * math.exp(-2)])
    assert terms[2].isfinite()
    method.critic = Table(lambda i, t: t, lambda i, t: 0)
    method.learn_actor(TURNS)
    assert method.critic.asked[-1] == [4, 5, 1, 2], "of what was said, not of what would be"


def test_the_model_comes_to_say_what_the_critic_likes() -> None:
    """And only the model moves."""
    method = method_of(actor_learning_rate=3e-3)
    method.critic = Table(lambda i, t: 1.0 if t == 4 else 0.0, lambda i, t: 0.3)
    before = snapshot(method.target_critic)
    turns = Turns.of([turn([2, 3], [5, END])] * 64)
    rate = lambda: float(  # noqa: E731
        method._scores(Turns.of([turn([2, 3], [4])]))[0].sum().detach().exp()
    )
    first = rate()
    torch.manual_seed(0)
    for _ in range(30):
        told = method.learn_actor(turns)
    assert rate() > max(2 * first, 0.6)
    assert not any(moved(method.target_critic, before))
    assert told["utterance_tokens"] <= 2 and 0 < told["entropy"] < math.log(VOCABULARY)


def test_the_baseline_of_tokens_learns_the_advantage() -> None:
    method = method_of(token_baseline=True, critic_learning_rate=1e-2, actor_learning_rate=1e-9)
    method.critic = Table(lambda i, t: 3.0, lambda i, t: 1.0)
    before = snapshot(method.model)
    for _ in range(25):
        told = method.learn_actor(TURNS)
    assert told["baseline_loss"] < 0.05
    values = method._token_values(TURNS)[TURNS.said_mask]
    torch.testing.assert_close(values, torch.full_like(values, 2.0), atol=0.5, rtol=0)
    distance = max(
        float((p - q).detach().abs().max())
        for p, q in zip(method.model.parameters(), before, strict=True)
    )
    assert distance < 1e-6, "the baseline has weights of its own"


def test_a_value_of_a_token_does_not_see_it() -> None:
    values = TokenValue(twin_of(body_of(llama())))
    tokens = torch.tensor([[2, 3, 4, 5]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    other = torch.tensor([[2, 3, 6, 5]])
    one, two = values(tokens, mask), values(other, mask)
    torch.testing.assert_close(one[:, :3], two[:, :3])
    assert (one[:, 3] - two[:, 3]).abs() > 1e-4 and one[0, 0] == 0
    torch.testing.assert_close(values.after(tokens, mask)[:, :-1], one[:, 1:])


# ---- one iteration


def test_an_iteration_waits_before_it_moves_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(warmup=2, critic_updates=3, actor_updates=2)
    calls: list[str] = []
    for name in ("learn_critic", "learn_actor"):
        kept = getattr(method, name)
        monkeypatch.setattr(
            method, name, lambda turns, kept=kept, name=name: (calls.append(name), kept(turns))[1]
        )
    before = snapshot(method.model)
    told = method.update(replay(), 1)
    assert calls == ["learn_critic"] * 3 and not any(moved(method.model, before))
    assert "advantage" not in told
    calls.clear()
    told = method.update(replay(), 2)
    assert calls == ["learn_critic"] * 3 + ["learn_actor"] * 2
    assert any(moved(method.model, before))
    assert all(value.dim() == 0 and not value.requires_grad for value in told.values())


def test_what_it_writes_has_the_probability_that_it_learns() -> None:
    method = method_of()
    prompts = Prompts(
        tokens=torch.tensor([[0, 2, 3]] * 2 + [[2, 3, 4]]),
        mask=torch.tensor([[False, True, True]] * 2 + [[True] * 3]),
        row=torch.arange(3),
    )
    torch.manual_seed(0)
    first = method.propose(prompts, 0)
    turns = Turns.of([turn([2, 3], [4])] * 2 + [turn([2, 3, 4], [4])]).answered(first)
    logp, _ = method._scores(turns)
    torch.testing.assert_close(logp.sum(-1), first.logp.sum(-1), rtol=1e-4, atol=1e-4)
    torch.manual_seed(0)
    assert torch.equal(method.propose(prompts, 0).tokens, first.tokens)
    assert method.decoding.temperature == 1 and method.decoding.max_new_tokens == 2


# ---- what it is compared with


def test_chai_says_what_the_target_critic_likes_best() -> None:
    method = method_of(learner="chai", num_candidates=40)
    method.target_critic = Table(lambda i, t: t if i else -((t - 3) ** 2), lambda i, t: 0)
    method.critic = Table(lambda i, t: -t, lambda i, t: 0)
    prompts = torch.tensor([[2, 3], [3, 4], [5, 5]])
    mask = torch.ones_like(prompts, dtype=torch.bool)
    told = method.write(prompts, mask, [1, 2, 3], method.decoding)
    assert told.tokens[:, 2].tolist() == [3, 3, 3] and told.group.tolist() == [0, 1, 2]
    assert told.tokens[:, :2].tolist() == prompts.tolist()
    greedy = method.write(prompts, mask, [1, 2, 3], replace(method.decoding, temperature=0.0))
    assert greedy.tokens[:, 2].tolist() == [3, 3, 3]
    assert not hasattr(method, "actor_opt")
    before = snapshot(method.model)
    method = method_of(learner="chai")
    method.update(replay(), 9)
    assert not any(moved(method.model, before)), "its model stays as it is"


def test_filtered_cloning_imitates_the_best_episodes() -> None:
    method = method_of(learner="filtered_cloning", best_share=0.5, actor_updates=20)
    best, worst = TURNS.index(slice(0, 2)), TURNS.index(slice(2, 4))
    score = lambda turns: method._scores(turns)[0].sum().item()  # noqa: E731
    before = score(best), score(worst)
    torch.manual_seed(0)
    told = method.update(replay(), 0)
    assert score(best) > before[0] + 1 and score(best) - before[0] > score(worst) - before[1]
    assert told["cutoff"] == 4.0 and not hasattr(method, "critic")


def test_cloning_is_the_mean_over_tokens() -> None:
    method = method_of(learner="filtered_cloning")
    logits = method.model.model(input_ids=TURNS.tokens, attention_mask=TURNS.token_mask.long())
    labels = TURNS.tokens.masked_fill(~TURNS.said_mask, -100)[:, 1:]
    expected = nn.functional.cross_entropy(logits.logits[:, :-1].transpose(1, 2), labels)
    assert method.imitate(TURNS)["cloning_loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def slow_advantages(
    rows: list[tuple[float, list[float], float, bool, bool]], discount: float, lambda_: float
) -> list[float]:
    """Token by token as a plain decision process, whose episodes are taken one by one."""
    found: list[float] = []
    episode: list[tuple[float, float, float]] = []  # reward, value, discount of each token
    for reward, values, following, terminated, truncated in rows:
        for k, value in enumerate(values):
            last = k == len(values) - 1
            episode.append((reward if last else 0.0, value, discount if last else 1.0))
        if terminated or truncated:
            tail = 0.0 if terminated else following
            values_after = [value for _, value, _ in episode[1:]] + [tail]
            for start in range(len(episode)):
                total, weight = 0.0, 1.0
                for (paid, value, d), after in list(zip(episode, values_after, strict=True))[
                    start:
                ]:
                    total += weight * (paid + d * after - value)
                    weight *= d * lambda_
                found.append(total)
            episode = []
    return found


@pytest.mark.parametrize(("discount", "lambda_"), [(1.0, 1.0), (0.9, 0.8), (0.5, 0.0)])
def test_advantages_of_tokens_against_a_slow_loop(discount: float, lambda_: float) -> None:
    rows = [
        (1.0, [0.5, -0.2], 7.0, False, False),
        (2.0, [0.1, 0.3, 0.9], 7.0, True, False),
        (-1.0, [0.4], 7.0, False, False),
        (0.5, [0.2, 0.6], 3.0, False, True),
        (4.0, [1.0], 7.0, True, True),
    ]
    width, value = 4, torch.full((5, 4), 99.0)
    mask = torch.zeros(5, width, dtype=torch.bool)
    for row, (_, values, *_) in enumerate(rows):
        mask[row, 1 : 1 + len(values)] = True
        value[row, 1 : 1 + len(values)] = torch.tensor(values)
    reward, following = (torch.tensor([row[k] for row in rows]) for k in (0, 2))
    terminated, truncated = (torch.tensor([row[k] for row in rows]) for k in (3, 4))
    found = token_advantages(
        reward, value, following, mask, terminated, truncated, discount, lambda_
    )
    expected = slow_advantages(rows, discount, lambda_)  # type: ignore[arg-type]
    torch.testing.assert_close(found[mask], torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert (found[~mask] == 0).all()
    if discount == lambda_ == 1.0:  # Returns to come less values.
        assert found[0, 1].item() == pytest.approx(3.0 - 0.5)
        assert found[2, 1].item() == pytest.approx(-1.0 + 0.5 + 3.0 - 0.4)


def test_ppo_prefers_what_paid() -> None:
    method = method_of(learner="ppo", epochs=3, critic_learning_rate=1e-3, actor_learning_rate=3e-3)
    paid = [turn([2, 3], [4, END], 1.0, next_prompt=[], terminated=True, episode_return=1.0)]
    unpaid = [turn([2, 3], [5, END], 0.0, next_prompt=[], terminated=True)]
    turns = Turns.of(paid * 4 + unpaid * 4)
    score = lambda: [  # noqa: E731
        method._scores(Turns.of(x))[0].sum().item() for x in (paid, unpaid)
    ]
    before = score()
    told = method.update(replay(turns), 0)
    after = score()
    assert after[0] > before[0] and after[1] < before[1]
    assert {"entropy", "clip_fraction", "value_loss"} == set(told)
    assert not hasattr(method, "critic")


def test_ppos_values_learn_the_returns() -> None:
    """Half of the utterances that begin here are paid 1, the others 0."""
    method = method_of(
        learner="ppo", epochs=30, critic_learning_rate=1e-2, actor_learning_rate=1e-9
    )
    end = {"next_prompt": [], "terminated": True}
    turns = Turns.of([turn([2, 3], [4, END], 1.0, **end), turn([2, 3], [5, END], 0.0, **end)])
    method.update(replay(turns), 0)
    values = method._token_values(turns)
    assert values[:, 2].tolist() == pytest.approx([0.5, 0.5], abs=0.1)
    assert values[:, 3].tolist() == pytest.approx([1.0, 0.0], abs=0.1)


def test_ppo_learns_from_the_newest_turns_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of(learner="ppo")
    held = replay()
    held.add(TURNS.index(slice(0, 2)))
    seen: list[Turns] = []
    monkeypatch.setattr(method, "learn_tokens", lambda turns: seen.append(turns) or [])
    method.update(held, 0)
    assert seen[0].reward.tolist() == [1.0, 3.0]


# ---- encoders


def test_a_vector_ignores_padding_and_sees_the_whole_text() -> None:
    encoder = TextEncoder(twin_of(body_of(llama())))
    tokens = torch.tensor([[2, 3, 4, 0, 0], [2, 3, 4, 5, 6]])
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    found = encoder(tokens, mask)
    alone = encoder(tokens[:1, :3], mask[:1, :3])
    torch.testing.assert_close(found[:1], alone)
    state = encoder.model(input_ids=tokens[:1, :3]).last_hidden_state[0, -1]
    torch.testing.assert_close(found[0], state)
    for place in range(3):
        other = tokens.clone()
        other[0, place] = 6
        assert (encoder(other, mask)[0] - found[0]).abs().max() > 1e-3


def tiny_roberta(pooled: bool = True) -> tuple[Any, Any]:
    """An encoder with a tokenizer of its own, which knows fewer letters."""
    import transformers

    tokenizer = character_tokenizer("abc")
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=14,
        pad_token_id=tokenizer.pad_token_id,
    )
    tokenizer.model_max_length = 10
    return transformers.RobertaModel(config, add_pooling_layer=pooled), tokenizer


def unpooled() -> tuple[Any, Any]:
    return tiny_roberta(pooled=False)


@pytest.mark.parametrize("pooled", [True, False])
def test_an_encoder_with_words_of_its_own(pooled: bool) -> None:
    torch.manual_seed(0)
    model, own = tiny_roberta(pooled)
    theirs = character_tokenizer("cbaxyz")
    encoder = TextEncoder(model.eval(), theirs, own)
    texts = ["ab", "c" * 13, ""]
    ids = [[*theirs(text)["input_ids"], theirs.eos_token_id] for text in texts]
    width = max(map(len, ids))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    mask = torch.tensor([[k < len(row) for k in range(width)] for row in ids])
    found = encoder(tokens, mask)
    for row, text in enumerate(["ab", "c" * 10, "</s>"]):
        output = model(**own(text, return_tensors="pt"))
        expected = output.pooler_output if pooled else output.last_hidden_state[:, 0]
        torch.testing.assert_close(found[row], expected[0], rtol=1e-4, atol=1e-5)


def test_two_texts_are_encoded_apart() -> None:
    torch.manual_seed(0)
    critic = TwinTextCritic(TextEncoder(twin_of(body_of(llama()))))
    q, v = critic(TURNS.seen(), TURNS.said())
    assert q.mean.shape == v.mean.shape == (2, 4)
    torch.testing.assert_close(critic.value(*TURNS.seen()).mean, v.mean)
    state, said = critic.encoder(*TURNS.seen()), critic.encoder(*TURNS.said())
    for member in (0, 1):
        x = torch.cat([state, said], -1)
        for layer in range(3):
            x = x @ critic.q.weights[layer][member] + critic.q.biases[layer][member]
            x = x.relu() if layer < 2 else x
        torch.testing.assert_close(q.mean[member], x.squeeze(-1), rtol=1e-4, atol=1e-5)
    assert (q.mean[0] - q.mean[1]).abs().min() > 1e-5, "the twins begin apart"


def test_with_adapters_the_critic_shares_what_is_frozen() -> None:
    method = method_of(llama(adapters=True))
    frozen = {id(p) for p in method.model.parameters() if not p.requires_grad}
    for critic in (method.critic, method.target_critic):
        shared = [p for n, p in critic.named_parameters() if id(p) in frozen]
        assert len(shared) >= 14
        own = [n for n, p in critic.named_parameters() if id(p) not in frozen]
        assert own and all("lora" in n or n.startswith(("q.", "v.")) for n in own)
        assert sorted(critic.state_dict()) == sorted(own)
    ours = {id(p) for p in method.model.trained}
    assert not ours & {id(p) for p in method.critic.parameters()}
    before = {n: snapshot(getattr(method, n)) for n in ("model", "critic", "target_critic")}
    method.update(replay(), 0)
    for name, old in before.items():
        parameters = list(getattr(method, name).parameters())
        changed = moved(getattr(method, name), old)
        assert any(changed), name
        assert not any(c for c, p in zip(changed, parameters, strict=True) if id(p) in frozen)
    other = method_of(llama(adapters=True))
    other.load_state_dict(method.state_dict())
    q, v = method.critic(TURNS.seen(), TURNS.said())
    q_2, v_2 = other.critic(TURNS.seen(), TURNS.said())
    assert torch.equal(q.mean, q_2.mean) and torch.equal(v.mean, v_2.mean)


# ---- whole runs


def changed(**settings: Any) -> esscher.Experiment:
    found = smoke("archer")
    return replace(found, method=replace(found.method, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"critic": f"{__name__}:tiny_roberta"},
        {"critic": f"{__name__}:unpooled", "actor_loss": "awr", "value_target": "expectile"},
        {"token_baseline": True, "kl_weight": 0.1},
        {"learner": "ppo"},
        {"learner": "chai"},
        {"learner": "filtered_cloning"},
    ],
    ids=lambda s: "-".join(map(str, s.values())).replace(f"{__name__}:", ""),
)
def test_every_variant_resumes_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = changed(**settings)
    stage = replace(found.stages[-1], steps=4)
    found = replace(
        found, stages=(stage,), checkpoint=esscher.CheckpointConfig(every=2), seed=3,
        evaluation=esscher.EvaluationConfig(every=0, episodes=2),
    )  # fmt: skip
    train(found, tmp_path / "whole")
    train_until(found, tmp_path / "cut", 2, monkeypatch)
    esscher.resume(tmp_path / "cut", display=False)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


def logged() -> list[dict[str, Any]]:
    """Two doors: whoever says ax at both is paid."""
    rows = []
    for said in ("ax", "by", "zz"):
        paid = float(said == "ax")
        rows.append({"observation": "0\n", "action": said, "reward": paid, "done": False,
                     "next_observation": f"0\n{said}\n1\n"})  # fmt: skip
        rows.append(
            {"observation": f"0\n{said}\n1\n", "action": said, "reward": paid, "done": True}
        )
    return rows


def test_it_learns_from_logged_turns_alone(tmp_path: Path) -> None:
    found = changed(episodes=0, actor_loss="awr", value_target="expectile", inverse_temperature=3.0,
                    batch_size=32, micro_batch_size=32, critic_updates=10, actor_updates=5)  # fmt: skip
    stage = replace(found.stages[-1], data=f"{__name__}:logged", steps=12)
    found = replace(
        found, stages=(stage,), evaluation=esscher.EvaluationConfig(every=0, episodes=2)
    )
    train(found, tmp_path / "run")
    rows = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows and '"return_mean"' in rows[-1]
    loaded = esscher.load(tmp_path / "run")
    tokenizer = loaded.policy.tokenizer
    score = {}
    for said in ("ax", "by", "zz"):
        ids = tokenizer("0\n")["input_ids"], [*tokenizer(said)["input_ids"], tokenizer.eos_token_id]
        turns = Turns.of([turn(*ids)])
        score[said] = loaded.method._scores(turns)[0].sum().item()
    assert score["ax"] > max(score["by"], score["zz"]) + 1, score


def test_it_opens_two_doors(tmp_path: Path) -> None:
    """From guesses (1/6 of 2) to nearly always right, without noise, in a few seconds."""
    found = recipes("archer")["doors"]()
    stage = found.stages[-1]
    text = replace(stage.text, game_kwargs={"doors": 2, "noise": 0.0})
    found = replace(
        found,
        method=replace(found.method, warmup=3, critic_updates=20, actor_updates=10, batch_size=64,
                       critic_learning_rate=3e-3, actor_learning_rate=3e-3),
        stages=(replace(stage, text=text, steps=15),),
        evaluation=esscher.EvaluationConfig(every=0, episodes=40, deterministic=False),
        log=esscher.LogConfig(to=()),
    )  # fmt: skip
    result = train(found, tmp_path / "run")
    assert result.evaluation.mean > 1.6 and result.evaluation.measure == "return"
    assert set(result.evaluation.lengths) == {2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"actor_loss": "awr", "kl_weight": 0.1}, "actor_loss awr takes neither"),
        ({"actor_loss": "awr", "token_baseline": True}, "actor_loss awr takes neither"),
        ({"tau": 0.0}, r"tau must be in \(0, 1\], got 0.0"),
        ({"expectile": 0.4}, r"expectile must be in \[0.5, 1\)"),
        ({"episodes": -1}, "episodes must be >= 0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Config(**settings)


def test_what_cannot_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="episodes 0 leaves nothing to learn from"):
        train(changed(episodes=0), tmp_path / "a")
    with pytest.raises(UserError, match=r"--method.critic .* cannot be read"):
        train(changed(critic=str(tmp_path)), tmp_path / "b")
    found = changed(max_new_tokens=64)
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        train(found, tmp_path / "c")
    runtime = SimpleNamespace(world=2, rank=0)
    spec = TextSpec(model=method_of().model, tokenizer=None, max_length=16)
    with pytest.raises(UserError, match="in one process"):
        ArCHer(Config(), spec, runtime)  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


def test_the_paths_of_a_run_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "encoder").mkdir()
    monkeypatch.chdir(tmp_path)
    assert Config(critic="encoder").resolved().critic == str(tmp_path / "encoder")
    assert Config(critic="some/name").resolved().critic == "some/name"
    found = smoke("archer")
    stage = found.stages[-1]
    stage = replace(stage, text=replace(stage.text, game="textworld:encoder"))
    game = replace(found, stages=(stage,)).resolved().stages[-1].text.game
    assert game == f"textworld:{tmp_path / 'encoder'}"


def test_parts_share_no_weights() -> None:
    parts = runner._Parts(smoke("archer"))
    parts.close()
    method = parts.method
    groups = [
        {p.data_ptr() for p in module.parameters()}
        for module in (method.model, method.critic, method.target_critic)
    ]
    assert all(not a & b for a, b in itertools.combinations(groups, 2))
