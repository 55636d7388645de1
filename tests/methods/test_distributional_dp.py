"""Distributional dynamic programming: tables against enumeration, the agent's pieces by hand."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

import esscher
from esscher.adapters.gymnasium import Environments, make
from esscher.adapters.stock import StockAugmented, with_stock
from esscher.controller import Controller
from esscher.distributions import Categorical
from esscher.envs import AddToTen, GambleAfterLuck
from esscher.errors import UserError
from esscher.functional.return_functionals import (
    EXCESS,
    HOMEOSTASIS,
    MEAN,
    SHORTFALL,
    TARGET,
    exponential,
)
from esscher.functional.tabular import FiniteMDP, Outcome
from esscher.methods.control.distributional_dp import (
    Config,
    DistributionalDP,
    StockTable,
    atoms_of,
    best_stock,
)
from esscher.runtime.device import Runtime, RuntimeConfig
from esscher.runtime.evaluate import Evaluator
from esscher.types import Spec, Transitions

RUNTIME = RuntimeConfig(device="cpu", threads=1, graph="eager")
GRID = [k / 20 for k in range(-200, 201)]


def two_steps(env):
    """State 0, then state 1, then the end."""
    return FiniteMDP(
        tuple(
            tuple(tuple(Outcome(p, (r,), None if state else 1) for p, r in case) for case in row)
            for state, row in enumerate(env.outcomes)
        )
    )


GAMBLE, TEN = two_steps(GambleAfterLuck), two_steps(AddToTen)


def random_mdp(seed, reward_dim=1, num_states=3):
    """Two actions, two outcomes each, small whole rewards; a move to `num_states` is the end."""
    draw = np.random.default_rng(seed)

    def case():
        share = draw.uniform(0.1, 0.9)
        rows = draw.integers(-3, 4, (2, reward_dim)), draw.integers(0, num_states + 1, 2)
        return tuple(
            Outcome(float(p), tuple(map(float, r)), None if s == num_states else int(s))
            for p, r, s in zip((share, 1 - share), *rows, strict=True)
        )

    return FiniteMDP(tuple((case(), case()) for _ in range(num_states)))


# ---- enumeration, sharing nothing with the library


def tail_mean(law, level):
    """Mean of the worst share of {return: probability}, taking what is needed of the last atom."""
    left, total = level, Fraction(0)
    for value in sorted(law):
        taken = min(left, law[value])
        left, total = left - taken, total + taken * value
    return total / level


def gamble_law(after_loss, after_win, discount):
    """Returns of the gamble by what is done after -4 and after +4."""
    second = {
        "safe": {Fraction(0): Fraction(1)},
        "risky": {Fraction(3): Fraction(3, 4), Fraction(-5): Fraction(1, 4)},
    }
    law = {}
    for first, choice in ((-4, after_loss), (4, after_win)):
        for value, probability in second[choice].items():
            total = first + discount * value
            law[total] = law.get(total, 0) + Fraction(1, 2) * probability
    return law


def best_by_hindsight(mdp, judge, discount, horizon, state, stock):
    """The largest E f(c_0 + G) of all policies that remember every reward: sums, no stocks."""

    def best(time, state, earned):
        if state is None or time == horizon:
            return judge(earned)
        return max(
            sum(
                o.probability
                * best(
                    time + 1,
                    o.next_state,
                    tuple(e + discount**time * r for e, r in zip(earned, o.reward, strict=True)),
                )
                for o in case
            )
            for case in mdp.outcomes[state]
        )

    return best(0, state, tuple(stock))


JUDGES = {
    "mean": (MEAN, lambda x: x[0]),
    "target": (TARGET, lambda x: -abs(x[0])),
    "shortfall": (SHORTFALL, lambda x: min(x[0], 0)),
    "excess": (EXCESS, lambda x: max(x[0], 0)),
    "exponential": (exponential(0.5), lambda x: 2 * (1 - math.exp(-0.5 * x[0]))),
}


# ---- the sheet's table


TABLE = [
    # after -4, after +4, CVaR at discount 1 and 0.9, mean at discount 1
    ("safe", "safe", Fraction(-8, 3), Fraction(-8, 3), 0),
    ("risky", "risky", Fraction(-8, 3), Fraction(-8, 3), 1),
    ("safe", "risky", Fraction(-7, 2), Fraction(-41, 12), Fraction(1, 2)),
    ("risky", "safe", Fraction(-11, 6), Fraction(-23, 12), Fraction(1, 2)),
]


@pytest.mark.parametrize(("loss", "win", "plain", "discounted", "mean"), TABLE)
def test_every_number_of_the_table(loss, win, plain, discounted, mean):
    level = Fraction(3, 5)
    assert tail_mean(gamble_law(loss, win, 1), level) == plain
    assert tail_mean(gamble_law(loss, win, Fraction(9, 10)), level) == discounted
    law = gamble_law(loss, win, 1)
    assert sum(v * p for v, p in law.items()) == mean
    # The tables give the same laws, for the same policy told by stocks.
    for discount, exact in ((1.0, Fraction(1)), (0.9, Fraction(9, 10))):
        table = StockTable(GAMBLE, SHORTFALL, discount, 2, [(0, (-4.0,))])
        lost = {key: key[2][0] < -4 for key in table.keys}
        policy = {k: int((loss if lost[k] else win) == "risky") for k in table.keys}
        found = table.evaluate(policy)[table.starts[0]]
        expected = {float(v): float(p) for v, p in gamble_law(loss, win, exact).items()}
        assert {v[0]: p for v, p in found.items()} == pytest.approx(expected)


@pytest.mark.parametrize(("discount", "exact"), [(1.0, Fraction(1)), (0.9, Fraction(9, 10))])
def test_the_best_stock_is_minus_four_and_its_policy_the_best_of_all(discount, exact):
    found = best_stock(GAMBLE, discount, 2, 0, 0.6, GRID)
    choices = itertools.product(("safe", "risky"), repeat=2)
    best = max(tail_mean(gamble_law(*choice, exact), Fraction(3, 5)) for choice in choices)
    assert found.stock == -4.0
    assert found.cvar == pytest.approx(float(best), abs=1e-12)
    expected = {float(v): float(p) for v, p in gamble_law("risky", "safe", exact).items()}
    assert {v[0]: p for v, p in found.law.items()} == pytest.approx(expected)
    assert found.policy[1, 1, (0.0,)] == 0
    assert found.policy[1, 1, (round(-8 / discount, 9),)] == 1


def test_no_policy_of_the_step_alone_is_better_even_at_random():
    safe, risky = gamble_law("safe", "safe", 1), gamble_law("risky", "risky", 1)
    for share in (Fraction(k, 20) for k in range(21)):
        law = {v: (1 - share) * safe.get(v, 0) + share * risky.get(v, 0) for v in {*safe, *risky}}
        assert tail_mean(law, Fraction(3, 5)) <= Fraction(-8, 3)


def test_the_best_share_of_returns():
    """Upper tail: 7 (3/8) and -1 at random for the rest, by gambling always: 2.4 / 0.6."""
    found = best_stock(GAMBLE, 1.0, 2, 0, 0.6, GRID, tail="upper")
    laws = [gamble_law(*choice, 1) for choice in itertools.product(("safe", "risky"), repeat=2)]
    best = max(-tail_mean({-v: p for v, p in law.items()}, Fraction(3, 5)) for law in laws)
    assert found.cvar == pytest.approx(float(best)) == pytest.approx(4.0)
    assert found.stock == 1.0  # Minus the quantile, -1.


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("level", [0.2, 0.5])
def test_best_stock_on_random_tasks(seed, level):
    """Against every policy that remembers its rewards, two steps, by brute force."""
    mdp, discount = random_mdp(seed, num_states=2), 0.5
    histories = {(): 0}
    for action, outcome in itertools.product(range(2), range(2)):
        following = mdp.outcomes[0][action][outcome].next_state
        if following is not None:
            histories[action, outcome] = following
    best = -math.inf
    for chosen in itertools.product(range(2), repeat=len(histories)):
        policy, law = dict(zip(histories, chosen, strict=True)), {}
        for k, first in enumerate(mdp.outcomes[0][policy[()]]):
            rest = [(1.0, 0.0)]
            if first.next_state is not None:
                case = mdp.outcomes[first.next_state][policy[policy[()], k]]
                rest = [(o.probability, o.reward[0]) for o in case]
            for p, r in rest:
                value = Fraction(first.reward[0]) + Fraction(discount) * Fraction(r)
                law[value] = law.get(value, 0) + Fraction(first.probability) * Fraction(p)
        best = max(best, tail_mean(law, Fraction(level)))
    # Returns are multiples of 1/2, so the grid holds the best stock.
    grid = [k / 2 for k in range(-12, 13)]
    found = best_stock(mdp, discount, 2, 0, level, grid)
    assert found.cvar == pytest.approx(float(best), abs=1e-9)
    law = {Fraction(v[0]): Fraction(p) for v, p in found.law.items()}
    assert float(tail_mean(law, Fraction(level))) == pytest.approx(float(best), abs=1e-9)


def test_a_wanted_return_of_ten():
    table = StockTable(TEN, TARGET, 1.0, 2, [(0, (-10.0,))])
    start, (laws, policy) = table.starts[0], table.value_iteration()
    assert laws[start] == {(10.0,): 1.0} and table.value(start, laws[start]) == 0
    assert policy[1, 1, (-10.0,)] == 1 and policy[1, 1, (0.0,)] == 0
    for chosen in (0, 1):  # Of the step alone: 0 or 10, and 10 or 20.
        law = table.evaluate(dict.fromkeys(table.keys, chosen))[start]
        assert table.value(start, law) == -5


# ---- operators


def test_one_bellman_step_by_hand():
    table = StockTable(GAMBLE, SHORTFALL, 0.9, 2, [(0, (-4.0,))])
    start, lost, won = table.keys
    assert (start, won) == ((0, 0, (-4.0,)), (1, 1, (0.0,)))
    assert lost == (1, 1, (round(-80 / 9, 9),))
    laws = {start: {(99.0,): 1.0}, lost: {(10.0,): 1.0}, won: {(1.0,): 0.25, (-1.0,): 0.75}}
    ahead = table.bellman(laws, {start: 0, lost: 1, won: 0})
    # -4 + 0.9 * 10 and 4 +- 0.9; the last step looks at no law, for nothing follows it.
    assert ahead[start] == pytest.approx({(5.0,): 0.5, (4.9,): 0.125, (3.1,): 0.375})
    assert ahead[lost] == {(3.0,): 0.75, (-5.0,): 0.25} and ahead[won] == {(0.0,): 1.0}
    # E min(-4 + G, 0): of 5 and 4.9 nothing, of 3.1 a lack of 0.9.
    assert table.value(start, ahead[start]) == pytest.approx(-0.9 * 0.375)


def test_f_acts_on_stock_plus_return():
    """The same law is liked or not, according to the stock."""
    mdp = FiniteMDP((((Outcome(1.0, (2.0,), None),), (Outcome(1.0, (5.0,), None),)),))
    table = StockTable(mdp, TARGET, 1.0, 1, [(0, (-2.0,)), (0, (-5.0,)), (0, (-3.0,))])
    policy = table.greedy(table.zero())
    assert [policy[key] for key in table.starts] == [0, 1, 0]
    assert [table.value(k, {(5.0,): 1.0}) for k in table.starts] == [-3, 0, -2]


def test_ties_go_to_the_larger_mean_then_to_the_first():
    rewards = ((0.0, 1.0), (1.0, 0.0), (2.0, 2.0))
    for first, second in rewards:
        mdp = FiniteMDP((((Outcome(1.0, (first,), None),), (Outcome(1.0, (second,), None),)),))
        table = StockTable(mdp, SHORTFALL, 1.0, 1, [(0, (0.0,))])
        assert table.greedy(table.zero())[table.starts[0]] == int(second > first)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", list(JUDGES))
def test_value_iteration_is_the_best_of_all_memories(seed, name):
    utility, judge = JUDGES[name]
    mdp, discount = random_mdp(seed), 1.0 if utility.degree is None else 0.8
    for stock in (-2.0, 0.0, 1.5):
        table = StockTable(mdp, utility, discount, 3, [(0, (stock,))])
        start, (laws, _) = table.starts[0], table.value_iteration()
        expected = best_by_hindsight(mdp, judge, discount, 3, 0, (stock,))
        assert table.value(start, laws[start]) == pytest.approx(expected, abs=1e-7)
        assert sum(laws[start].values()) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_vectors_are_kept_near_zero(seed):
    mdp = random_mdp(seed, reward_dim=2)

    def judge(x):
        return -math.hypot(*x)

    table = StockTable(mdp, HOMEOSTASIS, 0.9, 3, [(0, (1.0, -2.0))])
    start, (laws, _) = table.starts[0], table.value_iteration()
    expected = best_by_hindsight(mdp, judge, 0.9, 3, 0, (1.0, -2.0))
    assert table.value(start, laws[start]) == pytest.approx(expected, abs=1e-7)
    assert atoms_of(laws[start])[0].shape[1] == 2


def test_homeostasis_by_hand():
    """Hungry and thirsty by one each, one action feeds, the other waters: one after the other."""
    feed, water = (Outcome(1.0, (1.0, 0.0), 0),), (Outcome(1.0, (0.0, 1.0), 0),)
    table = StockTable(FiniteMDP(((feed, water),)), HOMEOSTASIS, 1.0, 2, [(0, (-1.0, -1.0))])
    start, (laws, policy) = table.starts[0], table.value_iteration()
    assert table.value(start, laws[start]) == 0
    assert policy[1, 0, (0.0, -1.0)] == 1 and policy[1, 0, (-1.0, 0.0)] == 0


@pytest.mark.parametrize("name", list(JUDGES))
def test_policy_iteration_never_gets_worse_and_ends_where_value_iteration_does(name):
    utility, discount = JUDGES[name][0], 1.0 if name == "exponential" else 0.8
    table = StockTable(random_mdp(7), utility, discount, 3, [(0, (-1.0,)), (0, (1.0,))])
    optimal, _ = table.value_iteration()
    worst = {
        key: min(range(2), key=lambda a: table.preferences(optimal, key)[a]) for key in table.keys
    }
    path = table.policy_iteration(worst)
    assert len(path) >= 2
    for (before, _), (after, _) in itertools.pairwise(path):
        for key in table.keys:
            assert table.value(key, after[key]) >= table.value(key, before[key]) - 1e-9
    last, policy = path[-1]
    assert table.greedy(last) == policy
    for key in table.keys:
        assert table.value(key, last[key]) == pytest.approx(
            table.value(key, optimal[key]), abs=1e-9
        )


@pytest.mark.parametrize("discount", [0.9, 1.0])
def test_with_the_mean_it_is_ordinary_value_iteration(discount):
    for seed in range(3):
        mdp, horizon = random_mdp(seed), 3
        ordinary = [0.0] * mdp.num_states
        steps = []
        for _ in range(horizon):
            ordinary = [
                max(
                    sum(
                        o.probability
                        * (
                            o.reward[0]
                            + discount * (0 if o.next_state is None else ordinary[o.next_state])
                        )
                        for o in case
                    )
                    for case in row
                )
                for row in mdp.outcomes
            ]
            steps.append(ordinary)
        table = StockTable(mdp, MEAN, discount, horizon, [(0, (0.0,)), (1, (5.0,))])
        laws, _ = table.value_iteration()
        for time, state, stock in table.keys:
            mean = sum(v[0] * p for v, p in laws[time, state, stock].items())
            assert mean == pytest.approx(steps[horizon - 1 - time][state], abs=1e-7)


def test_distinct_stocks_are_distinct_states():
    table = StockTable(GAMBLE, SHORTFALL, 1.0, 2, [(0, (-4.0,)), (0, (-3.95,)), (0, (-4.0,))])
    assert len(table.keys) == 6
    assert {k[2][0] for k in table.keys if k[0] == 1} == {0.0, -8.0, 0.05, -7.95}


def test_tables_refuse_what_has_no_meaning():
    with pytest.raises(ValueError, match="not positively homogeneous"):
        StockTable(GAMBLE, exponential(1.0), 0.9, 2, [(0, (0.0,))])
    for utility, mdp, stock in (
        (MEAN, random_mdp(0, reward_dim=2), (0.0, 0.0)),
        (MEAN, GAMBLE, (0.0, 0.0)),
    ):
        with pytest.raises(ValueError, match="length"):
            StockTable(mdp, utility, 1.0, 2, [(0, stock)])
    for level in (0.0, 1.5):
        with pytest.raises(ValueError, match="level"):
            best_stock(GAMBLE, 1.0, 2, 0, level, [0.0])


# ---- stocks in observations


def test_observations_with_stocks_by_hand():
    env = StockAugmented(GambleAfterLuck(), 0.9, (-2.0, 2.0))
    obs, _ = env.reset(seed=3)
    assert obs.dtype == np.float32 and obs.tolist()[:2] == [1, 0]
    assert obs[2] == obs[3] and -2 <= obs[2] <= 2 and obs[4] == 0
    obs, _ = env.reset(options={"stock": -4.0})
    assert obs.tolist() == [1, 0, -4, -4, 0]
    obs, reward, terminated, _, _ = env.step(0)
    assert reward in (-4, 4) and not terminated
    assert obs.tolist() == pytest.approx([0, 1, (-4 + reward) / 0.9, -4, 1])
    obs, second, terminated, _, _ = env.step(0)
    assert terminated and second == 0
    assert obs.tolist() == pytest.approx([0, 0, (-4 + reward) / 0.81, -4, 2])
    assert env.observation_space.shape == (5,) and env.observation_space.dtype == np.float32


def test_first_stocks_fill_their_range_and_go_with_no_chance_of_the_task():
    env = StockAugmented(GambleAfterLuck(), 1.0, (-6.0, 2.0))
    rows = []
    for seed in range(400):
        obs, _ = env.reset(seed=seed)
        rows.append((float(obs[3]), env.step(0)[1]))
    stocks, rewards = np.array(rows).T
    assert stocks.min() < -5.8 and stocks.max() > 1.8
    assert stocks.mean() == pytest.approx(-2, abs=0.35) and rewards.mean() == pytest.approx(
        0, abs=0.6
    )
    assert abs(np.corrcoef(stocks, rewards)[0, 1]) < 0.15
    again = [float(env.reset(seed=seed)[0][3]) for seed in range(3)]
    assert again == stocks[:3].tolist()
    assert len({float(env.reset()[0][3]) for _ in range(5)}) == 5


def test_a_task_keeps_its_limit_and_its_settings():
    config = esscher.EnvConfig(
        id="CartPole-v1", max_episode_steps=7, kwargs={"sutton_barto_reward": True}
    )
    wrapped = with_stock(config, 0.99, (0.0, 0.0))
    assert config.id == "CartPole-v1" and wrapped.num == config.num
    env = make(wrapped)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (7,)
    for step in range(7):
        obs, reward, terminated, truncated, _ = env.step(step % 2)
        assert reward == 0 and not terminated  # That setting's reward; else it would be 1.
    assert truncated and obs[-1] == 7
    assert isinstance(env, StockAugmented)
    with pytest.raises(UserError, match="did you mean CartPole-v1"):
        make(with_stock(esscher.EnvConfig(id="CartPol-v1"), 0.99, (0.0, 0.0)))
    with pytest.raises(UserError, match="cannot be made"):
        make(with_stock(replace(config, kwargs={"gravitas": 1}), 0.99, (0.0, 0.0)))


def test_their_state_is_saved_and_put_back():
    config = with_stock(
        esscher.EnvConfig(id="esscher.envs:GambleAfterLuck", num=2), 0.9, (-5.0, 5.0)
    )
    envs, other = Environments(config, 0), Environments(config, 1)
    assert envs.inexact_because() is None
    envs.reset(0), other.reset(0)
    envs.step(torch.tensor([0, 1]), 0)
    other.load_state_dict(envs.state_dict())
    for step in range(6):
        action = torch.tensor([step % 2, 1])
        one, two = envs.step(action, step), other.step(action, step)
        assert np.array_equal(one.obs, two.obs) and np.array_equal(one.next_obs, two.next_obs)
    envs.close(), other.close()


def test_a_stock_out_of_range_is_explained():
    class Penny(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
        action_space = gymnasium.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            assert options is None, "the stock is not the task's business"
            return np.zeros(1, np.float32), {}

        def step(self, action):
            return np.zeros(1, np.float32), 1.0, False, False, {}

    env = StockAugmented(Penny(), 0.001)
    env.reset(options={"stock": 1.0})
    with pytest.raises(UserError, match=r"discount\^-t.*step 10 .*--env.max-episode-steps"):
        for _ in range(20):
            env.step(0)
    for discount, start, wrong in ((0.0, (0.0, 1.0), "discount"), (0.9, (1.0, 0.0), "range")):
        with pytest.raises(UserError, match=wrong):
            StockAugmented(Penny(), discount, start)


def test_evaluation_begins_with_the_policys_own_stock():
    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.seen = nn.Parameter(torch.zeros(1)), []
            self.reset_options = {"stock": -4.0}

        def forward(self, obs):
            self.seen.append(obs.clone())
            return Categorical(torch.zeros(len(obs), 2))

    config = with_stock(esscher.EnvConfig(id="esscher.envs:GambleAfterLuck"), 0.9, (-5.0, 5.0))
    evaluator, policy = Evaluator(config, esscher.EvaluationConfig(episodes=3), 0), Watching()
    evaluator(policy)
    assert policy.seen[0][:, 2:].tolist() == [[-4, -4, 0]] * 3
    assert set(policy.seen[1][:, 3].tolist()) == {-4.0}
    evaluator.close()


# ---- the agent


SPEC = Spec(obs_shape=(5,), action_shape=(), num_actions=2)


def build(spec=SPEC, **settings):
    torch.manual_seed(0)
    given = {"hidden": (8,), "num_quantiles": 2, "batch_size": 4, "buffer_size": 100, "warmup": 0}
    return DistributionalDP(Config(**{**given, **settings}), spec, Runtime(RUNTIME))


def saying(quantiles, **settings):
    """An agent whose network says the same everywhere: quantiles[action]."""
    method = build(hidden=(), num_quantiles=len(quantiles[0]), **settings)
    for network in (method.actor, method.target_actor):
        tell(network, quantiles)
    return method


def tell(network, quantiles):
    with torch.no_grad():
        network.net.weights[0].zero_()
        network.net.biases[0].copy_(torch.tensor(quantiles).flatten())


def rows(stocks, start=0.0, time=1.0):
    return torch.tensor([[0.0, 1.0, stock, start, time] for stock in stocks])


def test_greedy_by_hand():
    # Action 0 brings 0 for sure, action 1 brings 4 or -2: better on average, worse in shortfall
    # where the stock is near 0; far below 0 only the mean counts; far above nothing does: a tie.
    method = saying([[0.0, 0.0], [-2.0, 4.0]], functional="cvar")
    assert method.actor.greedy(rows([-8.0, 0.0, 1.0, -1.9, 10.0])).tolist() == [1, 0, 0, 0, 1]
    # At -2.5 the shortfalls are 2.5, and 4.5 and 0.
    assert method.actor.greedy(rows([-2.5])).tolist() == [1]
    wanted = saying([[0.0, 0.0], [-2.0, 4.0]], functional="target")
    # |c + G| at -4: 4 against 6 and 0; at 0: 0; at 2: 2 against 0 and 6; at -1.5: 1.5, 3.5 and 2.5.
    assert wanted.actor.greedy(rows([-4.0, 0.0, 2.0, -1.5])).tolist() == [1, 0, 0, 0]
    hopeful = saying([[0.0, 0.0], [-2.0, 4.0]], functional="upper_cvar")
    assert hopeful.actor.greedy(rows([-3.0, 0.0, -9.0])).tolist() == [1, 1, 1]
    for aversion, chosen in ((1.0, 0), (-1.0, 1)):
        settings = {"functional": "exponential", "discount": 1.0, "risk_aversion": aversion}
        assert saying([[0.0, 0.0], [-2.0, 4.0]], **settings).actor.greedy(rows([0.0])).tolist() == [
            chosen
        ]
    mean = saying([[0.0, 0.0], [-2.0, 4.0]], functional="mean")
    assert mean.actor.greedy(rows([-8.0, 0.0, 10.0])).tolist() == [1, 1, 1]


def test_large_stocks_swallow_no_differences():
    method = saying([[0.0, 0.0], [0.001, 0.001]], functional="target")
    assert method.actor.greedy(rows([-1e7, 1e7])).tolist() == [1, 0]


def test_ties_within_the_tolerance():
    strict = saying([[0.0, 0.0], [-0.02, 4.0]], functional="cvar")
    loose = saying([[0.0, 0.0], [-0.02, 4.0]], functional="cvar", tie_tolerance=0.1)
    assert strict.actor.greedy(rows([0.0])).tolist() == [0]
    assert loose.actor.greedy(rows([0.0])).tolist() == [1]


def test_target_by_hand():
    method = saying([[0.0, 0.0], [-2.0, 4.0]], functional="cvar", discount=0.5)
    tell(method.actor, [[7.0, 7.0], [-7.0, -7.0]])  # Not looked at.
    reward = torch.tensor([1.0, 1.0, 1.0, 3.0])
    terminated = torch.tensor([False, False, False, True])
    target = method.target(reward, rows([-8.0, 0.0, 10.0, -8.0]), terminated)
    # Stocks of the next state: -8 wants action 1, 0 action 0, 10 by the mean action 1.
    assert target.tolist() == [[0.0, 3.0], [1.0, 1.0], [0.0, 3.0], [3.0, 3.0]]


def test_loss_by_hand():
    method = saying([[5.0, 5.0], [0.0, 1.0]], discount=0.5, functional="mean")
    tell(method.target_actor, [[4.0, -4.0], [0.0, -1.0]])
    loss, metrics = method.loss(
        rows([0.0]), torch.tensor([1]), torch.tensor([1.0]), rows([2.0]), torch.tensor([False])
    )
    # By the mean action 0 (0 against -0.5): targets 1 + 2 and 1 - 2 for quantiles 0 and 1.
    # Levels 1/4, 3/4; from 3: errors 3, 2, Huber 2.5, 1.5, weighted 0.625, 1.125; from -1: errors
    # -1, -2, Huber 0.5, 1.5, weighted 0.375, 0.375. Means 0.5 and 0.75, summed.
    assert loss.item() == pytest.approx(1.25)
    assert metrics["q_mean"].item() == pytest.approx(0.5)


def test_the_network_sees_the_stock_scaled_and_cut():
    method = build(stock_range=(-15.0, 5.0), stock_clip=3.0)
    features = torch.zeros(4, 2)
    seen = []
    method.actor.net.forward = lambda x: seen.append(x) or torch.zeros(len(x), 4)
    method.actor.quantiles(features, torch.tensor([-15.0, -5.0, 5.0, 1e6]))
    assert seen[0][:, -1].tolist() == [-1, 0, 1, 3]
    # First stock and time are not the policy's business.
    obs, other = rows([-3.0]), rows([-3.0], start=9.0, time=5.0)
    seen.clear()
    method.actor.greedy(obs), method.actor.greedy(other)
    assert torch.equal(seen[0], seen[1]) and seen[0].shape == (1, 3)


@pytest.mark.parametrize("discount", [0.8, 1.0])
def test_edited_transitions_are_those_of_another_first_stock(discount):
    """Against the wrapper: the same episode, begun again with the stock that the edit drew."""
    env = StockAugmented(gymnasium.make("CartPole-v1"), discount, (-3.0, 3.0))
    settings = {"discount": discount, "stock_range": (-3.0, 3.0), "stock_edits": 2}
    method = build(Spec(obs_shape=(7,), action_shape=(), num_actions=2), **settings)

    def episode(options):
        obs, found = env.reset(seed=5, options=options)[0], []
        for step in range(6):
            after, reward, *_ = env.step(step % 2)
            found.append((obs, after, reward))
            obs = after
        before, after, reward = zip(*found, strict=True)
        return torch.tensor(np.array(before)), torch.tensor(np.array(after)), torch.tensor(reward)

    obs, next_obs, reward = episode(None)
    edited, next_edited = method.edited(obs, next_obs, reward.float())
    assert torch.equal(edited[:6], obs) and torch.equal(next_edited[:6], next_obs)
    assert len(edited) == 18
    starts = edited[6:, 5]
    assert ((starts >= -3) & (starts <= 3)).all() and len(set(starts.tolist())) == 12
    for k in range(12):
        before, after, _ = episode({"stock": starts[k].item()})
        torch.testing.assert_close(edited[6 + k], before[k % 6], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(next_edited[6 + k], after[k % 6], rtol=1e-5, atol=1e-5)


def test_an_update_repeats_actions_rewards_and_ends_for_the_edits(monkeypatch):
    method, given = build(stock_edits=2), {}
    loss = method.loss
    monkeypatch.setattr(method, "loss", lambda *args: given.update(args=args) or loss(*args))
    batch = Transitions(
        obs=rows([0.0, 1.0]),
        action=torch.tensor([0, 1]),
        reward=torch.tensor([2.0, 3.0]),
        next_obs=rows([2.0, 4.0], time=2.0),
        terminated=torch.tensor([True, False]),
        truncated=torch.zeros(2, dtype=torch.bool),
    )
    method.descend(batch, False, False)
    _, action, reward, _, terminated = given["args"]
    assert action.tolist() == [0, 1] * 3 and reward.tolist() == [2, 3] * 3
    assert terminated.tolist() == [True, False] * 3


def test_what_an_update_moves():
    method = build(functional="cvar", stock_frequency=3, target_update_interval=2, stock_grid=5)
    batch = Transitions(
        obs=torch.cat([rows([0.0, 1.0]), rows([-4.0, -4.0], start=-4.0, time=0.0)]),
        action=torch.tensor([0, 1, 0, 1]),
        reward=torch.tensor([2.0, 3.0, -4.0, 4.0]),
        next_obs=rows([2.0, 4.0, -8.0, 0.0], time=2.0),
        terminated=torch.tensor([True, True, False, False]),
        truncated=torch.zeros(4, dtype=torch.bool),
    )
    method.actor.initial_stock.fill_(99.0)
    for step in range(6):
        nets = [
            [p.clone() for p in n.net.parameters()] for n in (method.actor, method.target_actor)
        ]
        stock = method.actor.initial_stock.clone()
        metrics = method.update(batch, step)
        moved = [
            [not torch.equal(p, q) for p, q in zip(n.net.parameters(), old, strict=True)]
            for n, old in zip((method.actor, method.target_actor), nets, strict=True)
        ]
        assert all(moved[0])
        assert all(moved[1]) if step % 2 else not any(moved[1])
        assert ("cvar" in metrics) == (step % 3 == 2)
        if step < 2:
            assert method.actor.initial_stock.item() == 99.0
        elif step == 2:
            assert not torch.equal(stock, method.actor.initial_stock)
    assert method.policy.reset_options == {"stock": method.actor.initial_stock.item()}
    # The two first observations of each batch, newest first.
    assert method.valid.tolist()[:13] == [True] * 12 + [False]
    assert method.starts[:12].tolist() == [[0.0, 1.0]] * 12


def test_first_observations_push_out_the_oldest():
    method = build(functional="cvar")
    for k in range(40):
        early, late = rows([0.0], time=0.0), rows([0.0], time=3.0)
        early[:, 0] = late[:, 0] = k
        method.remember_starts(torch.cat([late, early, early]))
    assert method.valid.all()
    assert method.starts[:, 0].tolist() == [float(39 - k // 2) for k in range(64)]


@pytest.mark.parametrize(("functional", "expected"), [("cvar", -4.0), ("upper_cvar", 1.0)])
def test_the_search_for_a_stock_by_hand(functional, expected):
    """A network that says what the best policy of the task brings: worst 0.6 -11/6, best 0.6 4."""
    law = (
        [-9.0] + 3 * [-1.0] + 4 * [4.0] if functional == "cvar" else [-9.0] + 4 * [-1.0] + 3 * [7.0]
    )
    settings = {"level": 0.6, "stock_grid": 401, "stock_range": (-10.0, 10.0), "discount": 1.0}
    method = saying([law, [-50.0] * 8], functional=functional, **settings)
    method.actor.initial_stock.fill_(3.0)
    found, _ = method.best_stock()
    assert found.item() == 3.0, "without a first observation there is nothing to search by"
    method.remember_starts(rows([0.0], time=0.0))
    found, value = method.best_stock()
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert value.item() == pytest.approx(-11 / 6 if functional == "cvar" else 4.0, abs=1e-5)


def test_the_search_averages_over_first_observations():
    method = saying([[0.0], [-50.0]], functional="cvar", level=0.5, stock_grid=201, discount=1.0)
    with torch.no_grad():  # Returns 10 x_0 - 5: -5 from one start, 5 from the other.
        method.actor.net.weights[0][0, 0] = 10.0
        method.actor.net.biases[0][0] = -5.0
    starts = rows([0.0, 0.0, 0.0], time=0.0)
    starts[:, 0] = torch.tensor([0.0, 1.0, 1.0])
    method.remember_starts(starts)
    found, value = method.best_stock()
    # Worst half of {-5 (1/3), 5 (2/3)}: (-5/3 + 5/6) / 0.5, from minus the quantile, -5.
    assert (found.item(), value.item()) == pytest.approx((-5.0, -5 / 3), abs=1e-4)


def test_exploration_ends_on_schedule():
    method = saying([[1.0, 1.0], [0.0, 0.0]], epsilon_steps=1_000, final_epsilon=0.1)
    obs = rows([0.0] * 100)
    assert method.act(obs, explore=False).value.tolist() == [0] * 100
    assert method.epsilon == 1.0 and method.num_explored == 0
    shares = [
        (method.epsilon, method.act(obs, explore=True).value.float().mean().item())
        for _ in range(20)
    ]
    assert method.num_explored == 2_000
    assert [s[0] for s in shares[:11]] == pytest.approx([1 - 0.09 * k for k in range(11)])
    assert shares[-1][0] == pytest.approx(0.1)
    # Half of the random actions are the other one.
    assert shares[0][1] == pytest.approx(0.5, abs=0.15)
    assert sum(s for _, s in shares[10:]) / 10 == pytest.approx(0.05, abs=0.03)


def test_deployed_it_is_greedy_whichever_way_it_is_asked():
    method = saying([[0.0, 0.0], [-2.0, 4.0]], functional="cvar")
    controller = Controller(method.policy, SPEC)
    observations = rows([-8.0, 0.0]).numpy()
    for deterministic in (True, False):
        actions, _ = controller.predict(observations, deterministic=deterministic)
        assert actions.tolist() == [1, 0]
    assert controller.reset_options == {"stock": 0.0}


@pytest.mark.parametrize(
    ("settings", "stock"),
    [
        ({"functional": "target", "desired_return": 7.0}, -7.0),
        ({"functional": "mean"}, 0.0),
        ({"functional": "cvar", "stock_range": (-9.0, -2.0)}, -2.0),
        ({"functional": "cvar", "stock_range": (3.0, 9.0)}, 3.0),
    ],
)
def test_the_stock_that_is_given(settings, stock):
    assert build(**settings).policy.reset_options == {"stock": stock}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"level": 0.0}, "level must be in (0, 1], got 0.0"),
        ({"level": 1.5}, "level must be in (0, 1], got 1.5"),
        ({"discount": 0.0}, "discount must be in (0, 1], got 0.0"),
        ({"discount": 1.01}, "discount must be in (0, 1], got 1.01"),
        ({"functional": "exponential"}, "discount must be 1 with it, got 0.99"),
        ({"functional": "target", "desired_return": 11.0}, "desired_return must lie in [-10, 10]"),
        ({"stock_range": (1.0, 1.0)}, "stock_range must be increasing"),
        ({"risk_aversion": 0.0}, "risk_aversion must be other than 0"),
        ({"stock_grid": 1}, "stock_grid must be >= 2"),
    ],
)
def test_settings_without_meaning_are_refused(settings, says):
    with pytest.raises(UserError) as caught:
        Config(**settings)
    assert says in str(caught.value)


def test_settings_with_meaning_are_not():
    Config(functional="exponential", discount=1.0)
    Config(level=1.0)
    Config(discount=1.0)


def test_continuous_actions_are_refused_before_anything_is_written(tmp_path):
    box = Spec(obs_shape=(6,), action_shape=(1,), action_low=(-1.0,), action_high=(1.0,))
    with pytest.raises(UserError, match="distributional_dp needs a Discrete action space"):
        build(box)
    experiment = esscher.Experiment.of("distributional_dp", env="Pendulum-v1", runtime=RUNTIME)
    with pytest.raises(UserError, match="distributional_dp needs a Discrete action space"):
        esscher.run(experiment, directory=tmp_path / "run", display=False)
    assert not (tmp_path / "run").exists()


def test_the_stock_is_added_without_being_asked_for(tmp_path):
    """The task keeps its own name in the folder; what is trained, judged and loaded has stocks."""
    cfg = Config(hidden=(8,), num_quantiles=4, batch_size=8, buffer_size=50, warmup=10)
    experiment = esscher.Experiment.of(
        cfg,
        env="CartPole-v1",
        steps=30,
        evaluation=esscher.EvaluationConfig(every=0, episodes=2, step_limit=20),
        runtime=RUNTIME,
    )
    assert experiment.stages[-1].env.id == "CartPole-v1"
    esscher.run(experiment, directory=tmp_path / "run", display=False)
    loaded = esscher.load(tmp_path / "run")
    assert loaded.experiment.stages[-1].env.id == "CartPole-v1"
    assert loaded.policy.spec.obs_shape == (7,)
    env = StockAugmented(gymnasium.make("CartPole-v1"), cfg.discount)
    obs, _ = env.reset(seed=0, options=loaded.policy.reset_options)
    action, _ = loaded.policy.predict(obs)
    assert action in (0, 1)


def test_it_learns_to_return_ten():
    """All eight transitions of the task, with stocks drawn anew at each update."""
    method = build(
        functional="target",
        desired_return=10.0,
        discount=1.0,
        stock_range=(-15.0, 5.0),
        hidden=(32, 32),
        num_quantiles=5,
        learning_rate=3e-3,
        stock_edits=15,
        target_update_interval=10,
    )
    steps = list(itertools.product((0.0, 10.0), (0, 1), (0, 1)))
    obs, next_obs, actions, rewards, ends = [], [], [], [], []
    for luck, first, second in steps:
        obs += [[1.0, 0.0, -10.0, -10.0, 0.0], [0.0, 1.0, luck - 10, -10.0, 1.0]]
        next_obs += [obs[-1], [0.0, 0.0, luck - 10 + 10 * second, -10.0, 2.0]]
        actions, rewards, ends = (
            [*actions, first, second],
            [*rewards, luck, 10.0 * second],
            [*ends, 0, 1],
        )
    batch = Transitions(
        obs=torch.tensor(obs),
        action=torch.tensor(actions),
        reward=torch.tensor(rewards),
        next_obs=torch.tensor(next_obs),
        terminated=torch.tensor(ends, dtype=torch.bool),
        truncated=torch.zeros(len(ends), dtype=torch.bool),
    )
    for step in range(400):
        method.update(batch, step)
    assert method.actor.greedy(rows([-10.0, 0.0], start=-10.0)).tolist() == [1, 0]
    # From other first stocks as well: 10 is added below -5, nothing above.
    assert method.actor.greedy(rows([-13.0, -8.0, -2.0, 3.0])).tolist() == [1, 1, 0, 0]
    start = torch.tensor([[1.0, 0.0]])
    quantiles = method.actor.quantiles(start, torch.tensor([-10.0]))
    assert (quantiles - 10).abs().mean().item() < 1.5
