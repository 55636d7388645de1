"""DCG-MAP-Elites: similarity and target by hand, offspring against networks one at a time, and who
is stored, inserted and asked.
"""

import math
from typing import Any

import pytest
import torch
from torch import nn

import esscher
from esscher.adapters.episodes import EpisodeRunner
from esscher.errors import UserError
from esscher.experiment import EnvConfig
from esscher.methods.diversity.dcg_map_elites import (
    Config,
    DCGMAPElites,
    line_variation,
    similarity,
)
from esscher.registry import recipes
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Candidates, DescribedTransitions, Episodes, Spec, Transitions
from support import smoke, train

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")
LINE = Spec(
    obs_shape=(1,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,),
    descriptor_low=(0.0,), descriptor_high=(4.0,),
)  # fmt: skip
PLAIN: dict[str, Any] = {
    "cells": (8,), "num_variation": 3, "num_gradient": 2, "num_actor_evaluations": 2,
    "updates_per_iteration": 2, "gradient_steps": 3, "hidden": (8,), "policy_hidden": (4,),
    "batch_size": 4, "buffer_size": 100,
}  # fmt: skip


def build(spec=LINE, seed=0, **settings) -> DCGMAPElites:
    torch.manual_seed(seed)
    return DCGMAPElites(Config(**{**PLAIN, **settings}), spec, Runtime(RUNTIME))


def linear(**settings) -> DCGMAPElites:
    """Q = (3 a + 2 d' + 1, -3 a + d' + 4), pi = tanh(2 s + d'); targets as well."""
    method = build(hidden=(), **settings)
    sees = method.cfg.conditioning
    with torch.no_grad():
        for critic in (method.critic, method.target_critic):
            first, second = [0.0, 2.0, 3.0], [0.0, 1.0, -3.0]
            if sees == "none":
                first, second = [0.0, 3.0], [0.0, -3.0]
            critic.net.weights[0].copy_(torch.tensor([first, second])[..., None])
            critic.net.biases[0].copy_(torch.tensor([[[1.0]], [[4.0]]]))
        for actor in (method.actor, method.target_actor):
            weight = [[2.0], [1.0]] if sees == "both" else [[2.0]]
            actor.net.weights[0].copy_(torch.tensor(weight))
            actor.net.biases[0].zero_()
    return method


def rows(count: int, **columns) -> DescribedTransitions:
    """Zeros, but for what is given."""
    zero, no = torch.zeros(count, 1), torch.zeros(count, dtype=torch.bool)
    plain: dict[str, Any] = {
        "obs": zero, "action": zero, "reward": zero[:, 0], "next_obs": zero, "terminated": no,
        "truncated": no, "achieved": zero, "requested": zero,
    }  # fmt: skip
    return DescribedTransitions(**{**plain, **columns})


def copy(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def moved(module: nn.Module, before: list[torch.Tensor]) -> list[bool]:
    return [not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True)]


# ---- formulas


@pytest.mark.parametrize(
    ("lengthscale", "value"), [(0.008, 7.2e-28), (0.48, 0.3529), (0.1, 0.00674)]
)
def test_similarity_by_hand(lengthscale, value):
    # The two are 0.4 and 0.3 apart, so 0.5 in all.
    found = similarity(torch.tensor([[0.5, -0.25]]), torch.tensor([[0.1, 0.05]]), lengthscale)
    assert found.item() == pytest.approx(value, rel=2e-3)
    assert found.item() == pytest.approx(math.exp(-0.5 / lengthscale), rel=1e-4)


def test_similarity_is_one_at_home():
    place = torch.rand(5, 3)
    assert similarity(place, place, 0.01).tolist() == [1.0] * 5


def test_line_variation_by_hand(monkeypatch):
    one, two = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [1.0, -1.0]])
    # One draw an offspring goes along the line, one a number stands alone.
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.tensor([[2.0], [-1.0]]))
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.tensor([[1.0, -1.0], [0.0, 3.0]]))
    found = line_variation(one, two, iso_sigma=0.1, line_sigma=0.5)
    # (1 + 0.1 + 0.5 x 2 x 2, 2 - 0.1 + 0), (0 + 0 - 0.5 x 1, 0 + 0.3 + 0.5 x 1).
    torch.testing.assert_close(found, torch.tensor([[3.1, 1.9], [-0.5, 0.8]]))


def test_target_by_hand():
    method = linear(discount=0.5, target_noise=0.0)
    next_obs = torch.tensor([[0.0], [0.25], [0.0]])
    requested = torch.tensor([[0.5], [-0.5], [0.5]])
    terminated = torch.tensor([False, False, True])
    found = method.critic_target(torch.tensor([1.0, 2.0, 7.0]), next_obs, terminated, requested)
    # a = tanh(0.5) = 0.46211716: Q = (3.38635, 3.11365), y = 1 + 0.5 x 3.11365.
    # a = tanh(0.5 - 0.5) = 0: Q = (0, 3.5), y = 2 + 0. And the reward alone at the end.
    torch.testing.assert_close(found, torch.tensor([2.556824, 2.0, 7.0]), rtol=0, atol=1e-5)


def test_target_noise_is_clipped_and_so_is_the_action(monkeypatch):
    method = linear(discount=1 - 1e-7, target_noise=0.2, target_noise_clip=0.5)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.tensor([[1.0], [4.0], [1.0]]))
    next_obs = torch.tensor([[0.0], [0.0], [3.0]])
    zero = torch.zeros(3, 1)
    found = method.critic_target(zero[:, 0], next_obs, zero[:, 0].bool(), zero)
    # a = 0.2: min(1.6, 3.4); a = 0.5: min(2.5, 2.5); a = tanh(6) + 0.2, clipped to 1: min(4, 1).
    torch.testing.assert_close(found, torch.tensor([1.6, 2.5, 1.0]), rtol=0, atol=1e-5)


def test_rewards_are_scaled_by_the_similarity_of_what_was_achieved():
    method = linear(lengthscale=0.1, policy_delay=100)
    away, ended = torch.tensor([[0.1], [0.0]]), torch.ones(2, dtype=torch.bool)
    batch = rows(2, reward=torch.tensor([2.0, 2.0]), terminated=ended, achieved=away)
    loss = method.update(batch, 0)["critic_loss"].item()
    # y = 2 / e and 2; Q = (1, 4) at a = d' = 0.
    first = (1 - 2 / math.e) ** 2 + (4 - 2 / math.e) ** 2
    assert loss == pytest.approx((first + (1 - 2) ** 2 + (4 - 2) ** 2) / 2, rel=1e-5)


def test_without_conditioning_rewards_are_what_they_are():
    method = linear(lengthscale=0.1, conditioning="none", negatives="none", policy_delay=100)
    ended = torch.ones(1, dtype=torch.bool)
    batch = rows(1, reward=torch.tensor([2.0]), terminated=ended, achieved=torch.tensor([[0.9]]))
    assert method.update(batch, 0)["critic_loss"].item() == pytest.approx(1 + 4, rel=1e-5)


def test_cut_off_rows_do_not_count_but_are_counted():
    method = linear(discount=0.0, policy_delay=100)
    cut = torch.tensor([True, False])
    batch = rows(2, reward=torch.tensor([50.0, 2.0]), truncated=cut)
    assert method.update(batch, 0)["critic_loss"].item() == pytest.approx((1 + 4) / 2, rel=1e-5)


def test_shuffled_negatives_are_half_a_batch():
    method = linear(discount=0.0, negatives="shuffled", lengthscale=1.0, policy_delay=100)
    places = torch.tensor([[0.0], [1.0], [0.5], [-0.5]])
    batch = rows(4, reward=torch.ones(4), achieved=places, requested=places)
    loss = method.update(batch, 0)["critic_loss"].item()
    # The first two are asked for each other's place, 1 away; Q = (2 d' + 1, d' + 4).
    asked, scale = [1.0, 0.0, 0.5, -0.5], [math.exp(-1)] * 2 + [1.0] * 2
    errors = [(2 * d + 1 - s) ** 2 + (d + 4 - s) ** 2 for d, s in zip(asked, scale, strict=True)]
    assert loss == pytest.approx(sum(errors) / 4, rel=1e-5)


# ---- who moves


def test_who_moves_when():
    method = build(policy_delay=2)
    parts = {n: getattr(method, n) for n in ("actor", "critic", "target_actor", "target_critic")}
    before = {name: copy(module) for name, module in parts.items()}
    draw = torch.Generator().manual_seed(0)
    batch = rows(4, obs=torch.randn(4, 1, generator=draw), reward=torch.randn(4, generator=draw))
    method.update(batch, 0)
    assert all(moved(method.critic, before["critic"]))
    assert all(moved(method.target_critic, before["target_critic"]))
    assert not any(moved(method.actor, before["actor"]))
    assert not any(moved(method.target_actor, before["target_actor"]))
    method.update(batch, 1)
    assert any(moved(method.actor, before["actor"]))
    assert any(moved(method.target_actor, before["target_actor"]))


def test_targets_move_by_tau():
    method = build(tau=0.25, policy_delay=1)
    before = {n: copy(getattr(method, n)) for n in ("target_critic", "target_actor")}
    method.update(rows(4, obs=torch.randn(4, 1), reward=torch.ones(4)), 0)
    for name in ("critic", "actor"):
        targets = getattr(method, f"target_{name}").parameters()
        for new, source, old in zip(
            targets, getattr(method, name).parameters(), before[f"target_{name}"], strict=True
        ):
            torch.testing.assert_close(new, 0.75 * old + 0.25 * source)


def test_the_actor_climbs_the_first_critic_and_moves_alone():
    method = linear()
    obs, requested = torch.randn(16, 1), torch.rand(16, 1) * 2 - 1
    before, critic = method.actor(torch.cat([obs, requested], 1)).mode(), copy(method.critic)
    for _ in range(5):
        method.actor_opt.minimize(method.actor_loss(obs, requested))
    after = method.actor(torch.cat([obs, requested], 1)).mode()
    # Q_1 rises with the action, and Q_2 falls.
    assert after.mean() > before.mean()
    assert not any(moved(method.critic, critic))


def test_asked_for_a_place_it_learns_to_go_there():
    """One step, reward 1, and the place is the action: the best answer to d' is d'."""
    method = build(
        hidden=(32, 32), lengthscale=0.5, actor_learning_rate=3e-3, critic_learning_rate=3e-3
    )
    draw = torch.Generator().manual_seed(0)
    ended = torch.ones(256, dtype=torch.bool)
    for step in range(600):
        action = torch.rand(256, 1, generator=draw) * 2 - 1
        requested = torch.rand(256, 1, generator=draw) * 2 - 1
        batch = rows(
            256, action=action, reward=torch.ones(256), terminated=ended, achieved=action,
            requested=requested,
        )  # fmt: skip
        method.update(batch, step)
    asked = torch.linspace(-0.8, 0.8, 9)[:, None]
    answers = method.actor(torch.cat([torch.zeros(9, 1), asked], 1)).mode()
    assert (answers - asked).abs().max().item() < 0.15


# ---- offspring by gradients


class Handed:
    """States that are dealt out in order."""

    def __init__(self, batches: list[torch.Tensor]):
        self.batches = batches

    def sample_obs(self, size: int) -> torch.Tensor:
        batch = self.batches.pop(0)
        assert len(batch) == size
        return batch


def test_climbing_all_at_once_is_climbing_alone():
    method = build(gradient_steps=4, policy_learning_rate=0.01, hidden=(6,))
    genotype = method._network.random(2)
    requested = torch.tensor([[0.5], [-0.8]])
    dealt = [torch.randn(8, 1) for _ in range(4)]
    found = method.climbed(genotype, requested, Handed([x.clone() for x in dealt]))
    (w1, b1), (w2, b2) = ((w[0], b[0]) for w, b in zip(
        method.critic.net.weights, method.critic.net.biases, strict=True
    ))  # fmt: skip
    for k in range(2):
        g = genotype[k]
        own = [g[:4].view(4, 1), g[4:8], g[8:12].view(1, 4), g[12:13]]
        own = [x.clone().requires_grad_() for x in own]
        adam = torch.optim.Adam(own, lr=0.01)
        for batch in dealt:
            states = batch[4 * k : 4 * k + 4]
            action = torch.tanh(torch.relu(states @ own[0].T + own[1]) @ own[2].T + own[3])
            seen = torch.cat([states, requested[k].expand(4, 1), action], 1)
            value = torch.relu(seen @ w1 + b1) @ w2 + b2
            adam.zero_grad()
            (-value.mean()).backward()
            adam.step()
        alone = torch.cat([x.detach().flatten() for x in own])
        assert not torch.equal(alone, genotype[k])
        torch.testing.assert_close(found[k], alone, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad


def test_climbing_leads_where_the_parent_already_goes():
    """A critic that wants actions of the sign of d': two equal policies part."""
    method = build(gradient_steps=30, policy_learning_rate=0.05)

    class Wants(nn.Module):
        def first(self, seen: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
            return (seen[:, 1:] * action).squeeze(1)

    method.critic = Wants()  # type: ignore[assignment]
    genotype = method._network.random(1).expand(2, -1).clone()
    dealt = [torch.randn(8, 1) for _ in range(30)]
    climbed = method.climbed(genotype, torch.tensor([[1.0], [-1.0]]), Handed(dealt))
    obs = torch.linspace(-1, 1, 5)[:, None].expand(2, 5, 1)
    actions = torch.tanh(method._network(climbed, obs)).squeeze(-1)
    assert (actions[0] > 0.5).all() and (actions[1] < -0.5).all()


def test_injected_policies_act_as_the_actor_that_is_asked():
    method = build(
        num_injected=2, negatives="offspring", hidden=(6, 5), policy_hidden=(6, 5),
        activation="tanh", policy_activation="tanh",
    )  # fmt: skip
    with torch.no_grad():
        for bias in method.actor.net.biases:
            bias.normal_()
    requested = torch.tensor([[0.7], [-0.2], [0.0]])
    genotype = method.injected(requested)
    obs = torch.randn(3, 4, 1)
    own = torch.tanh(method._network(genotype, obs))
    for k in range(3):
        asked = method.actor(torch.cat([obs[k], requested[k].expand(4, 1)], 1)).mode()
        torch.testing.assert_close(own[k], asked)
    assert not genotype.requires_grad


# ---- an iteration


def episodes(descriptor: list[float], reward: list[float], length: int = 2) -> Episodes:
    count = len(descriptor)
    individual = torch.arange(count).repeat_interleave(length)
    ends = torch.arange(count * length) % length == length - 1
    return Episodes(
        transitions=Transitions(
            obs=torch.rand(count * length, 1),
            action=torch.rand(count * length, 1),
            reward=torch.tensor(reward)[individual],
            next_obs=torch.rand(count * length, 1),
            terminated=ends,
            truncated=torch.zeros_like(ends),
        ),
        individual=individual,
        fitness=torch.tensor(reward) * length,
        length=torch.full((count,), length),
        descriptor=torch.tensor(descriptor)[:, None],
    )


def candidates(method: DCGMAPElites, intended: list[float], requested: list[float]) -> Candidates:
    return Candidates(
        genotype=method._network.random(len(intended)),
        intended=torch.tensor(intended)[:, None],
        requested=torch.tensor(requested)[:, None],
    )


def stored(experience: Any) -> dict[str, torch.Tensor]:
    (found,) = experience.rows(0, experience.num_added)
    return {name: value.squeeze(-1) for name, value in found.items()}


def test_what_is_stored_and_who_enters():
    method = build()
    experience = method.experience()
    asked = candidates(method, [math.nan, math.nan, 0.25], [-0.5])
    method.tell(asked, episodes([0.2, 1.0, 3.0, 4.0], [1.0, 2.0, 3.0, 9.0]), experience)
    found = stored(experience)
    # From [0, 4] to [-1, 1]; offspring were meant to do what they did, the actor was not.
    torch.testing.assert_close(
        found["achieved"], torch.tensor([-0.9, -0.9, -0.5, -0.5, 0.5, 0.5, 1.0, 1.0])
    )
    torch.testing.assert_close(
        found["requested"], torch.tensor([-0.9, -0.9, -0.5, -0.5, 0.5, 0.5, -0.5, -0.5])
    )
    assert found["reward"].tolist() == [1, 1, 2, 2, 3, 3, 9, 9]
    # The actor's episode is the best, and enters no archive.
    elites = method.archive.elites()
    assert elites.fitness.tolist() == [2, 4, 6]
    torch.testing.assert_close(elites.descriptor[:, 0], torch.tensor([0.2, 1.0, 3.0]))
    assert torch.equal(elites.genotype, asked.genotype)
    obs = torch.randn(5, 1)
    own = torch.tanh(method._network(asked.genotype[2:], obs[None]))[0]
    torch.testing.assert_close(method.policy(obs).mode(), own)
    assert method.num_updates == 2


def test_later_form_counts_offspring_as_asked_for_their_parents_place():
    method = build(negatives="offspring")
    experience = method.experience()
    asked = candidates(method, [math.nan, 0.25], [])
    method.tell(asked, episodes([1.0, 1.0], [1.0, 1.0]), experience)
    assert stored(experience)["requested"].tolist() == [-0.5, -0.5, 0.25, 0.25]


def test_an_offset_makes_rewards_permitted():
    method = build(reward_offset=1.5)
    experience = method.experience()
    method.tell(candidates(method, [math.nan], []), episodes([1.0], [-1.0]), experience)
    assert stored(experience)["reward"].tolist() == [0.5, 0.5]
    assert method.archive.elites().fitness.tolist() == [1.0]
    with pytest.raises(UserError, match="paid -1, .*reward-offset to 1 or more"):
        method = build()
        method.tell(candidates(method, [math.nan], []), episodes([1.0], [-1.0]), experience)


def test_negative_rewards_become_nothing_where_that_is_wanted():
    method = build(reward_offset=0.5, negative_rewards="clip")
    experience = method.experience()
    asked = candidates(method, [math.nan, math.nan], [])
    method.tell(asked, episodes([1.0, 3.0], [-1.0, 2.0]), experience)
    assert stored(experience)["reward"].tolist() == [0, 0, 2.5, 2.5]
    assert method.archive.elites().fitness.tolist() == [0, 5]


def test_descriptors_out_of_bounds():
    method = build()
    with pytest.raises(UserError, match=r"outside \[0, 4\]"):
        method.tell(candidates(method, [math.nan], []), episodes([4.5], [1.0]), method.experience())
    method = build(out_of_bounds="clip")
    method.tell(candidates(method, [math.nan], []), episodes([4.5], [1.0]), method.experience())
    assert method.archive.elites().descriptor.item() == 4


def test_more_steps_than_the_replay_holds():
    method = build(buffer_size=6)
    experience = method.experience()
    reward = [float(k) for k in range(5)]
    method.tell(candidates(method, [math.nan] * 5, []), episodes([1.0] * 5, reward), experience)
    assert len(experience) == 6
    assert sorted(experience.sample(200).reward.unique().tolist()) == [2, 3, 4]


def test_whom_it_asks():
    method = build(num_variation=3, num_gradient=2, num_actor_evaluations=4, request_noise=0.0)
    experience = method.experience()
    first = method.ask(experience)
    assert first.genotype.shape == (5, method._network.size) and len(first.requested) == 0
    assert first.intended.isnan().all() and len(first) == 5
    assert len(first.genotype.unique(dim=0)) == 5
    places = [0.2, 1.0, 1.8, 2.6, 3.4]
    method.tell(first, episodes(places, [1.0] * 5), experience)
    then = method.ask(experience)
    assert len(then.genotype) == 5 and len(then.requested) == 4 and len(then) == 9
    assert then.intended.isnan().flatten().tolist() == [True] * 3 + [False] * 2
    known = torch.tensor([p / 2 - 1 for p in places])
    for asked in torch.cat([then.intended[3:], then.requested]).flatten():
        assert (known - asked).abs().min() < 1e-6
    noisy = build(request_noise=0.3, num_actor_evaluations=500)
    noisy.tell(noisy.ask(experience), episodes([2.0] * 5, [1.0] * 5), noisy.experience())
    filled = noisy.experience()
    filled.add(rows(10))
    assert noisy.ask(filled).requested.std().item() == pytest.approx(0.3, rel=0.1)


def test_everyone_plays_for_himself():
    method = build()
    asked = candidates(method, [math.nan] * 3, [0.5, -0.5])
    obs = torch.randn(5, 1)
    actions = method.play(asked, obs)
    for k in range(3):
        alone = torch.tanh(method._network(asked.genotype[k : k + 1], obs[k].view(1, 1, 1)))
        torch.testing.assert_close(actions[k], alone.flatten())
    for k, request in ((3, 0.5), (4, -0.5)):
        seen = torch.tensor([[obs[k].item(), request]])
        torch.testing.assert_close(actions[k], method.actor(seen).mode()[0])


def test_map_elites_is_variation_alone():
    method = build(num_variation=4, num_gradient=0, updates_per_iteration=0)
    experience = method.experience()
    before = copy(method.critic)
    first = method.ask(experience)
    (report,) = method.tell(first, episodes([0.2, 1.0, 1.8, 2.6], [1.0] * 4), experience)
    assert set(report) == {"qd_score", "coverage", "max_fitness"}
    then = method.ask(experience)
    assert len(then.genotype) == 4 and len(then.requested) == 0 and then.intended.isnan().all()
    assert method.num_updates == 0 and len(experience) == 0
    assert not any(moved(method.critic, before))


# ---- what it gives


def test_a_policy_for_every_behaviour():
    method = build()
    asked = candidates(method, [math.nan] * 3, [])
    method.tell(asked, episodes([0.2, 1.0, 3.0], [1.0, 5.0, 2.0]), method.experience())
    obs = torch.randn(6, 1)
    for descriptor, which in (([0.3], 0), ([1.4], 1), ([4.0], 2)):
        own = torch.tanh(method._network(asked.genotype[which : which + 1], obs[None]))[0]
        torch.testing.assert_close(method.elite_for(descriptor)(obs).mode(), own)
    wanted = method.actor(torch.cat([obs, torch.full((6, 1), 0.5)], 1)).mode()
    torch.testing.assert_close(method.actor_for([3.0])(obs).mode(), wanted)
    torch.testing.assert_close(method.reproduce(torch.full((6, 1), 3.0), obs), wanted)
    unasked = build(conditioning="none", negatives="none")
    with pytest.raises(UserError, match="cannot be asked"):
        unasked.actor_for([1.0])
    with pytest.raises(UserError, match="archive is empty"):
        unasked.elite_for([1.0])


def test_a_run_leaves_its_archive_and_a_picture(tmp_path):
    train(smoke("dcg_map_elites"), tmp_path / "run")
    assert (tmp_path / "run/figures/archive.png").read_bytes()[:4] == b"\x89PNG"
    method = esscher.load(tmp_path / "run").method
    rows = [r for r in (tmp_path / "run/metrics.jsonl").read_text().splitlines() if "qd_score" in r]
    assert f'"qd_score": {method.archive.summary()["qd_score"].item()}' in rows[-1]
    # What the archive says of an elite, it does again.
    judge = EpisodeRunner(EnvConfig(id="esscher.envs:PointMass"), 0)
    elites = method.archive.elites()
    nobody = elites.descriptor[:0]
    again = Candidates(genotype=elites.genotype, intended=elites.descriptor, requested=nobody)
    found = judge(lambda obs: method.play(again, obs), len(elites), 0)
    torch.testing.assert_close(found.descriptor, elites.descriptor)
    torch.testing.assert_close(found.fitness, elites.fitness)


# ---- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates_per_iteration": 0}, "untrained critic has nothing to teach"),
        ({"num_injected": 1}, "policy_hidden and policy_activation as hidden"),
        ({"conditioning": "none"}, "negatives actor needs an actor that can be asked"),
        ({"conditioning": "critic", "negatives": "offspring"}, "needs an actor that can be asked"),
        ({"num_variation": 0, "num_gradient": 0}, "num_variation"),
        ({"lengthscale": 0.0}, "lengthscale must be > 0"),
        ({"cells": ()}, "cells"),
        ({"position_bound": 0.0}, "position_bound"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(UserError, match=message):
        Config(**{**PLAIN, **settings})


def test_a_task_that_describes_nothing(tmp_path):
    with pytest.raises(UserError, match="does not describe its episodes"):
        train(smoke("dcg_map_elites", env_id="Pendulum-v1"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_recipes_of_the_family():
    made = {name: recipe().method for name, recipe in recipes("dcg_map_elites").items()}
    assert made["map_elites"].updates_per_iteration == made["map_elites"].num_gradient == 0
    assert made["pga_map_elites"].conditioning == "none"
    assert (made["dcrl"].num_injected, made["dcrl"].negatives) == (64, "offspring")
    offspring = {
        name: c.num_variation + c.num_gradient + c.num_injected for name, c in made.items()
    }
    for name in ("paper", "map_elites", "pga_map_elites", "dcrl"):
        assert offspring[name] == 256


def test_the_handed_class_is_like_a_replay():
    """The stub above deals what `Replay.sample_obs` gives: so many rows of observations."""
    experience = build().experience()
    experience.add(rows(10, obs=torch.arange(10.0)[:, None]))
    torch.manual_seed(0)
    found = experience.sample_obs(1000)
    assert found.shape == (1000, 1)
    assert set(found.flatten().tolist()) == set(range(10))
