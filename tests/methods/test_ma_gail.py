"""MA-GAIL and MA-AIRL: every loss against numpy loops, who moves when, and optima that are known.

The networks are tables: no hidden layers, one-hot observations of three states for each of two agents
with two actions. So what a network says of agent g in state s is an entry of its table.
"""

import numpy as np
import pytest
import torch

from esscher import datasets
from esscher.errors import UserError
from esscher.experience import Dataset, OfflineReplay
from esscher.methods.control.ma_gail import MAGAIL, Batch, Config, JointChoices
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.types import Action, Rollout, Spec, Transitions

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")
SPEC = Spec(obs_shape=(6,), action_shape=(2,), num_actions=2, num_agents=2)
DISCOUNT, LAMBDA = 0.9, 0.8

LOGITS = np.array([[[1.0, -0.5], [0.2, 0.7], [-1.0, 0.3]], [[0.4, 0.1], [2.0, -1.0], [0.0, 0.6]]])
CHOICES = np.array([[[0.3, 1.5], [-0.2, 0.4], [0.9, -1.1]], [[1.4, -0.1], [0.3, -0.8], [0.5, 2.6]]])
POTENTIAL = np.array([[0.7, -0.4, 1.1], [-0.6, 0.2, 0.9]])
VALUES = np.array([[2.0, -1.0, 0.5], [0.3, 1.7, -2.2]])

# Rows are (state, (choice of agent 0, choice of agent 1), next state, terminated, truncated).
EXPERT = [
    (0, (0, 1), 1, False, False),
    (1, (1, 0), 2, False, True),
    (2, (1, 1), 0, True, False),
]
OWN = [(1, (0, 0), 0, False, False), (2, (0, 1), 1, True, False), (0, (1, 1), 2, False, True)]


def observe(states):
    return torch.eye(3)[torch.tensor(states)].repeat(1, 2)


def rows(table, reward=float("nan")):
    states, actions, following, terminated, truncated = zip(*table, strict=True)
    return Transitions(
        obs=observe(states),
        action=torch.tensor(actions),
        reward=torch.full((len(table),), reward),  # Whoever reads it will be noticed.
        next_obs=observe(following),
        terminated=torch.tensor(terminated),
        truncated=torch.tensor(truncated),
    )


def as_rollout(steps, num_envs=1):
    """Row t * num_envs + n is step t of environment n."""
    columns = {k: v.unflatten(0, (-1, num_envs)) for k, v in steps.fields().items()}
    return Rollout(**columns, extras={})


def put(net, table):
    with torch.no_grad():
        net.weights[0].copy_(torch.tensor(table))
        net.biases[0].zero_()


def tabular(reward="gail", spec=SPEC, **settings):
    torch.manual_seed(0)
    common = {
        "hidden": (),
        "discount": DISCOUNT,
        "gae_lambda": LAMBDA,
        "batch_size": 3,
        "rollout_length": 6,
        "num_minibatches": 2,
        "cloning_steps": 0,
        "head_start": 0,
    }
    method = MAGAIL(Config(reward=reward, **{**common, **settings}), spec, Runtime(RUNTIME))
    agents = slice(0, spec.num_agents)
    put(method.actor.net, LOGITS[agents])
    put(method.critic.net, VALUES[agents, :, None])
    put(method.discriminator.choices, CHOICES[agents])
    if reward == "airl":
        put(method.discriminator.potential, POTENTIAL[agents, :, None])
    return method


def probability(agent, state, choice):
    weights = np.exp(LOGITS[agent, state])
    return weights[choice] / weights.sum()


def of_expert(reward, agent, row):
    """D, literally."""
    state, choices, following, terminated, _ = row
    if reward == "gail":
        return 1 / (1 + np.exp(-CHOICES[agent, state, choices[agent]]))
    f = CHOICES[agent, state, choices[agent]] - POTENTIAL[agent, state]
    if not terminated:
        f += DISCOUNT * POTENTIAL[agent, following]
    return np.exp(f) / (np.exp(f) + probability(agent, state, choices[agent]))


def parts(method):
    return {"actor": method.actor, "critic": method.critic, "discriminator": method.discriminator}


def copies(method):
    return {n: [p.detach().clone() for p in m.parameters()] for n, m in parts(method).items()}


def moved(method, before):
    """Which of the networks are not what they were."""
    now = copies(method)
    return {n for n in now if not all(map(torch.equal, now[n], before[n]))}


def demonstrations(table=EXPERT, size=3, name="three steps"):
    data = Dataset(transitions=rows(table), step=torch.zeros(len(table)).long(), name=name)
    return OfflineReplay(data, size)


# ---- discriminators


@pytest.mark.parametrize("reward", ["gail", "airl"])
def test_discriminator_loss_against_loops(reward):
    loss, report = tabular(reward).discriminator_loss(rows(EXPERT), rows(OWN))
    expected = []
    for agent in range(2):
        seen = np.mean([np.log(of_expert(reward, agent, row)) for row in EXPERT])
        own = np.mean([np.log(1 - of_expert(reward, agent, row)) for row in OWN])
        expected.append(-seen - own)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-5)
    assert report["discriminator_loss"].item() == pytest.approx(sum(expected), rel=1e-5)


def test_discriminator_loss_by_hand():
    """D = 3/4 on the expert's step and 1/5 on the agent's: -log(3/4) - log(4/5) = log(5/3)."""
    method = tabular(spec=Spec(obs_shape=(3,), action_shape=(), num_actions=2))
    put(method.discriminator.choices, np.log([[[3.0, 1 / 4], [1.0, 1.0], [1.0, 1.0]]]))
    one = {"obs": torch.eye(3)[:1], "next_obs": torch.eye(3)[:1], "reward": torch.zeros(1)}
    ends = {"terminated": torch.tensor([False]), "truncated": torch.tensor([False])}
    seen, own = (Transitions(action=torch.tensor([a]), **one, **ends) for a in (0, 1))
    assert method.discriminator_loss(seen, own)[0].item() == pytest.approx(np.log(5 / 3))


@pytest.mark.parametrize("reward", ["gail", "airl"])
def test_what_agents_are_paid_is_log_d_less_log_of_the_rest(reward):
    d = np.array([[of_expert(reward, agent, row) for row in EXPERT + OWN] for agent in range(2)])
    found = tabular(reward).logit(rows(EXPERT + OWN))
    np.testing.assert_allclose(found.detach(), np.log(d) - np.log(1 - d), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reward", ["gail", "airl"])
def test_discriminators_come_to_prefer_the_expert(reward):
    method = tabular(reward, discriminator_learning_rate=0.1)
    contrary = [(s, (1 - one, 1 - two), *rest) for s, (one, two), *rest in EXPERT]
    for _ in range(300):
        method.discriminate(rows(EXPERT), rows(contrary))
    assert (method.logit(rows(EXPERT)) > 1).all() and (method.logit(rows(contrary)) < -1).all()


def test_a_terminated_step_has_no_potential_ahead_and_a_truncated_one_has():
    method = tabular("airl")
    before = method.logit(rows(EXPERT)).detach()
    shifted = POTENTIAL.copy()
    shifted[:, 0] += 10  # Where the terminated step leads, and where the first begins.
    shifted[:, 2] += 100  # Where the truncated step leads, and where the terminated one begins.
    put(method.discriminator.potential, shifted[:, :, None])
    change = (method.logit(rows(EXPERT)) - before).detach()
    np.testing.assert_allclose(change, [[-10, 90, -100]] * 2, rtol=1e-5)


def test_airl_ends_up_at_the_log_policy_of_the_expert():
    """One step, three states: against policies of any kind, f = log pi_expert, and so g is."""
    method = tabular("airl", discriminator_learning_rate=0.02)
    # The expert chooses 0 in 1 of 4, 2 of 4 and 3 of 4; the agents 0 in 3 of 4, 2 of 4 and 1 of 4.
    counts = {"expert": [1, 2, 3], "own": [3, 2, 1]}
    table = {
        who: [
            (s, (choice, 1 - choice), s, True, False)
            for s in range(3)
            for choice in [0] * zeros[s] + [1] * (4 - zeros[s])
        ]
        for who, zeros in counts.items()
    }
    share = np.array([[z / 4, 1 - z / 4] for z in counts["own"]])
    put(method.actor.net, np.log(np.stack([share, share[:, ::-1]])))
    seen, own = rows(table["expert"]), rows(table["own"])
    for _ in range(2_000):
        method.discriminate(seen, own)
    expert = np.array([[z / 4, 1 - z / 4] for z in counts["expert"]])
    expected = np.log(np.stack([expert, expert[:, ::-1]]))
    f = method.marginal_reward(observe([0, 1, 2])) - method.discriminator.potential(
        torch.eye(3).expand(2, 3, 3)
    )
    np.testing.assert_allclose(f.detach(), expected, atol=5e-3)


def test_free_discriminators_hold_no_reward():
    with pytest.raises(UserError, match="reward is gail"):
        tabular().marginal_reward(observe([0]))
    found = tabular("airl").marginal_reward(observe([0, 2]))
    np.testing.assert_allclose(found, CHOICES[:, [0, 2]], rtol=1e-6)


# ---- advantages

ROLLOUT = [
    # Two environments, side by side; six steps.
    (0, (0, 1), 1, False, False),
    (2, (1, 1), 0, False, False),
    (1, (1, 1), 2, True, False),
    (0, (0, 0), 2, False, True),
    (1, (0, 0), 0, False, False),
    (1, (1, 0), 2, False, False),
    (0, (1, 0), 2, False, True),
    (2, (0, 0), 1, True, False),
    (2, (1, 1), 1, False, False),
    (0, (1, 1), 1, False, False),
    (1, (1, 0), 0, False, False),
    (1, (0, 1), 2, False, False),
]


@pytest.mark.parametrize("reward", ["gail", "airl"])
def test_advantages_against_loops(reward):
    """Terminated steps are worth what they pay; truncated ones, and the last, are bootstrapped."""
    method = tabular(reward)
    old_logp, advantage, returns = method.columns(as_rollout(rows(ROLLOUT), num_envs=2))
    expected = np.zeros((2, len(ROLLOUT)))
    for agent in range(2):
        for env in range(2):
            carried = 0.0
            for index in reversed(range(env, len(ROLLOUT), 2)):
                state, _, following, terminated, truncated = ROLLOUT[index]
                d = of_expert(reward, agent, ROLLOUT[index])
                ahead = 0.0 if terminated else DISCOUNT * VALUES[agent, following]
                delta = np.log(d / (1 - d)) + ahead - VALUES[agent, state]
                if terminated or truncated:
                    carried = 0.0
                carried = delta + DISCOUNT * LAMBDA * carried
                expected[agent, index] = carried
    np.testing.assert_allclose(advantage, expected, rtol=1e-4, atol=1e-5)
    value = np.array([[VALUES[agent, row[0]] for row in ROLLOUT] for agent in range(2)])
    np.testing.assert_allclose(returns, expected + value, rtol=1e-4, atol=1e-5)
    logp = [
        [np.log(probability(agent, row[0], row[1][agent])) for row in ROLLOUT] for agent in range(2)
    ]
    np.testing.assert_allclose(old_logp, logp, rtol=1e-5)


# ---- policies and values


def test_actor_loss_against_loops():
    """Each agent's advantages are whitened by themselves; ratios past the clip pay no more."""
    method = tabular(entropy_coefficient=0.3, clip=0.2)
    steps = rows(EXPERT)
    shift = np.array([[0.5, -0.1, -0.4], [0.05, 0.6, -0.6]])
    logp = np.array(
        [
            [np.log(probability(agent, row[0], row[1][agent])) for row in EXPERT]
            for agent in range(2)
        ]
    )
    advantage = np.array([[3.0, 1.0, -1.5], [10.0, -30.0, 40.0]])
    loss, report = method.actor_loss(
        steps.obs,
        steps.action,
        torch.tensor(logp - shift, dtype=torch.float32),
        torch.tensor(advantage, dtype=torch.float32),
    )
    expected, entropies = [], []
    for agent in range(2):
        white = (advantage[agent] - advantage[agent].mean()) / advantage[agent].std()
        gain, entropy = 0.0, 0.0
        for k, (state, *_) in enumerate(EXPERT):
            ratio = np.exp(shift[agent, k])
            gain += min(ratio * white[k], np.clip(ratio, 0.8, 1.2) * white[k]) / 3
            probs = [probability(agent, state, choice) for choice in range(2)]
            entropy -= sum(p * np.log(p) for p in probs) / 3
        expected.append(-gain - 0.3 * entropy)
        entropies.append(entropy)
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4)
    assert report["entropy"].item() == pytest.approx(np.mean(entropies), rel=1e-5)
    # KL(old | new) is the mean of r - 1 - log r over the old policy's choices, r = new / old.
    kl = np.mean(np.exp(shift) - 1 - shift)
    assert report["approx_kl"].item() == pytest.approx(kl, rel=1e-4)


def test_critic_loss_by_hand():
    """Values 2, -1, 0.5 and 0.3, 1.7, -2.2 against 1 are off by 1, 2, 0.5 and 0.7, 0.7, 3.2."""
    loss = tabular().critic_loss(observe([0, 1, 2]), torch.ones(2, 3))
    expected = [(1 + 4 + 0.25) / 6, (0.49 + 0.49 + 10.24) / 6]
    np.testing.assert_allclose(loss.detach(), expected, rtol=1e-5)


def test_cloning_loss_against_loops():
    steps, expected = rows(EXPERT), []
    for agent in range(2):
        logp = [np.log(probability(agent, state, choices[agent])) for state, choices, *_ in EXPERT]
        expected.append(-np.mean(logp))
    found = tabular().cloning_loss(steps.obs, steps.action)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-5)


# ---- which parameters


@pytest.mark.parametrize("reward", ["gail", "airl"])
def test_each_loss_reaches_its_own_networks(reward):
    method, steps = tabular(reward), rows(EXPERT)
    columns = [torch.randn(2, 3) for _ in range(2)]
    losses = {
        "discriminator": lambda: method.discriminator_loss(rows(EXPERT), rows(OWN))[0],
        "actor": lambda: method.actor_loss(steps.obs, steps.action, *columns)[0],
        "critic": lambda: method.critic_loss(steps.obs, columns[0]),
    }
    for own, loss in losses.items():
        for name, module in parts(method).items():
            parameters = list(module.parameters())
            found = torch.autograd.grad(loss().sum(), parameters, allow_unused=True)
            if name == own:
                assert all(g is not None and g.abs().max() > 0 for g in found), (own, name)
            else:
                assert all(g is None for g in found), (own, name)


@pytest.mark.parametrize("reward", ["gail", "airl"])
def test_each_step_goes_down_its_own_loss_and_moves_nothing_else(reward):
    """Adam's first step is the learning rate, against the sign of the gradient, for every agent."""
    torch.manual_seed(0)
    steps, columns = rows(EXPERT), [torch.randn(2, 3) for _ in range(3)]
    settings = {"learning_rate": 1e-3, "discriminator_learning_rate": 1e-3}

    def discriminating(method):
        return method.discriminator_loss(rows(EXPERT), rows(OWN))[0]

    def cloning(method):
        return method.cloning_loss(steps.obs, steps.action)

    def acting(method):
        return method.actor_loss(steps.obs, steps.action, *columns[:2])[0]

    def valuing(method):
        return method.critic_loss(steps.obs, columns[2])

    works = [
        (lambda m: m.discriminate(rows(EXPERT), rows(OWN)), {"discriminator": discriminating}),
        (lambda m: m.clone(steps.obs, steps.action), {"actor": cloning}),
        (
            lambda m: m.descend(steps.obs, steps.action, *columns),
            {"actor": acting, "critic": valuing},
        ),
    ]
    for work, losses in works:
        method, before = tabular(reward, **settings), copies(tabular(reward, **settings))
        gradients = {
            name: torch.autograd.grad(loss(method).sum(), list(parts(method)[name].parameters()))
            for name, loss in losses.items()
        }
        work(method)
        assert moved(method, before) == set(losses)
        for name, found in gradients.items():
            for gradient, was, now in zip(found, before[name], copies(method)[name], strict=True):
                sure = gradient.abs() > 1e-4
                expected = -1e-3 * gradient.sign()
                assert all(agent.any() for agent in sure)
                torch.testing.assert_close((now - was)[sure], expected[sure], rtol=1e-2, atol=0)


@pytest.mark.parametrize("reward", ["gail", "airl"])
def test_no_agent_learns_from_another_one(reward):
    method, steps = tabular(reward), rows(EXPERT)
    columns = [torch.randn(2, 3) for _ in range(2)]
    losses = {
        "discriminator": method.discriminator_loss(rows(EXPERT), rows(OWN))[0],
        "actor": method.actor_loss(steps.obs, steps.action, *columns)[0],
        "critic": method.critic_loss(steps.obs, columns[0]),
    }
    for name, loss in losses.items():
        for agent in range(2):
            parameters = list(parts(method)[name].parameters())
            for found in torch.autograd.grad(loss[agent], parameters, retain_graph=True):
                assert found[agent].abs().max() > 0 and found[1 - agent].abs().max() == 0, name


@pytest.mark.parametrize("reward", ["gail", "airl"])
def test_two_agents_are_two_learners_of_one(reward):
    """What each agent's networks say and lose is that of a learner that has its steps alone."""
    both = tabular(reward)
    losses = both.discriminator_loss(rows(EXPERT), rows(OWN))[0]
    spec = Spec(obs_shape=(3,), action_shape=(), num_actions=2)
    for agent in range(2):
        single = tabular(reward, spec=spec)
        for name, module in parts(single).items():
            for parameter, source in zip(
                module.parameters(), parts(both)[name].parameters(), strict=True
            ):
                with torch.no_grad():
                    parameter.copy_(source[agent : agent + 1])
        seen, own = (alone(table, agent) for table in (EXPERT, OWN))
        loss = single.discriminator_loss(seen, own)[0]
        assert loss.item() == pytest.approx(losses[agent].item(), rel=1e-6)
        shared = both.columns(as_rollout(rows(ROLLOUT), num_envs=2))
        columns = single.columns(as_rollout(alone(ROLLOUT, agent), num_envs=2))
        for column, pair in zip(columns, shared, strict=True):
            torch.testing.assert_close(column[0], pair[agent])


def alone(table, agent):
    """What one agent saw and did."""
    whole = rows(table)
    own = {"obs": whole.obs[:, :3], "next_obs": whole.next_obs[:, :3]}
    return Transitions(**{**whole.fields(), **own, "action": whole.action[:, agent]})


# ---- acting


def test_each_agent_sees_its_own_part_of_the_observation():
    obs = torch.cat([torch.eye(3)[[0]], torch.eye(3)[[2]]], 1)
    method = tabular("airl")
    for found, table in (
        (method.actor.logits(obs), LOGITS),
        (method.critic(obs), VALUES),
        (method.marginal_reward(obs), CHOICES),
    ):
        np.testing.assert_allclose(found[:, 0].detach(), [table[0, 0], table[1, 2]], rtol=1e-6)


def test_joint_choices_score_and_entropy_by_hand():
    logits = np.log([[[0.25, 0.75], [0.9, 0.1]], [[0.5, 0.5], [0.2, 0.8]]])
    choices = JointChoices(torch.tensor(logits), (2,))
    assert choices.mode()[1].tolist() == [0, 1] and choices.mode()[0, 0].item() == 1
    logp = choices.log_prob(torch.tensor([[1, 0], [0, 0]]))
    np.testing.assert_allclose(logp, np.log([[0.75, 0.9], [0.5, 0.2]]))
    nats = [[0.25 * np.log(4) + 0.75 * np.log(4 / 3), 0.325083], [np.log(2), 0.500402]]
    np.testing.assert_allclose(choices.entropy(), nats, rtol=1e-5)


def test_policies_are_drawn_independently():
    torch.manual_seed(0)
    drawn = tabular().act(observe([1] * 40_000), explore=True).value
    probs = [probability(agent, 1, 1) for agent in range(2)]
    np.testing.assert_allclose(drawn.double().mean(0), probs, atol=0.01)
    together = (drawn == 1).all(1).double().mean().item()
    assert together == pytest.approx(probs[0] * probs[1], abs=0.01)
    calm = tabular().act(observe([0, 1, 2]), explore=False).value
    assert calm.tolist() == [[0, 0], [1, 0], [1, 1]]


# ---- whole updates


@pytest.mark.parametrize("reward", ["gail", "airl"])
def test_policies_are_pushed_towards_the_expert(reward):
    """One state, and an expert that always does (1, 0), where the agents mostly do not."""
    method = tabular(
        reward, rollout_length=64, learning_rate=0.02, discriminator_learning_rate=0.02
    )
    put(method.actor.net, np.array([[[1.0, -1.0]] * 3, [[-1.0, 1.0]] * 3]))
    put(method.discriminator.choices, np.zeros((2, 3, 2)))
    replay = demonstrations([(0, (1, 0), 0, False, False)] * 3)
    for step in range(40):
        obs = observe([0] * 64)
        action = method.act(obs, explore=True).value
        table = [(0, tuple(pair), 0, False, False) for pair in action.tolist()]
        method.update(Batch(as_rollout(rows(table)), replay), step)
    probs = method.actor.logits(observe([0])).softmax(-1)[:, 0]
    assert probs[0, 1] > 0.85 and probs[1, 0] > 0.85


@pytest.mark.parametrize("reward", ["gail", "airl"])
def test_the_rewards_of_the_task_are_never_read(reward):
    states = []
    for paid in (float("nan"), 1e6):
        method = tabular(reward, cloning_steps=2)
        for step in range(3):
            torch.manual_seed(step)
            own = as_rollout(rows(ROLLOUT[:6], reward=paid))
            metrics = method.update(Batch(own, demonstrations()), step)
            assert all(torch.isfinite(value) for value in metrics.values())
        states.append(method.state_dict())
    for name, value in states[0].items():
        assert not torch.is_tensor(value) or torch.equal(value, states[1][name]), name


def test_first_come_clones_then_discriminators_then_all():
    method = tabular(cloning_steps=3, head_start=2, discriminator_steps=4, epochs=3)
    own = as_rollout(rows(ROLLOUT[:6]))
    expected = [{"actor"}, *[{"discriminator"}] * 2, {"actor", "critic", "discriminator"}]
    for step, names in enumerate(expected):
        before = copies(method)
        method.update(Batch(own, demonstrations()), step)
        assert moved(method, before) == names
    assert method.discriminator_opt.num_steps == 12
    assert method.critic_opt.num_steps == 6 and method.actor_opt.num_steps == 9


def test_without_cloning_the_first_rollout_counts():
    method = tabular(cloning_steps=0, head_start=1)
    for step, names in enumerate([{"discriminator"}, {"actor", "critic", "discriminator"}]):
        before = copies(method)
        method.update(Batch(as_rollout(rows(ROLLOUT[:6])), demonstrations()), step)
        assert moved(method, before) == names


def test_every_step_of_a_rollout_is_learned_from_once_a_pass():
    """And all passes compare with the policies and values as they were when the agents acted."""
    method, seen = tabular(epochs=2, num_minibatches=3, learning_rate=0.1), []
    rollout = as_rollout(rows(ROLLOUT[:6]))
    descend = method.descend

    def record(*minibatch):
        seen.append(minibatch)
        return descend(*minibatch)

    method._descend = record
    method._discriminate = lambda expert, own: {"discriminator_loss": torch.tensor(1.0)}
    columns = torch.stack(method.columns(rollout))
    metrics = method.update(Batch(rollout, demonstrations()), 0)
    assert set(metrics) >= {"discriminator_loss", "actor_loss", "critic_loss", "entropy"}
    assert len(seen) == 6
    states = torch.tensor([row[0] for row in ROLLOUT[:6]])
    choices = torch.tensor([row[1] for row in ROLLOUT[:6]])
    for epoch in (seen[:3], seen[3:]):
        found = torch.cat([torch.stack(minibatch[2:]) for minibatch in epoch], 2)
        # Rows in whatever order: by the first agent's advantage, no two of which are alike.
        order, known = found[1, 0].argsort(), columns[1, 0].argsort()
        torch.testing.assert_close(found[:, :, order], columns[:, :, known])
        obs, action = (torch.cat(column)[order] for column in list(zip(*epoch, strict=True))[:2])
        assert torch.equal(obs[:, :3].argmax(1), states[known])
        assert torch.equal(action, choices[known])


def test_discriminators_see_the_whole_rollout_and_all_demonstrations():
    method, seen = tabular(discriminator_steps=30), []

    def record(expert, own):
        seen.append((expert, own))
        return {"discriminator_loss": torch.tensor(0.0)}

    method._discriminate = record
    method.update(Batch(as_rollout(rows(OWN * 2)), demonstrations()), 0)
    for drawn, table in zip(zip(*seen, strict=True), (EXPERT, OWN), strict=True):
        found = {
            (int(obs[:3].argmax()), tuple(action.tolist()))
            for steps in drawn
            for obs, action in zip(steps.obs, steps.action, strict=True)
        }
        assert found == {row[:2] for row in table}


# ---- what it learns from


def test_a_full_rollout_comes_with_the_demonstrations():
    method = tabular(rollout_length=2, num_minibatches=1)
    dataset = Dataset(transitions=rows(EXPERT), step=torch.tensor([0, 1, 0]), name="three steps")
    experience = method.experience(dataset)
    for table in (EXPERT[:2], OWN[:2]):
        for row in table:
            assert list(experience.batches(0)) == []
            experience.add(rows([row]), Action(value=torch.tensor([row[1]])))
        (found,) = experience.batches(0)
        assert found.rollout.action.tolist() == [[list(row[1])] for row in table]
    drawn = found.demonstrations.sample(50)
    assert {tuple(row) for row in drawn.action.tolist()} == {row[1] for row in EXPERT}
    assert list(experience.batches(2)) == []


def test_other_demonstrations_are_refused_when_a_run_is_resumed():
    def fresh(table, name):
        step = torch.tensor([0, 1, 0])
        return tabular().experience(Dataset(transitions=rows(table, 0.0), step=step, name=name))

    state = fresh(EXPERT, "some").state_dict()
    with pytest.raises(UserError, match="others has changed since the run was saved"):
        fresh(OWN, "others").load_state_dict(state)


def test_more_a_batch_than_there_are_demonstrations_is_refused():
    method = tabular(batch_size=3_001)
    with pytest.raises(UserError, match="batch_size must be in .1, 3000."):
        method.experience(datasets.random_game())


# ---- settings and tasks


def test_continuous_actions_are_refused():
    spec = Spec(obs_shape=(3,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))
    with pytest.raises(UserError, match="ma_gail needs Discrete actions.*continuous"):
        MAGAIL(Config(), spec, Runtime(RUNTIME))


@pytest.mark.parametrize("count", [4, 6])
def test_minibatches_must_divide_a_rollout(count):
    with pytest.raises(UserError, match=f"num_minibatches.*got {count}.*is 6 steps"):
        tabular(num_minibatches=count)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("discriminator_learning_rate", -1e-3),
        ("discriminator_steps", 0),
        ("cloning_steps", -1),
        ("head_start", -1),
        ("discount", 1.0),
        ("gae_lambda", 1.1),
        ("clip", 0.0),
        ("entropy_coefficient", -0.1),
        ("rollout_length", 0),
        ("epochs", 0),
        ("num_minibatches", 0),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(UserError, match=name):
        Config(**{name: value})
