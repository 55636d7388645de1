"""Games of several agents through the adapter: shapes, order, ends, refusals, exact state."""

from typing import ClassVar

import numpy as np
import pytest
import torch
from gymnasium import spaces
from pettingzoo import AECEnv, ParallelEnv

from esscher.adapters.gymnasium import Environments, make
from esscher.adapters.pettingzoo import JointEnv
from esscher.controller import Controller
from esscher.errors import UserError
from esscher.experiment import EnvConfig
from esscher.games import Gems, RandomGame
from support import learner


class Echo(ParallelEnv):
    """Two agents whose observations are of lengths 1 and 2 and tell what was done last."""

    metadata: ClassVar[dict] = {"name": "echo"}

    def __init__(self, counts=(3, 3), starts=(0, 0), leaver=None, mask=False, box=False):
        self.possible_agents, self.agents = ["left", "right"], []
        self.counts, self.starts, self.leaver = counts, starts, leaver
        self.mask, self.box = mask, box
        self.time = 0

    def observation_space(self, agent):
        space = spaces.Box(-9.0, 9.0, (1 if agent == "left" else 2,))
        return spaces.Dict({"observation": space, "action_mask": space}) if self.mask else space

    def action_space(self, agent):
        k = self.possible_agents.index(agent)
        if self.box:
            return spaces.Box(-1.0, 1.0, (1,))
        return spaces.Discrete(self.counts[k], start=self.starts[k])

    def reset(self, seed=None, options=None):
        self.agents, self.time = list(self.possible_agents), 0
        return self._observe({"left": -1, "right": -2}), {agent: {} for agent in self.agents}

    def step(self, actions):
        self.time += 1
        rewards = {"right": 10.0 * actions["right"], "left": 1.0 * actions["left"]}
        over = self.time == 3
        terminations = dict.fromkeys(self.agents, over and self.leaver != "cut")
        truncations = dict.fromkeys(self.agents, over and self.leaver == "cut")
        if self.leaver in self.possible_agents:
            terminations[self.leaver] = True
        return self._observe(actions), rewards, terminations, truncations, {}

    def _observe(self, values):
        left, right = values["left"], values["right"]
        # In another order than possible_agents, as games may.
        return {
            "right": np.array([right, self.time], np.float32),
            "left": np.array([left], np.float32),
        }


class Turns(AECEnv):
    """One after another; perhaps with everybody's choice known only at the end of a round."""

    def __init__(self, parallelizable=False):
        super().__init__()
        self.metadata = {"name": "turns", "is_parallelizable": parallelizable}
        self.render_mode = None
        self.possible_agents = ["a", "b"]

    def observation_space(self, agent):
        return spaces.Box(-9.0, 9.0, (1,))

    def action_space(self, agent):
        return spaces.Discrete(2)

    def observe(self, agent):
        return np.array([self.total], np.float32)

    def reset(self, seed=None, options=None):
        self.agents = list(self.possible_agents)
        self.rewards = dict.fromkeys(self.agents, 0.0)
        self._cumulative_rewards = dict(self.rewards)
        self.terminations = dict.fromkeys(self.agents, False)
        self.truncations = dict.fromkeys(self.agents, False)
        self.infos = {agent: {} for agent in self.agents}
        self.total, self.pending, self.agent_selection = 0, 0, "a"

    def step(self, action):
        self.pending += action
        last = self.agent_selection == "b"
        self.rewards = dict.fromkeys(self.agents, 0.0)
        if last:
            self.total, self.pending = self.total + self.pending, 0
            self.rewards = {"a": 1.0, "b": 3.0}
        self.agent_selection = "a" if last else "b"


def solo():
    game = Echo()
    game.possible_agents = ["left"]
    return game


def test_observations_stand_in_the_order_of_agents_filled_up_with_zeros():
    env = JointEnv(Echo(), "echo")
    assert env.observation_space.shape == (4,) and env.num_agents == 2
    assert env.action_space == spaces.MultiDiscrete([3, 3])
    obs, _ = env.reset(seed=0)
    assert obs.tolist() == [-1, 0, -2, 0]
    obs, reward, terminated, truncated, info = env.step(np.array([1, 2]))
    assert obs.tolist() == [1, 0, 2, 1] and obs.dtype == np.float32
    assert reward == pytest.approx((1 + 20) / 2) and not terminated and not truncated
    assert info["agent_rewards"].tolist() == [1, 20]


@pytest.mark.parametrize("how", ["over", "cut"])
def test_termination_and_truncation_of_all(how):
    env = JointEnv(Echo(leaver=how), "echo")
    env.reset()
    ends = [env.step(np.array([0, 0]))[2:4] for _ in range(3)]
    assert ends[:2] == [(False, False)] * 2
    assert ends[2] == ((True, False) if how == "over" else (False, True))


def test_a_vector_of_games_has_a_spec_and_labels_of_its_own():
    config = EnvConfig(id="test_pettingzoo:Shifted", num=2, max_episode_steps=2)
    envs = Environments(config, 0)
    spec = envs.spec
    assert (spec.obs_shape, spec.action_shape) == ((4,), (2,))
    assert (spec.num_actions, spec.num_agents, spec.action_start) == (3, 2, 5)
    torch.manual_seed(0)
    actions = torch.cat([envs.random_actions() for _ in range(100)])
    assert actions.shape == (200, 2) and set(actions.unique().tolist()) == {0, 1, 2}
    assert not torch.equal(actions[:, 0], actions[:, 1])
    envs.reset(0)
    outcome = envs.step(torch.tensor([[0, 2], [1, 1]]), 0)
    # Labels begin at 5: (5, 7) and (6, 6).
    assert outcome.next_obs.tolist() == [[5, 0, 7, 1], [6, 0, 6, 1]]
    assert outcome.reward.tolist() == [37.5, 33.0]
    outcome = envs.step(torch.tensor([[0, 2], [1, 1]]), 1)
    assert outcome.truncated.all() and not outcome.terminated.any()
    assert outcome.next_obs[0].tolist() == [5, 0, 7, 2] and outcome.obs[0].tolist() == [
        -1,
        0,
        -2,
        0,
    ]
    assert outcome.episodes == [(75.0, 2), (66.0, 2)]
    envs.close()


def Shifted():
    return Echo(starts=(5, 5))


@pytest.mark.parametrize(
    ("game", "words"),
    [
        (lambda: Echo(counts=(3, 4)), "different actions"),
        (lambda: Echo(starts=(0, 1)), "different actions"),
        (lambda: Echo(mask=True), "action_mask"),
        (lambda: Echo(box=True), "only Discrete is supported"),
        (Turns, "one after another"),
        (solo, "fewer than two agents"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(game, words):
    with pytest.raises(UserError, match=words):
        JointEnv(game(), "echo")


@pytest.mark.parametrize("leaver", ["left", "right"])
def test_an_agent_that_leaves_alone_is_refused(leaver):
    env = JointEnv(Echo(leaver=leaver), "echo")
    env.reset()
    with pytest.raises(UserError, match="left while others stayed"):
        env.step(np.array([0, 0]))


def test_rounds_in_which_all_choose_before_anyone_sees_are_converted():
    env = JointEnv(Turns(parallelizable=True), "turns")
    env.reset()
    obs, reward, *_ = env.step(np.array([1, 1]))
    assert obs.tolist() == [2, 2] and reward == 2.0


def test_a_game_by_its_module_name():
    config = EnvConfig(id="pettingzoo:mpe2.simple_spread_v3", kwargs={"N": 2, "max_cycles": 3})
    envs = Environments(config, 0)
    assert envs.spec.num_agents == 2 and envs.spec.num_actions == 5
    assert envs.inexact_because() is not None
    obs = envs.reset(0)
    assert obs.shape == (1, envs.spec.obs_dim) and np.array_equal(obs, envs.reset(0))
    for step in range(3):
        outcome = envs.step(envs.random_actions(), step)
    assert outcome.truncated.all() and outcome.episodes[0][1] == 3
    envs.close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pettingzoo:no.such.game", "cannot be imported"),
        ("pettingzoo:json", "neither parallel_env nor env"),
        ("test_pettingzoo:dict", "returned a dict|cannot be imported"),
    ],
)
def test_a_name_that_leads_nowhere_says_so(name, words):
    with pytest.raises(UserError, match=words):
        make(EnvConfig(id=name))


def test_a_method_of_one_agent_refuses_games():
    envs = Environments(EnvConfig(id="esscher.games:RandomGame", max_episode_steps=3), 0)
    for slug in ("ppo", "sac"):
        with pytest.raises(UserError, match="trains one agent, and this task has 2: use mamql"):
            learner(slug, envs.spec)
    envs.close()


def test_a_deployed_policy_gives_one_label_an_agent():
    envs = Environments(EnvConfig(id="esscher.games:RandomGame", max_episode_steps=3), 0)
    controller = Controller(learner("mamql", envs.spec).policy, envs.spec)
    one, _ = controller.predict(envs.reset(0)[0])
    many, _ = controller.predict(np.repeat(envs.reset(0), 4, 0))
    assert one.shape == (2,) and many.shape == (4, 2) and (many == one).all()
    envs.close()


# ---- the games themselves


@pytest.mark.parametrize("task", ["RandomGame", "Gems"])
def test_the_state_of_a_game_is_saved_and_put_back(task):
    envs = Environments(EnvConfig(id=f"esscher.games:{task}", num=2, max_episode_steps=7), 1)
    assert envs.inexact_because() is None
    envs.reset(0)
    actions = [envs.random_actions() for _ in range(12)]
    for step in range(5):
        envs.step(actions[step], step)
    state = envs.state_dict()
    first = [envs.step(actions[step], step) for step in range(5, 12)]
    envs.load_state_dict(state)
    again = [envs.step(actions[step], step) for step in range(5, 12)]
    for one, two in zip(first, again, strict=True):
        assert np.array_equal(one.obs, two.obs) and np.array_equal(one.reward, two.reward)
        assert one.episodes == two.episodes
    envs.close()


def put(game, first, second, left=7):
    game.reset(seed=0)
    game.state_number = (first * game.cells + second) * 8 + left


def test_gems_are_earned_by_whom_they_belong_to_and_once():
    game = Gems(size=3, seed=0)
    blue, red, purple = game.gems.tolist()
    away = next(cell for cell in range(9) if cell not in (blue, red, purple))
    stay = {"agent_0": 4, "agent_1": 4}
    cases = [
        ((blue, away), (1, 0)),
        ((away, blue), (0, 0)),
        ((away, red), (0, 1)),
        ((red, away), (0, 0)),
        ((purple, away), (0, 0)),
        ((purple, purple), (3, 3)),
        ((blue, red), (1, 1)),
    ]
    for places, expected in cases:
        put(game, *places)
        seen, rewards, *_ = game.step(stay)
        assert tuple(rewards.values()) == expected, places
        again = tuple(game.step(stay)[1].values())
        assert again == (0, 0), "what was earned is gone"
        planes = seen["agent_0"].reshape(5, 9)
        assert planes[0].argmax() == places[0] and planes[1].argmax() == places[1]
        assert planes[:2].sum() == 2
        assert planes[2:].sum() == 3 - (sum(expected) if expected != (3, 3) else 1)


def test_moves_and_walls():
    game = Gems(size=3, seed=0)
    centre = 4
    for action, cell in enumerate([5, 3, 7, 1, 4]):
        put(game, centre, centre, left=0)
        game.step({"agent_0": action, "agent_1": 4})
        assert game.state_number == (cell * 9 + centre) * 8
    put(game, 8, 0, left=0)
    game.step({"agent_0": 0, "agent_1": 3})
    assert game.state_number == (8 * 9 + 0) * 8


def test_agents_do_not_share_their_observations():
    game = Gems()
    seen, _ = game.reset(seed=0)
    seen["agent_0"][:] = 5.0
    assert seen["agent_1"].max() == 1.0
    assert game.step({"agent_0": 4, "agent_1": 4})[0]["agent_0"].max() == 1.0


def test_expected_returns_agree_with_episodes_that_were_played():
    game = RandomGame(seed=2)
    logp = game.equilibrium.logp
    exact = game.expected_returns(logp, 5)
    draw = np.random.default_rng(0)
    probs, total, episodes = logp.exp().numpy(), np.zeros(2), 800
    game.reset(seed=0)
    squares = np.zeros(2)
    for _ in range(episodes):
        game.reset()
        earned = np.zeros(2)
        for _ in range(5):
            state = game.state_number
            levels = draw.random((2, 1))
            choices = (probs[:, state].cumsum(-1) < levels).sum(-1)
            chosen = dict(zip(game.agents, choices.tolist(), strict=True))
            earned += list(game.step(chosen)[1].values())
        total, squares = total + earned, squares + earned**2
    mean = total / episodes
    error = np.sqrt((squares / episodes - mean**2) / episodes)
    assert (np.abs(mean - exact.numpy()) < 4 * error).all() and (error < 0.2).all()


def test_discounted_returns_agree_with_the_values_of_the_equilibrium():
    """V is the discounted return plus the policy's entropy over lambda, so without it V is larger."""
    game = RandomGame(seed=1)
    found = game.equilibrium
    entropy = -(found.logp.exp() * found.logp).sum(-1)
    plain = game.reward
    # Adding what the entropy is worth to the rewards makes the return equal to the mean of V.
    game.reward = plain + entropy.unsqueeze(-1) / game.inverse_temperature
    returns = game.expected_returns(found.logp, 400, game.discount)
    torch.testing.assert_close(returns, found.value.mean(1), rtol=1e-8, atol=1e-8)
