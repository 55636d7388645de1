"""Generative distribution embeddings: invariances of the trained encoder, what the loss reaches, that
the vector matters, and that distances and draws are right where the answer is known.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import esscher
from esscher.errors import UserError
from esscher.experience.sets import Groups, SetData
from esscher.experiment import SetConfig
from esscher.methods.applied.gde import Config, _judge_geometry, _judge_poisson, _ranks
from esscher.registry import recipes
from esscher.runtime.rng import Phase, seed_phase
from esscher.types import Sets, SetSpec
from support import learner

SPEC = SetSpec(shape=(2,), mean=(0.0, 0.0), std=(1.0, 1.0))
SMALL = {"latent": 4, "width": 16, "generator_width": 16, "noise_steps": 8}
GENERATORS = ["ddpm", "cvae", "sliced_w2", "mmd", "sinkhorn"]


def gde(spec=SPEC, **options):
    return learner("gde", spec, **{**SMALL, **options})


def sets(count, size, seed=0, mask=None):
    """Of Gaussians whose mean and deviation differ from set to set."""
    draw = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(count, 1, 2, generator=draw)
    spread = 0.2 + torch.rand(count, 1, 2, generator=draw)
    x = mean + spread * torch.randn(count, size, 2, generator=draw)
    return Sets(x=x, mask=mask, number=torch.arange(count))


def trained(steps=150, **options):
    method = gde(learning_rate=3e-3, **options)
    for step in range(steps):
        seed_phase(0, step, Phase.UPDATE)
        method.update(sets(16, 32, seed=step), step)
    return method


# ---- invariance, after training


@pytest.fixture(scope="module")
def ddpm():
    return trained()


def test_a_trained_encoder_sees_the_empirical_measure_alone(ddpm):
    x = sets(5, 40, seed=10_001).x
    z = ddpm.embed(x)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert (ddpm.embed(x[:, order]) - z).abs().max() < 1e-5
    for times in (2, 5):
        assert (ddpm.embed(x.repeat(1, times, 1)) - z).abs().max() < 1e-5
    assert torch.pdist(z).min() > 0.05, "but different sets are different"


def test_sums_fail_in_training_too():
    method = trained(40, encoder="sum_pooled")
    x = sets(5, 40, seed=10_001).x
    z = method.embed(x)
    assert (method.embed(x.repeat(1, 2, 1)) - z).norm(dim=-1).min() > 0.5


# ---- the loss


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_loss_reaches_encoder_and_generator(generator):
    method = gde(generator=generator, code=2)
    batch = sets(6, 12)
    before = {name: p.clone() for name, p in method.policy.named_parameters()}
    told = method.update(batch, 0)
    for name, parameter in method.policy.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    assert torch.isfinite(told["loss"])


@pytest.mark.parametrize("generator", GENERATORS)
def test_the_vector_of_another_set_explains_less(generator):
    """The generator could ignore z; then the loss would be the same."""
    method = trained(generator=generator, code=2, steps=120, iterations=10, epsilon=0.5)
    batch = sets(24, 32, seed=10_002)
    z = method.embed(batch.x)
    with torch.no_grad():

        def loss(vectors):
            seed_phase(0, 0, Phase.EVALUATE)
            if generator == "cvae":
                error, kl = method.generator.parts(batch.x, vectors, None)
                return (error + method.cfg.kl_weight * kl).mean().item()
            return method.generator.terms(batch.x, vectors, None).mean().item()

        own, others = loss(z), loss(z.roll(1, 0))
    assert others > 1.2 * own


def test_each_set_counts_as_much_whatever_its_size():
    method = gde(generator="mmd", code=2)
    one, two = sets(1, 6), sets(1, 3, seed=1)
    x = torch.cat([one.x, torch.cat([two.x, torch.full((1, 3, 2), 7.0)], 1)])
    mask = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    method.generator.draw = lambda z, noise: torch.zeros(len(z), noise(0).shape[1], 2)
    whole, _ = method.loss(x, mask, 0.0)
    terms = [method.loss(single.x, None, 0.0)[0] for single in (one, two)]
    assert whole.item() == pytest.approx((terms[0] + terms[1]).item() / 2, rel=1e-5)


def test_kl_weight_and_its_warmup():
    method = gde(generator="cvae", kl_weight=0.5, kl_warmup=4)
    x = sets(4, 8).x
    seed_phase(0, 0, Phase.UPDATE)
    loss, told = method.loss(x, None, 0.5)
    assert loss.item() == pytest.approx((told["error"] + 0.5 * told["kl"]).item())
    weights = []
    loss_of = method.loss
    method._loss = lambda x, mask, weight, _: (weights.append(weight), loss_of(x, mask, weight))[1]
    for step in range(6):
        method.update(sets(4, 8), step)
    assert weights == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_the_step_falls_along_half_a_cosine():
    method = gde(learning_rate=0.01, cosine_updates=4)
    rates = []
    for step in range(5):
        method.update(sets(4, 8), step)
        rates.append(method.opt.learning_rate)
    half = math.sqrt(0.5)
    assert rates == pytest.approx([0.01 * (1 + c) / 2 for c in (1, half, 0, -half, -1)])


def test_other_samples_are_explained_than_those_that_were_seen():
    method = gde(explained="others")
    seen, asked = [], []
    method.encoder.register_forward_hook(lambda _, told, __: seen.append(told))
    method.generator.terms = lambda x, z, mask: (asked.append((x, mask)), z.sum(-1))[1]
    x = torch.arange(7.0).view(1, 7, 1).expand(2, 7, 2)
    mask = torch.tensor([[True] * 7, [True] * 3 + [False] * 4])
    method.loss(x, mask, 0.0)
    assert seen[0][0][0, :, 0].tolist() == [0, 2, 4, 6] and asked[0][0][0, :, 0].tolist() == [
        1,
        3,
        5,
    ]
    assert seen[0][1][1].tolist() == [True, True, False, False]
    assert asked[0][1][1].tolist() == [True, False, False]
    data = SetData(
        name="made",
        x=torch.zeros(40, 2),
        training=(own := Groups(["a"], [np.arange(40)])),
        held_out=own,
        size=8,
        seed=0,
    )
    for explained, size in (("same", 8), ("others", 16)):
        (batch,) = gde(explained=explained, batch_size=2).experience(data).batches(1)
        assert batch.x.shape[1] == size, "as many are seen in both"


# ---- classes


CLASSES = replace(SPEC, classes=("left", "right"))


def labelled(count, seed, unknown=0):
    """Whether a set's mean lies to the right; of the first ones that is not told."""
    batch = sets(count, 40, seed=seed)
    label = (batch.x[..., 0].mean(1) > 0).long()
    label[:unknown] = -1
    return replace(batch, label=label)


def test_the_loss_of_classes_by_hand_and_without_what_is_not_known():
    method = gde(CLASSES, class_weight=2.0, generator="mmd", code=2)
    batch = labelled(5, 0, unknown=2)
    with torch.no_grad():
        method.classifier.weight.zero_()
        method.classifier.bias.copy_(torch.tensor([math.log(3.0), 0.0]))
    seed_phase(0, 0, Phase.UPDATE)
    loss, told = method.loss(batch.x, None, 0.0, batch.label)
    seed_phase(0, 0, Phase.UPDATE)
    without, _ = method.loss(batch.x, None, 0.0)
    chances = [(0.75, 0.25)[c] for c in batch.label[2:].tolist()]
    expected = -sum(map(math.log, chances)) / 3
    assert told["class_loss"].item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(without.item() + 2 * expected, rel=1e-5)
    unknown = torch.full((5,), -1)
    assert method.loss(batch.x, None, 0.0, unknown)[1]["class_loss"].item() == 0


def test_classes_are_learned_from_the_sets_whose_class_is_known():
    method = gde(CLASSES, class_weight=1.0, generator="cvae", code=2, learning_rate=3e-3)
    for step in range(150):
        seed_phase(0, step, Phase.UPDATE)
        method.update(labelled(16, step, unknown=8), step)
    batch = labelled(200, 10_005)
    found = method.classify(method.embed(batch.x))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(200))
    assert (found.argmax(-1) == batch.label).float().mean() > 0.9
    with pytest.raises(UserError, match="class_weight needs two classes or more"):
        gde(class_weight=1.0)


# ---- draws


def test_draws_are_by_seed_and_not_by_their_neighbours(ddpm):
    z = ddpm.embed(sets(3, 20).x)
    drawn = ddpm.draw(z, 6, [5, 6, 7])
    torch.testing.assert_close(drawn[1:2], ddpm.draw(z[1:2], 6, [6]))
    assert not torch.allclose(drawn[:1], ddpm.draw(z[:1], 6, [8]))


def test_draws_in_parts_are_those_at_once(ddpm, monkeypatch):
    z = ddpm.embed(sets(5, 20).x)
    whole = ddpm.draw(z, 6, range(5))
    monkeypatch.setattr("esscher.methods.applied.gde.AT_ONCE", 13)
    torch.testing.assert_close(ddpm.draw(z, 6, range(5)), whole)


def test_a_large_set_is_embedded_in_parts_where_that_is_exact(monkeypatch):
    x = sets(3, 50).x
    for encoder in ("kernel_mean", "residual"):
        method = gde(encoder=encoder)
        whole, sizes = method.embed(x), []
        method.encoder.body.register_forward_hook(
            lambda _, told, __, sizes=sizes: sizes.append(told[0].shape[1])
        )
        with monkeypatch.context() as patch:
            patch.setattr("esscher.methods.applied.gde.AT_ONCE", 20)
            assert (method.embed(x) - whole).abs().max() < 1e-5
        assert sizes == ([20, 20, 10] * 3 if encoder == "kernel_mean" else [50])


def test_a_trained_model_draws_the_set_that_it_saw(ddpm):
    batch = sets(12, 400, seed=10_003)
    drawn = ddpm.draw(ddpm.embed(batch.x), 400, range(12))
    gap = (drawn.mean(1) - batch.x.mean(1)).norm(dim=-1)
    spread = torch.pdist(batch.x.mean(1)).mean()
    assert gap.mean() < 0.25 * spread


def test_distances_of_vectors_rank_as_those_of_means_do(ddpm):
    x = sets(25, 300, seed=10_004).x
    means = x.mean(1)
    assert _ranks(ddpm.embed(x), torch.cdist(means, means)) > 0.8


# ---- settings and the proof's own arithmetic


def test_settings_that_do_not_fit_together_are_refused():
    with pytest.raises(UserError, match="latent must be even for kernel_mean, got 5"):
        Config(encoder="kernel_mean", latent=5)
    with pytest.raises(UserError, match="heads must be a divisor of width = 128, got 3"):
        Config(encoder="attention", heads=3)
    with pytest.raises(UserError, match=r"beta_start must be in \(0, beta_end\], got 0.5"):
        Config(beta_start=0.5)


def test_every_encoder_trains_in_a_run(tmp_path):
    whole = recipes("gde")["smoke"]()
    method = replace(whole.method, encoder="kernel_mean", explained="others")
    whole = replace(
        whole,
        method=method,
        stages=(replace(whole.stages[-1], steps=4, sets=SetConfig(size=20)),),
        evaluation=replace(whole.evaluation, every=0),
    )
    esscher.run(whole, directory=tmp_path / "run", display=False)
    assert (tmp_path / "run" / "embeddings.csv").read_text().count("\n") == 25


def test_ranks_of_a_line_are_perfect_and_of_its_reverse_are_not():
    z = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert _ranks(z, torch.cdist(z, z).double() ** 2) == pytest.approx(1)
    assert _ranks(z, -torch.cdist(z, z).double()) == pytest.approx(-1)


def test_the_sheets_rules():
    good = {
        "gde": {"rank correlation": [0.96], "error": [0.3]},
        "kernel mean": {"rank correlation": [0.86], "error": [0.26]},
        "sum": {"rank correlation": [0.6], "error": [36.3]},
    }
    assert all(check.passed for check in _judge_geometry(good))
    near = {**good, "kernel mean": {"rank correlation": [0.92], "error": [0.26]}}
    assert [check.passed for check in _judge_geometry(near)] == [False, True, True]
    near = {**good, "sum": {"rank correlation": [0.6], "error": [2.9]}}
    assert [check.passed for check in _judge_geometry(near)] == [True, True, False]


def test_the_sheets_rule_of_estimators():
    found = {"posterior mean": [5.0], "Rao-Blackwell": [7.0], "share of zeros": [13.0]}
    for error, passed in ((4.0, [False, True]), (6.0, [True, True]), (9.0, [True, False])):
        checks = _judge_poisson({"gde": {"gde": [error], **found}})
        assert [check.passed for check in checks] == passed


def test_errors_of_the_sheets_estimators():
    """Exact sums over the count's law: the total of ten is negative binomial for a Gamma(4, 2) rate."""
    from scipy.integrate import quad
    from scipy.stats import gamma, nbinom, poisson

    def error(estimate):
        """E (estimate(total) - e^-rate)^2 by an integral over the rate."""
        totals = np.arange(400)

        def at(rate):
            gaps = (estimate(totals) - math.exp(-rate)) ** 2
            return gamma.pdf(rate, 4, scale=0.5) * (poisson.pmf(totals, 10 * rate) * gaps).sum()

        return quad(at, 0, 20, limit=200)[0]

    assert error(lambda total: 0.9**total) == pytest.approx(0.006661, abs=2e-6)
    assert error(lambda total: (12 / 13) ** (4 + total)) == pytest.approx(0.004948, abs=2e-6)
    # The share of zeros is unbiased: its error is E p (1 - p) / 10, with E p^k = (2 / (2 + k))^4.
    expected = ((2 / 3) ** 4 - (2 / 4) ** 4) / 10
    assert expected == pytest.approx(0.013503, abs=1e-6)
    assert nbinom.pmf(np.arange(400), 4, 2 / 12).sum() == pytest.approx(1)
    # The best that the paper's loss can find given the total: the expected share of zeros, 0.9^total.
    total, rate = 7, 1.3
    first_zero = poisson.pmf(0, rate) * poisson.pmf(total, 9 * rate) / poisson.pmf(total, 10 * rate)
    assert first_zero == pytest.approx(0.9**total)
