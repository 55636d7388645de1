"""Trees over diffusion models: enumerated, by hand, and against chains whose tilt has a closed form."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from esscher.distributions.gaussian_mixture import GaussianMixture
from esscher.errors import UserError
from esscher.samplers.denoisers import Counted, classifier_free
from esscher.samplers.tree import DenoisingProcess, Tree, TreeSettings

OUTCOMES = (0, 0, 1, 2)
"""What the children of every state are, in turn: probabilities 1/2, 1/4, 1/4."""
PROBABILITY = {0: 0.5, 1: 0.25, 2: 0.25}


class Enumerable:
    """Three steps, each one of `OUTCOMES`; every fourth child of a state begins them again.

    A state is its path so far, in ternary digits, the copy of the outcome beside it.
    """

    levels = (3.0, 2.0, 1.0)

    def __init__(self) -> None:
        self.drawn: Counter[tuple[float, ...]] = Counter()
        self.evaluations = 0

    def _after(self, path: tuple[float, ...]) -> list[float]:
        turn = self.drawn[path] % len(OUTCOMES)
        self.drawn[path] += 1
        # The two copies of outcome 0 are different states, so that each keeps its own count.
        return [*path, OUTCOMES[turn] + 0.25 * (turn == 1)]

    def prior(self, seeds: Sequence[int]) -> Tensor:
        rows = [self._after(()) for _ in seeds]
        return torch.tensor([[*row, -1.0, -1.0] for row in rows])

    def transition(self, x: Tensor, level: int, seeds: Sequence[int]) -> Tensor:
        self.evaluations += len(x)
        rows = [self._after(tuple(row[: level + 1])) for row in x.tolist()]
        return torch.tensor([row + [-1.0] * (3 - len(row)) for row in rows])


TABLE = {
    path: math.sin(1.0 + 7 * path[0] + 3 * path[1] + 2.2 * path[2] * (1 + path[0]))
    for path in itertools.product(range(3), repeat=3)
}


def outcomes_of(x: Tensor) -> list[tuple[int, ...]]:
    return [tuple(int(digit) for digit in row) for row in x.tolist()]


def table_reward(x: Tensor) -> Tensor:
    return torch.tensor([TABLE[path] for path in outcomes_of(x)], dtype=torch.float64)


class Chain:
    """Random walks of plain normal steps: any number of levels, a number each."""

    def __init__(self, levels: int = 3):
        self.levels = tuple(float(levels - k) for k in range(levels))
        self.evaluations = 0

    def prior(self, seeds: Sequence[int]) -> Tensor:
        return self._noise(seeds)

    def transition(self, x: Tensor, level: int, seeds: Sequence[int]) -> Tensor:
        assert 0 <= level < len(self.levels) - 1
        self.evaluations += len(x)
        return x + self._noise(seeds)

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        return torch.stack(
            [torch.randn(2, generator=torch.Generator().manual_seed(s)) for s in seeds]
        )


def mixture_of(means: list[list[float]], std: float, **changes: Any) -> Any:
    return GaussianMixture(torch.tensor(means), std, **changes)


def first(x: Tensor) -> Tensor:
    return x[:, 0]


def grown(iterations: int, levels: int = 3, reward: Any = first, **settings: Any) -> Tree:
    tree = Tree(Chain(levels), reward, TreeSettings(**settings), seed=5)
    tree.grow(iterations)
    return tree


def held(tree: Tree) -> tuple[list[int], list[int], list[float], list[int], dict[int, list[int]]]:
    """Depths, parents, values, visits, and the children of each node."""
    state = tree.state_dict()
    parents = state["parent"].tolist()
    children: dict[int, list[int]] = {node: [] for node in range(len(parents))}
    for node, parent in enumerate(parents):
        if node:
            children[parent].append(node)
    return (
        state["level"].tolist(),
        parents,
        state["value"].tolist(),
        state["visits"].tolist(),
        children,
    )


# ---- enumerated


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("lam", [1.7, 0.4])
def test_a_complete_tree_draws_the_tilted_distribution(batch: int, lam: float) -> None:
    settings = TreeSettings(
        inverse_temperature=lam, widening_scale=4.0, widening_exponent=0.0, batch=batch
    )
    tree = Tree(Enumerable(), table_reward, settings, seed=3)
    while len(tree) < 1 + 4 + 16 + 64:
        assert tree.iterations < 20_000
        tree.grow(400)
    weight = {
        path: math.prod(PROBABILITY[digit] for digit in path) * math.exp(lam * reward)
        for path, reward in TABLE.items()
    }
    total = sum(weight.values())
    leaves, logp = tree.leaf_log_probs()
    found: Counter[tuple[int, ...]] = Counter()
    for path, p in zip(outcomes_of(tree.leaves(leaves).x), logp.exp().tolist(), strict=True):
        found[path] += p
    assert found.keys() == weight.keys()
    for path, unnormalised in weight.items():
        assert found[path] == pytest.approx(unnormalised / total, abs=1e-6)
    assert tree.value == pytest.approx(math.log(total) / lam, abs=1e-6)
    # Walks, beside their probabilities: within 5 standard errors.
    asked = tree.evaluations
    drawn = Counter(outcomes_of(tree.draw(20_000, seed=1).x))
    for path, unnormalised in weight.items():
        p = unnormalised / total
        assert drawn[path] / 20_000 == pytest.approx(p, abs=5 * math.sqrt(p / 20_000))
    assert tree.evaluations == asked == tree.process.evaluations


def test_selection_takes_children_by_the_tilt() -> None:
    """Where nothing is left to draw, iterations are walks: their counts are the probabilities."""
    settings = TreeSettings(inverse_temperature=1.7, widening_scale=4.0, widening_exponent=0.0)
    tree = Tree(Enumerable(), table_reward, settings, seed=3)
    while len(tree) < 85:
        tree.grow(400)
    before = tree.state_dict()["visits"]
    tree.grow(2500)
    leaves, logp = tree.leaf_log_probs()
    taken = (tree.state_dict()["visits"] - before)[leaves]
    assert int(taken.sum()) == 2500 and len(tree) == 85
    share = taken / 2500
    assert bool(((share - logp.exp()).abs() < 5 * (logp.exp() / 2500).sqrt()).all())


def test_a_denoiser_reaches_the_tilt_of_its_chain() -> None:
    """Gaussian data, linear reward: the chain's samples are N(M, S^2), the tilt moves M by lambda S^2.

    M and S follow from D(x) = (s^2 x + sigma^2 m) / (s^2 + sigma^2), step by step.
    """
    sigmas, centre, spread, lam = [3.0, 1.5, 0.8, 0.4, 0.0], 0.5, 0.7, 1.0
    mean, variance = 0.0, sigmas[0] ** 2
    for now, then in itertools.pairwise(sigmas):
        pull = spread**2 / (spread**2 + now**2)
        noise = then**2 * (1 - (then / now) ** 2)
        kept = math.sqrt(then**2 - noise) / now
        slope = kept + (1 - kept) * pull
        mean = slope * mean + (1 - kept) * (1 - pull) * centre
        variance = slope**2 * variance + noise
    process = DenoisingProcess(mixture_of([[centre]], spread), sigmas, (1,), (0, 1, 2))
    tree = Tree(process, first, TreeSettings(inverse_temperature=lam, batch=16), seed=0)
    tree.grow(2400)
    assert float(tree.draw(4000, seed=1).x.mean()) == pytest.approx(mean + lam * variance, abs=0.1)
    assert tree.value == pytest.approx(mean + lam * variance / 2, abs=0.1)


# ---- values


def test_backup_by_hand() -> None:
    """Rewards 0, log 2, log 6: their soft mean is log(9 / 3); a sum in its place would give log 9."""
    rewards = iter([0.0, math.log(2), math.log(6)])
    tree = Tree(Chain(1), lambda x: torch.tensor([next(rewards)], dtype=torch.float64), seed=0)
    found = []
    for _ in range(3):
        tree.grow(1)
        found.append(tree.value)
    assert found == pytest.approx([0.0, math.log(1.5), math.log(3)])
    leaves, logp = tree.leaf_log_probs()
    assert leaves.tolist() == [1, 2, 3]
    assert logp.exp().tolist() == pytest.approx([1 / 9, 2 / 9, 6 / 9])


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("selection", ["softmax", "uct"])
def test_values_are_soft_means_over_children(selection: Any, batch: int) -> None:
    """Recomputed from the leaves. Nodes have different numbers of children here, so that sums, or
    means weighted by visits, would differ by more than the tolerance.
    """
    lam = 0.8
    tree = grown(500, inverse_temperature=lam, selection=selection, batch=batch)
    level, _, value, visits, children = held(tree)

    def soft(node: int, weigh: Callable[[int], float], divide: bool = True) -> float:
        if level[node] == 3:
            return value[node]
        below = children[node]
        terms = [weigh(c) * math.exp(lam * soft(c, weigh, divide)) for c in below]
        return math.log(math.fsum(terms) / (sum(map(weigh, below)) if divide else 1)) / lam

    for node in range(len(tree)):
        assert value[node] == pytest.approx(soft(node, lambda _: 1.0), abs=1e-9)
    assert len({len(c) for c in children.values()}) > 3
    assert abs(soft(0, lambda _: 1.0, divide=False) - value[0]) > 0.5
    assert abs(soft(0, lambda c: visits[c]) - value[0]) > 0.01


def test_max_backup_is_the_limit_of_the_soft_one() -> None:
    tree = grown(300, backup="max")
    level, _, value, _, children = held(tree)
    for node, below in children.items():
        assert level[node] == 3 or value[node] == max(value[c] for c in below)
    assert tree.value == float(tree.best().reward)
    assert torch.equal(tree.greedy().reward, tree.best().reward)
    sharp = grown(40, inverse_temperature=1e4)
    assert sharp.value == pytest.approx(float(sharp.best().reward), abs=1e-3)


def test_leaf_probabilities_are_those_of_walks() -> None:
    tree = grown(400, inverse_temperature=1.3)
    _, parent, value, _, children = held(tree)
    leaves, logp = tree.leaf_log_probs()
    for leaf, found in list(zip(leaves.tolist(), logp.tolist(), strict=True))[::7]:
        expected, node = 0.0, leaf
        while node:
            siblings = [math.exp(1.3 * value[c]) for c in children[parent[node]]]
            expected += 1.3 * value[node] - math.log(math.fsum(siblings))
            node = parent[node]
        assert found == pytest.approx(expected, abs=1e-9)
    assert float(logp.exp().sum()) == pytest.approx(1.0)


def test_rewards_of_any_size_stay_finite() -> None:
    tree = grown(300, reward=lambda x: 1000 * x[:, 0], inverse_temperature=5.0)
    assert math.isfinite(tree.value)
    assert all(map(math.isfinite, held(tree)[2]))
    assert bool(tree.draw(10, seed=0).reward.isfinite().all())


def test_negative_rewards_leave_no_value_of_zero() -> None:
    tree = grown(300, reward=lambda x: -50 - x[:, 0].abs())
    assert max(held(tree)[2]) <= -50


def test_greedy_and_best() -> None:
    tree = grown(400)
    _, _, value, _, children = held(tree)
    node = 0
    while children[node]:
        node = max(children[node], key=value.__getitem__)
    assert tree.greedy().node.tolist() == [node]
    assert float(tree.best().reward) == max(v for n, v in enumerate(value) if not children[n])


def test_uct_by_hand() -> None:
    """Two children: 1.0 after 3 visits, 0.4 after 1, of a root with 4 and so N = 5.

    c = 1: 1.0 + sqrt(log 5 / 4) = 1.634, 0.4 + sqrt(log 5 / 2) = 1.297. c = 3: 2.903 and 3.091.
    """
    for exploration, expected in ((1.0, 1), (3.0, 2)):
        settings = TreeSettings(
            selection="uct", exploration=exploration, widening_scale=2.0, widening_exponent=0.0
        )
        tree = Tree(Chain(1), first, settings, seed=0)
        tree.grow(2)
        state = tree.state_dict()
        state["value"] = torch.tensor([0.0, 1.0, 0.4], dtype=torch.float64)
        state["visits"] = torch.tensor([5, 4, 2])
        tree.load_state_dict(state)
        tree.grow(1)
        after = tree.state_dict()["visits"]
        assert after.tolist() == [6, 4 + (expected == 1), 2 + (expected == 2)]


# ---- growth


@pytest.mark.parametrize(("exponent", "alone"), [(0.8, 36), (0.7, 13)])
def test_the_root_grows_alone_at_first(exponent: float, alone: int) -> None:
    """With C 2 the root has i - 1 children at iteration i, and i - 1 < 2 i^alpha up to i = 36
    (35 < 35.16) or 13 (12 < 12.04); at 37 (36 > 35.94) and 14 (13 > 12.68) it selects.
    """
    tree = Tree(Chain(), first, TreeSettings(widening_exponent=exponent), seed=0)
    for iteration in range(1, alone + 2):
        tree.grow(1)
        roots = held(tree)[4][0]
        assert len(roots) == min(iteration, alone)
    assert len(tree) == 1 + 3 * alone + 2
    # Promised visits and children count like real ones: a batch takes as many.
    assert len(held(grown(alone + 1, widening_exponent=exponent, batch=alone + 1))[4][0]) == alone


def test_widening_is_strict() -> None:
    """C 2 at alpha 0 allows two children, at C 2.5 three."""
    for scale, most in ((2.0, 2), (2.5, 3)):
        tree = grown(200, widening_scale=scale, widening_exponent=0.0)
        assert max(len(c) for c in held(tree)[4].values()) == most


@pytest.mark.parametrize("batch", [1, 5, 32])
@pytest.mark.parametrize("selection", ["softmax", "uct"])
def test_invariants(selection: Any, batch: int) -> None:
    tree = grown(403, selection=selection, batch=batch)
    level, parent, value, visits, children = held(tree)
    assert tree.iterations == 403 and visits[0] == 404 and parent[0] == -1
    for node, below in children.items():
        assert below == sorted(below)
        assert bool(below) == (level[node] < 3)
        assert all(level[c] == level[node] + 1 for c in below)
        if below:
            assert visits[node] - 1 == sum(visits[c] - 1 for c in below)
            assert len(below) - 1 < 2.0 * visits[node] ** 0.8
    leaves = [node for node in range(len(tree)) if level[node] == 3]
    x0 = tree.leaves(torch.tensor(leaves)).x
    assert [value[leaf] for leaf in leaves] == pytest.approx(x0[:, 0].tolist())
    # A child of this chain is its parent and noise: rows are where they belong.
    state = tree.state_dict()["state"]
    step = torch.stack(
        [state[n - 1] - state[parent[n] - 1] for n in range(1, len(tree)) if parent[n]]
    )
    assert len(step) > 400
    assert float(step.std()) == pytest.approx(1.0, abs=0.1)
    assert len(torch.unique(step[:, 0])) == len(step)


def test_a_batch_spreads_over_the_tree() -> None:
    """Without promised visits 32 paths by confidence bounds would all be the same."""
    tree = grown(
        320, selection="uct", widening_exponent=0.0, widening_scale=4.0, exploration=30.0, batch=32
    )
    before = tree.state_dict()["visits"]
    tree.grow(32)
    roots = held(tree)[4][0]
    after = tree.state_dict()["visits"][: len(before)]
    assert len(roots) == 4
    assert int((after - before)[roots].min()) >= 2


def test_a_batch_waits_where_it_could_only_choose_what_is_still_to_be_drawn() -> None:
    """A root allowed two children, asked by four at once: two draw, and the others choose then."""
    tree = grown(4, widening_scale=2.0, widening_exponent=0.0, batch=4)
    assert [len(below) for below in held(tree)[4].values()].count(2) > 1
    assert len(held(tree)[4][0]) == 2 and tree.iterations == 4


def test_evaluations_are_counted() -> None:
    """10 steps in levels of 4, 3 and 3: a node at depth k costs what lies below its parent."""
    counted = Counted(mixture_of([[0.0, 0.0]], 1.0))
    sigmas = torch.linspace(5, 0, 11)
    tree = Tree(DenoisingProcess(counted, sigmas, (2,), (0, 4, 7)), first, seed=0)
    tree.grow(36)
    assert tree.evaluations == 360 == counted.evaluations
    tree.grow(80)
    level = held(tree)[0]
    # Depth 1 is drawn from the prior; depths 2, 3, 4 cost the steps to them.
    expected = sum({0: 0, 1: 0, 2: 4, 3: 3, 4: 3}[depth] for depth in level)
    assert tree.evaluations == expected == counted.evaluations
    calls = counted.evaluations
    tree.draw(100, seed=0)
    tree.greedy()
    tree.best()
    assert counted.evaluations == calls


def test_guidance_counts_twice_where_it_is_told_so() -> None:
    mixture = mixture_of([[1.0, 0.0], [0.0, 1.0]], 0.5, labels=torch.tensor([0, 1]))
    counted = Counted(mixture)
    process = DenoisingProcess(
        classifier_free(counted, torch.tensor([-1]), 2.0),
        [4.0, 2.0, 1.0, 0.0],
        (2,),
        (0, 1),
        condition=torch.tensor([1]),
        calls=2,
    )
    tree = Tree(process, first, TreeSettings(batch=4), seed=0)
    tree.grow(40)
    assert tree.evaluations == counted.evaluations


def test_growth_stops_at_its_budget() -> None:
    process = DenoisingProcess(mixture_of([[0.0]], 1.0), torch.linspace(5, 0, 11), (1,), (0, 4, 7))
    tree = Tree(process, first, seed=0)
    tree.grow(evaluations=995)
    assert 995 <= tree.evaluations < 995 + 10
    tree.grow(100, evaluations=995)
    assert 995 <= tree.evaluations < 995 + 10
    iterations = tree.iterations
    tree.grow(7, evaluations=10**6)
    assert tree.iterations == iterations + 7


# ---- the same again


@pytest.mark.parametrize("selection", ["softmax", "uct"])
@pytest.mark.parametrize("batch", [1, 10])
def test_resuming_is_exact(selection: Any, batch: int) -> None:
    settings = TreeSettings(selection=selection, batch=batch)
    sigmas = [4.0, 2.0, 1.0, 0.5, 0.0]
    mixture = mixture_of([[1.0, 0.0], [-1.0, 0.5]], 0.4)

    def new(seed: int = 9) -> Tree:
        process = DenoisingProcess(mixture, sigmas, (2,), (0, 1, 2)) if batch > 1 else Chain()
        return Tree(process, first, settings, seed=seed)

    whole, half = new(), new()
    whole.grow(120)
    half.grow(60)
    saved = half.state_dict()
    half.grow(20)
    again = new()
    again.load_state_dict(saved)
    torch.rand(3)
    again.grow(60)
    expected, found = whole.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    assert torch.equal(whole.draw(20, seed=1).x, again.draw(20, seed=1).x)
    other = new(seed=10)
    other.grow(40)
    assert not torch.equal(other.state_dict()["value"][:10], expected["value"][:10])


def test_an_empty_tree_can_be_saved() -> None:
    tree, again = Tree(Chain(), first, seed=1), Tree(Chain(), first, seed=1)
    again.load_state_dict(tree.state_dict())
    again.grow(100)
    tree.grow(100)
    assert torch.equal(again.state_dict()["state"], tree.state_dict()["state"])


def test_a_state_of_another_tree_is_refused() -> None:
    state = grown(10).state_dict()
    with pytest.raises(UserError, match="seed 5, not 6"):
        Tree(Chain(), first, seed=6).load_state_dict(state)
    with pytest.raises(UserError, match=r"inverse_temperature 1.0, not 2.0"):
        Tree(Chain(), first, TreeSettings(inverse_temperature=2.0), seed=5).load_state_dict(state)
    with pytest.raises(UserError, match="on 3 levels, and this process has 4"):
        Tree(Chain(4), first, seed=5).load_state_dict(state)
    with pytest.raises(UserError, match="lacks"):
        Tree(Chain(), first, seed=5).load_state_dict({})


# ---- the process


def process_of(**changes: Any) -> DenoisingProcess:
    settings: dict[str, Any] = {
        "denoiser": mixture_of([[0.5]], 0.7),
        "sigmas": [3.0, 1.5, 0.8, 0.0],
        "shape": (1,),
        "branch": (0, 1),
    }
    return DenoisingProcess(**(settings | changes))


def test_a_transition_is_the_reverse_kernel() -> None:
    """One step from x = 2 at noise 3 to 1.5, eta 0.6, against its mean and deviation by hand."""
    process = process_of(eta=0.6)
    assert process.levels == [3.0, 1.5, 0.0]
    drawn = process.transition(torch.full((20_000, 1), 2.0), 0, range(20_000)).flatten()
    denoised = (0.49 * 2.0 + 9 * 0.5) / 9.49
    std = 0.6 * 1.5 * math.sqrt(1 - 0.25)
    mean = denoised + math.sqrt(1.5**2 - std**2) * (2.0 - denoised) / 3
    assert float(drawn.mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(20_000))
    assert float(drawn.std()) == pytest.approx(std, rel=0.03)
    prior = process.prior(range(20_000))
    assert float(prior.std()) == pytest.approx(3.0, rel=0.03)


def test_the_last_step_adds_no_noise() -> None:
    """From level 1 there are the steps 1.5 -> 0.8 and 0.8 -> 0, and the last is the denoised
    estimate: as narrow as that makes it.
    """
    drawn = process_of().transition(torch.full((20_000, 1), 2.0), 1, range(20_000))
    std = 0.8 * math.sqrt(1 - (0.8 / 1.5) ** 2) * 0.49 / (0.49 + 0.64)
    assert float(drawn.std()) == pytest.approx(std, rel=0.03)


def test_draws_depend_on_their_own_seed_alone() -> None:
    process, x = process_of(), torch.tensor([[1.0], [2.0], [3.0]])
    together = process.transition(x, 1, [4, 5, 6])
    torch.testing.assert_close(process.transition(x[1:2], 1, [5]), together[1:2])
    assert torch.equal(process.prior([7, 8])[1:], process.prior([8]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eta": 0.0}, r"eta must be in \(0, 1\].*alike, got 0.0"),
        ({"branch": (0, 2)}, "at most 1 of 3 steps: a step to noise level 0 is not random, got 2"),
        ({"branch": (1, 2)}, "branch must be steps that rise from 0"),
        ({"branch": (0, 1, 1)}, "branch must be steps that rise from 0"),
        ({"branch": ()}, "branch must be steps that rise from 0"),
        ({"sigmas": [1.0, 2.0]}, "sigmas must be at least two levels that fall"),
        ({"condition": torch.tensor([1, 2])}, "rows of the condition must be 1.*got 2"),
    ],
)
def test_processes_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        process_of(**changes)


def test_a_step_to_noise_that_is_left_may_branch() -> None:
    assert process_of(sigmas=[3.0, 1.5, 0.8, 0.1], branch=(0, 1, 2)).levels[-1] == 0.1


# ---- refusals


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda x: x[:, 0] / 0, "finite"),
        (lambda x: x[:, 0] * math.nan, "finite"),
        (lambda x: x, r"shape \(1,\), got \(1, 2\)"),
        (lambda x: x[:, 0].long(), "floating-point"),
        (lambda x: 1.0, r"shape \(1,\), got float"),
    ],
)
def test_rewards_that_are_refused_leave_the_tree_as_it_was(bad: Any, message: str) -> None:
    tree, good = grown(50), grown(120)
    before = tree.state_dict()
    tree.reward = bad
    with pytest.raises(UserError, match=message):
        for _ in range(50):
            tree.grow(1)
    after = tree.state_dict()
    tree.reward = first
    for name in ("state", "parent", "value"):
        assert torch.equal(before[name], after[name])
    tree.grow(120 - tree.iterations)
    assert torch.equal(tree.state_dict()["value"], good.state_dict()["value"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "settings",
    [
        {"inverse_temperature": 0.0},
        {"inverse_temperature": -1.0},
        {"inverse_temperature": math.inf},
        {"selection": "greedy"},
        {"backup": "sum"},
        {"widening_scale": 0.5},
        {"widening_exponent": 1.1},
        {"exploration": -1.0},
        {"batch": 0},
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        TreeSettings(**settings)


def test_what_a_tree_cannot_do() -> None:
    tree = Tree(Chain(), first, seed=0)
    for ask in (tree.greedy, tree.best, tree.leaf_log_probs, lambda: tree.draw(1, seed=0)):
        with pytest.raises(UserError, match="no leaves yet"):
            ask()
    with pytest.raises(UserError, match="iterations, of evaluations"):
        tree.grow()
    narrow = Tree(Chain(), first, TreeSettings(widening_exponent=0.0), seed=0)
    with pytest.raises(UserError, match="give iterations too"):
        narrow.grow(evaluations=100)
    with pytest.raises(UserError, match="iterations must be a whole number >= 0, got -1"):
        tree.grow(-1)
    with pytest.raises(UserError, match="evaluations must be >= 0, got -5"):
        tree.grow(evaluations=-5)


def test_a_tree_that_hardly_widens_does_not_search_for_ever(monkeypatch: Any) -> None:
    monkeypatch.setattr("esscher.samplers.tree.PATIENCE", 500)
    tree = Tree(Chain(), first, TreeSettings(widening_exponent=0.01), seed=0)
    with pytest.raises(
        UserError, match="500 paths .* 10,000 evaluations .*exponent must be larger"
    ):
        tree.grow(evaluations=10_000)
    tree.grow(2_000)  # A number of iterations has an end of its own.


def test_a_batch_is_no_larger_than_what_is_left_of_a_budget() -> None:
    process = DenoisingProcess(mixture_of([[0.0]], 1.0), torch.linspace(5, 0, 11), (1,), (0, 4, 7))
    tree = Tree(process, first, TreeSettings(batch=64), seed=0)
    tree.grow(evaluations=333)
    assert 333 <= tree.evaluations < 333 + 10
    tree.grow(evaluations=1_000)
    assert 1_000 <= tree.evaluations < 1_000 + 10


def test_a_chain_may_begin_and_end_in_the_networks_coordinates() -> None:
    options: Any = {"sigmas": [3.0, 2.0, 0.5], "shape": (1,), "branch": (0,)}
    plain = DenoisingProcess(mixture_of([[0.0]], 1.0), **options)
    scaled = DenoisingProcess(mixture_of([[0.0]], 1.0), start=10**0.5, end=0.25, **options)
    torch.testing.assert_close(scaled.prior([4]), plain.prior([4]) / 3 * 10**0.5)
    x = torch.ones(1, 1)
    torch.testing.assert_close(scaled.transition(x, 0, [5]), plain.transition(x, 0, [5]) / 4)


def test_no_leaves_cannot_be_drawn() -> None:
    with pytest.raises(UserError, match="count must be >= 1"):
        grown(5).draw(0, seed=0)
