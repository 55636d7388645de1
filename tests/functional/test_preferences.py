import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from esscher.functional.divergences import (
    GENERATORS,
    alpha,
    by_name,
    js,
    kl,
    neyman_chi2,
    pearson_chi2,
    reverse_kl,
    squared_hellinger,
    total_variation,
)
from esscher.functional.preferences import (
    bradley_terry_terms,
    implicit_score,
    penalty_terms,
    preference_terms,
    tilted,
)

INFINITY = float("inf")
ALPHAS = (0.1, 0.3, 0.5, 0.9)
# f'(u) from the generators' textbook form, each up to its own constant.
SLOPES = {
    "kl": lambda u: math.log(u),
    "reverse_kl": lambda u: -1 / u,
    "js": lambda u: math.log(2 * u / (1 + u)),
    "neyman_chi2": lambda u: -1 / u**2,
    "squared_hellinger": lambda u: -1 / math.sqrt(u),
    **{f"alpha({a})": lambda u, a=a: -(u**-a) / a for a in ALPHAS},
}
every = pytest.mark.parametrize("name", SLOPES)

# The case of f_dpo.md: six answers to one prompt.
REFERENCE = torch.tensor([0.30, 0.25, 0.20, 0.15, 0.07, 0.03], dtype=torch.float64)
REWARD = torch.tensor([0.0, 0.5, -0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
OPTIMA = {
    "kl": [0.0576, 0.1306, 0.0141, 0.2129, 0.2701, 0.3147],
    "alpha(0.5)": [0.0606, 0.0841, 0.0269, 0.1000, 0.1333, 0.5950],
    "reverse_kl": [0.0742, 0.0821, 0.0396, 0.0733, 0.0670, 0.6638],
    "js": [0.0054, 0.0127, 0.0013, 0.0226, 0.0387, 0.9192],
}


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("f", "gap"),  # f'(2) - f'(1/2)
    [
        (kl(), math.log(4)),
        (reverse_kl(), 1.5),
        (js(), math.log(2)),
        (alpha(0.5), math.sqrt(2)),
        (neyman_chi2(), 3.75),
        (squared_hellinger(), math.sqrt(0.5)),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_one_pair_by_hand(f, gap):
    log_2 = double(math.log(2))
    for beta in (1.0, 0.3):
        found = preference_terms(log_2, -log_2, f, beta)
        assert found.item() == pytest.approx(math.log(1 + math.exp(-beta * gap)), rel=1e-12)
        found = preference_terms(-log_2, log_2, f, beta)
        assert found.item() == pytest.approx(math.log(1 + math.exp(beta * gap)), rel=1e-12)


@every
def test_losses_are_the_formulas_of_the_table(name):
    torch.manual_seed(0)
    chosen, rejected = torch.randn(2, 20, dtype=torch.float64)
    found = preference_terms(chosen, rejected, by_name(name), 0.7)
    for term, up, down in zip(found.tolist(), chosen.tolist(), rejected.tolist(), strict=True):
        margin = 0.7 * (SLOPES[name](math.exp(up)) - SLOPES[name](math.exp(down)))
        assert term == pytest.approx(math.log1p(math.exp(-margin)), rel=1e-9)


@every
def test_gradient_raises_the_chosen_and_lowers_the_rejected(name):
    chosen, rejected = (double(x).requires_grad_() for x in (0.3, -0.4))
    preference_terms(chosen, rejected, by_name(name), 0.7).sum().backward()

    def loss(up, down):
        margin = 0.7 * (SLOPES[name](math.exp(up)) - SLOPES[name](math.exp(down)))
        return math.log1p(math.exp(-margin))

    step = 1e-5
    slope = (loss(0.3 + step, -0.4) - loss(0.3 - step, -0.4)) / (2 * step)
    assert slope < 0
    assert chosen.grad.item() == pytest.approx(slope, rel=1e-8)
    slope = (loss(0.3, -0.4 + step) - loss(0.3, -0.4 - step)) / (2 * step)
    assert slope > 0
    assert rejected.grad.item() == pytest.approx(slope, rel=1e-8)


def trl_loss(chosen, rejected, beta, divergence, coefficient=0.5):
    """TRL's own loss of one-token answers, whose log-ratio is their log-probability."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    logp = torch.cat([chosen, rejected]).unsqueeze(1)
    nothing = torch.zeros_like(logp)
    fake = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x
        ),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type=divergence,
        f_alpha_divergence_coef=coefficient,
        beta=beta,
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    outputs = SimpleNamespace(
        log_probs=logp, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
    )
    tokens = torch.ones(len(logp), 2, dtype=torch.long)
    inputs = {
        "input_ids": tokens,
        "attention_mask": tokens,
        "completion_mask": torch.tensor([[0, 1]]).expand(len(logp), 2),
        "ref_chosen_logps": torch.zeros_like(chosen),
        "ref_rejected_logps": torch.zeros_like(rejected),
    }
    return trainer._compute_loss(fake, lambda **_: outputs, inputs, return_outputs=False)


@pytest.mark.parametrize(
    ("name", "theirs", "coefficient"),
    [
        ("kl", "reverse_kl", 0.5),
        ("reverse_kl", "forward_kl", 0.5),
        ("js", "js_divergence", 0.5),
        # TRL's coefficient is one minus the paper's alpha.
        *((f"alpha({a})", "alpha_divergence", 1 - a) for a in (0.0, *ALPHAS, 1.0)),
    ],
)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_loss_and_gradient_are_trls(name, theirs, coefficient, beta):
    torch.manual_seed(0)
    ours = (2 * torch.randn(2, 32)).requires_grad_()
    yours = ours.detach().clone().requires_grad_()
    found = preference_terms(ours[0], ours[1], by_name(name), beta).mean()
    expected = trl_loss(yours[0], yours[1], beta, theirs, coefficient)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    found.backward(), expected.backward()
    torch.testing.assert_close(ours.grad, yours.grad, rtol=1e-5, atol=1e-6)


def test_exponents_are_held_where_trl_holds_them():
    far = torch.tensor([-400.0, -200.0, -159.0, -100.0, 0.0])
    ours, yours = (far.clone().requires_grad_() for _ in range(2))
    good, beta = torch.full_like(far, 200.0), 1e-36
    found = preference_terms(ours, good, alpha(0.5), beta).mean()
    expected = trl_loss(yours, good, beta, "alpha_divergence", 0.5)
    torch.testing.assert_close(found, expected)
    found.backward(), expected.backward()
    torch.testing.assert_close(ours.grad, yours.grad, rtol=1e-5, atol=0)
    assert (ours.grad < 0).tolist() == [False, False, True, True, True]


def test_labels_against_torchs_cross_entropy():
    torch.manual_seed(0)
    margin, label = 5 * torch.randn(3, 7, dtype=torch.float64), torch.rand(3, 7).double()
    for labels in (label, label[:1], torch.tensor(0.2).double()):
        expected = binary_cross_entropy_with_logits(
            margin, labels.expand_as(margin), reduction="none"
        )
        torch.testing.assert_close(bradley_terry_terms(margin, labels), expected)
    torch.testing.assert_close(
        bradley_terry_terms(margin, 0.9),
        0.9 * bradley_terry_terms(margin) + 0.1 * bradley_terry_terms(-margin),
    )
    torch.testing.assert_close(bradley_terry_terms(margin, 0.0), bradley_terry_terms(-margin))
    chosen, rejected = torch.randn(2, 5, dtype=torch.float64)
    torch.testing.assert_close(
        preference_terms(chosen, rejected, js(), 0.5, 0.0),
        preference_terms(rejected, chosen, js(), 0.5),
    )
    assert bradley_terry_terms(double(math.log(3))).item() == pytest.approx(math.log(4 / 3))
    assert bradley_terry_terms(double(math.log(3)), 0.25).item() == pytest.approx(
        0.25 * math.log(4 / 3) + 0.75 * math.log(4)
    )
    margin = double(-1e30, -40.0, 0.0, 2.0, 1e30).requires_grad_()
    label = double(1.0, 0.0, 0.5, 0.3, 1.0).requires_grad_()
    terms = bradley_terry_terms(margin, label)
    terms.sum().backward()
    assert terms[1].item() == pytest.approx(math.exp(-40), rel=1e-12)
    assert terms[0].item() == 1e30 and terms[-1].item() == 0.0
    torch.testing.assert_close(margin.grad, margin.detach().sigmoid() - label.detach())
    assert label.grad is None


@every
def test_far_log_ratios_stay_finite_and_keep_their_order(name):
    f = by_name(name)
    far = torch.tensor([-1e4, -200.0, -90.0, -5.0, 0.0, 5.0, 90.0, 200.0, 1e4])
    log_ratio = far.clone().requires_grad_()
    score = implicit_score(log_ratio, f)
    (slope,) = torch.autograd.grad(score.sum(), log_ratio)
    assert score.isfinite().all() and slope.isfinite().all()
    assert (score.diff() >= 0).all() and (slope >= 0).all()
    assert (slope[3:5] > 0).all()
    for chosen, rejected in itertools.product(far.tolist(), repeat=2):
        pair = torch.tensor([chosen, rejected], requires_grad=True)
        terms = preference_terms(pair[:1], pair[1:], f, 0.5)
        (slope,) = torch.autograd.grad(terms.sum(), pair)
        assert terms.isfinite().all() and slope.isfinite().all()


def test_only_exponentials_are_held():
    for f in (kl(), js(), alpha(0.0)):
        log_ratio = torch.tensor([-1e4, -200.0, -90.0], requires_grad=True)
        score = implicit_score(log_ratio, f)
        torch.testing.assert_close(score - score[0], log_ratio - log_ratio[0])
        score.sum().backward()
        assert log_ratio.grad.tolist() == [1.0, 1.0, 1.0]
    # exp(-c l) is held from l = -80 / c down.
    for f, power in [(reverse_kl(), 1), (neyman_chi2(), 2), (squared_hellinger(), 0.5)]:
        edge = -80 / power
        log_ratio = torch.tensor([edge + 1, edge - 1], requires_grad=True)
        score = implicit_score(log_ratio, f)
        score.sum().backward()
        assert score[0].item() == pytest.approx(-math.exp(80 - power), rel=1e-4)
        assert score[1].item() == pytest.approx(-math.exp(80), rel=1e-4)
        assert log_ratio.grad.tolist()[0] > 0 == log_ratio.grad.tolist()[1]


def test_half_precision_is_scored_in_single():
    log_ratio = torch.tensor([-30.0, -1.5, 20.0], dtype=torch.bfloat16)
    for f in (kl(), reverse_kl(), js(), alpha(0.5)):
        score = implicit_score(log_ratio, f)
        assert score.dtype == torch.float32
        assert score.equal(implicit_score(log_ratio.float(), f))


def test_refusals():
    numbers = torch.zeros(2)
    for f, value in [(total_variation(), "-0.5"), (pearson_chi2(), "-2"), (alpha(-0.5), "-2")]:
        with pytest.raises(ValueError, match=rf"f'\(0\) = -inf.*{value}"):
            implicit_score(numbers, f)
        with pytest.raises(ValueError, match=f.name.split("(")[0]):
            preference_terms(numbers, numbers, f, 0.1)
    for name in GENERATORS:
        if name not in ("total_variation", "pearson_chi2", "softened_kl"):
            assert implicit_score(numbers, by_name(name)).isfinite().all()
    for beta in (0.0, -0.1, INFINITY, float("nan")):
        with pytest.raises(ValueError, match="beta must be positive"):
            preference_terms(numbers, numbers, kl(), beta)
        with pytest.raises(ValueError, match="beta must be positive"):
            tilted(numbers, numbers, kl(), beta)
    for label in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="label must be"):
            bradley_terry_terms(numbers, label)
    with pytest.raises(ValueError, match="no inverse"):
        tilted(numbers, numbers, total_variation(), 1.0)
    with pytest.raises(ValueError, match="pi_ref > 0 and a finite reward"):
        tilted(torch.tensor([0.0, -INFINITY]), torch.tensor([-INFINITY, 1.0]), kl(), 1.0)


@pytest.mark.parametrize("name", OPTIMA)
def test_the_optima_of_the_table(name):
    found = tilted(REFERENCE.log(), REWARD, by_name(name), 0.5).exp()
    torch.testing.assert_close(found, double(*OPTIMA[name]), rtol=0, atol=6e-5)
    if name == "kl":
        expected = REFERENCE * (REWARD / 0.5).exp()
        torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-13, atol=0)


@every
def test_at_the_optimum_the_reward_is_the_score(name):
    torch.manual_seed(0)
    log_reference = torch.randn(4, 3, 9, dtype=torch.float64).log_softmax(-1)
    reward = 2 * torch.randn(4, 3, 9, dtype=torch.float64)
    for beta in (0.05, 0.5, 20.0):
        log_ratio = tilted(log_reference, reward, by_name(name), beta) - log_reference
        assert (log_ratio + log_reference).exp().sum(-1).allclose(double(1.0))
        score = log_ratio.exp().apply_(SLOPES[name])
        implied = beta * (score - score[..., :1])
        torch.testing.assert_close(implied, reward - reward[..., :1], rtol=1e-7, atol=1e-8)


def test_the_excluded_generator_puts_zeros_where_the_reward_is_low():
    # u = max(0, 1 + (r - lambda) / (2 beta)): one answer drops out, and with it its reward.
    low, lower = (
        tilted(torch.zeros(3), torch.tensor([2.0, 1.0, worst]), pearson_chi2(), 0.5).exp()
        for worst in (-3.0, -5.0)
    )
    torch.testing.assert_close(low, double(2 / 3, 1 / 3, 0.0))
    torch.testing.assert_close(low, lower)


def test_impossible_outcomes_equal_rewards_and_far_rewards():
    reference = torch.tensor([0.5, 0.3, 0.2, 0.0]).log()
    for name in SLOPES:
        f = by_name(name)
        found = tilted(reference, torch.tensor([1.0, 1.0, 1.0, 9.0]), f, 0.3).exp()
        torch.testing.assert_close(found, double(0.5, 0.3, 0.2, 0.0))
        found = tilted(reference + 3, torch.tensor([1.0, -INFINITY, 1.0, 0.0]), f, 0.3).exp()
        torch.testing.assert_close(found, double(5 / 7, 0.0, 2 / 7, 0.0))
        found = tilted(reference, torch.tensor([0.0, 0.0, 1e6, 0.0]), f, 1e-3).exp()
        torch.testing.assert_close(found, double(0.0, 0.0, 1.0, 0.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", OPTIMA)
def test_minimising_the_loss_recovers_the_optimum(name):
    f, pairs = by_name(name), list(itertools.permutations(range(6), 2))
    first, second = torch.tensor(pairs).T
    weight = REFERENCE[first] * REFERENCE[second]
    label = (REWARD[first] - REWARD[second]).sigmoid()
    logits = REFERENCE.log().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [logits],
        max_iter=300,
        tolerance_grad=1e-10,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss():
        optimiser.zero_grad()
        log_ratio = logits.log_softmax(-1) - REFERENCE.log()
        terms = preference_terms(log_ratio[first], log_ratio[second], f, 0.5, label)
        value = (weight * terms).sum() / weight.sum()
        value.backward()
        return value

    optimiser.step(loss)
    assert loss().item() == pytest.approx(0.586795, abs=1e-6)
    found = logits.detach().softmax(-1)
    assert (found - tilted(REFERENCE.log(), REWARD, f, 0.5).exp()).abs().sum() / 2 < 1e-6
    assert (found - double(*OPTIMA[name])).abs().sum() / 2 < 2e-4


def divergences(p, q):
    """KL(p||q), KL(q||p), twice Jensen-Shannon and the alpha-divergence at 1/2."""
    middle = (p + q) / 2
    return [
        (p * (p / q).log()).sum().item(),
        (q * (q / p).log()).sum().item(),
        (p * (p / middle).log() + q * (q / middle).log()).sum().item(),
        4 * (1 - (p * q).sqrt().sum()).item(),
    ]


def test_each_generator_is_the_most_efficient_in_its_own_divergence():
    table = {
        "kl": (0.5696, [0.7634, 0.7463, 0.3320, 0.7052]),
        "reverse_kl": (0.8584, [0.9406, 0.5506, 0.3084, 0.6720]),
        "js": (1.6352, [0.8481, 0.5691, 0.3014, 0.6491]),
        "alpha(0.5)": (0.7248, [0.8258, 0.5782, 0.3022, 0.6474]),
    }
    found = []
    for name, (beta, row) in table.items():
        low, high = 0.05, 20.0
        for _ in range(40):
            middle = math.sqrt(low * high)
            policy = tilted(REFERENCE.log(), REWARD, by_name(name), middle).exp()
            low, high = (middle, high) if (policy * REWARD).sum() > 1.2 else (low, middle)
        assert low == pytest.approx(beta, abs=1e-3)
        found.append(divergences(policy, REFERENCE))
        assert found[-1] == pytest.approx(row, abs=1e-3)
    matrix = torch.tensor(found)
    assert matrix.argmin(0).tolist() == [0, 1, 2, 3]


TEXTBOOK = {
    "kl": lambda u: u * u.log(),
    "reverse_kl": lambda u: -u.log(),
    "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "pearson_chi2": lambda u: (u - 1) ** 2,
    "neyman_chi2": lambda u: (u - 1) ** 2 / u,
    "squared_hellinger": lambda u: (u.sqrt() - 1) ** 2,
    "total_variation": lambda u: (u - 1).abs() / 2,
    "alpha(0.3)": lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7),
    "alpha(2.0)": lambda u: (u**-1 + u - 2) / 2,
}


@pytest.mark.parametrize("name", TEXTBOOK)
def test_mean_penalty_under_the_policy_is_the_divergence(name):
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 9, dtype=torch.float64).softmax(-1)
    terms = penalty_terms((policy / reference).log(), by_name(name))
    exact = (reference * TEXTBOOK[name](policy / reference)).sum()
    assert (policy * terms).sum().item() == pytest.approx(exact.item(), rel=1e-12)
    log_ratio = torch.linspace(-6, 6, 49, dtype=torch.float64)
    assert (penalty_terms(log_ratio, by_name(name)) >= -1e-14).all()
    assert penalty_terms(double(0.0), by_name(name)).item() == 0.0
    later = {"jeffreys", "softened_kl", "softened_reverse_kl"}  # See test_divergences.
    assert set(GENERATORS) - later < set(TEXTBOOK)


def test_penalties_are_those_of_the_official_code():
    log_ratio = torch.linspace(-3, 3, 25, dtype=torch.float64)
    k = (-log_ratio).exp()
    expected = {
        "kl": -k.log() + (k - 1),
        "reverse_kl": k * k.log() - (k - 1),
        "js": k * k.log() - (k + 1) * ((k + 1) / 2).log(),
        # The a of its PPO penalty is the paper's; its evaluation script passes 1 - a.
        "alpha(0.3)": (k**0.3 - 0.3 * k - 0.7) / (0.3 * -0.7),
    }
    for name, numbers in expected.items():
        torch.testing.assert_close(penalty_terms(log_ratio, by_name(name)), numbers)
    assert not penalty_terms(log_ratio, alpha(0.7)).allclose(expected["alpha(0.3)"], rtol=0.1)


def test_nothing_waits_for_the_device():
    numbers = torch.zeros(3, device="meta")
    for name in SLOPES:
        assert preference_terms(numbers, numbers, by_name(name), 0.1, numbers).is_meta
        assert penalty_terms(numbers, by_name(name)).is_meta
