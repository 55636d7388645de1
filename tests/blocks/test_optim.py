"""One optimiser step against torch.optim, and who receives a gradient."""

import pytest
import torch
from torch import nn

from esscher.nn.mlp import MLP
from esscher.runtime.optim import Optim, polyak


def pair() -> tuple[MLP, MLP]:
    torch.manual_seed(0)
    first = MLP((3, 8, 2))
    second = MLP((3, 8, 2))
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [None, 0.05, 1e3])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9)])
def test_equals_torch_step_for_step(
    weight_decay: float, max_grad_norm: float | None, betas: tuple[float, float]
) -> None:
    ours, theirs = pair()
    mine = Optim(
        ours.parameters(),
        3e-2,
        betas=betas,
        epsilon=1e-5,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
    )
    kind = torch.optim.AdamW if weight_decay else torch.optim.Adam
    reference = kind(theirs.parameters(), 3e-2, betas, 1e-5, weight_decay)
    for step in range(12):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step)) * (1 + step)
        mine.minimize(ours(x).square().mean())
        reference.zero_grad()
        theirs(x).square().mean().backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(theirs.parameters(), max_grad_norm)
        reference.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_may_lie_in_memory_as_they_like() -> None:
    """Those of convolutions may have the channels last, and the fused kernel reads memory in order."""
    torch.manual_seed(0)
    gradient = torch.randn(4, 3, 3, 2).permute(0, 3, 1, 2)
    assert not gradient.is_contiguous()
    parameter, other = (nn.Parameter(torch.zeros(4, 2, 3, 3)) for _ in range(2))
    Optim([parameter], 1e-2).apply([gradient])
    reference = torch.optim.Adam([other], 1e-2)
    other.grad = gradient.contiguous()
    reference.step()
    torch.testing.assert_close(parameter, other)
    # Adam's first step is the gradient's sign: a scrambled gradient would show there.
    torch.testing.assert_close(parameter.detach(), -1e-2 * gradient.sign(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_traced_step_is_the_fused_step(weight_decay: float) -> None:
    """Compiled pieces take the one, eager code the other: the same moments and parameters."""
    torch.manual_seed(0)
    start = [torch.randn(3, 4), torch.randn(()), torch.randn(7)]
    params = [[nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    settings = {"betas": (0.8, 0.99), "epsilon": 1e-3, "weight_decay": weight_decay}
    fused, traced = (Optim(own, 3e-2, **settings) for own in params)
    with torch.no_grad():
        for step in range(12):
            gradients = [torch.randn_like(p) * 10 ** (step % 3 - 2) for p in start]
            for optim in (fused, traced):
                optim.num_steps.add_(1)
            fused._fused_step([g.clone() for g in gradients])
            traced._traced_step(gradients)
            for name in ("_params", "first_moment", "second_moment"):
                pairs = zip(getattr(fused, name), getattr(traced, name), strict=True)
                for one, other in pairs:
                    torch.testing.assert_close(one, other, rtol=2e-6, atol=1e-7)


def test_no_other_network_receives_a_gradient() -> None:
    ours, other = pair()
    optim = Optim(ours.parameters(), 1e-3)
    before = [p.clone() for p in other.parameters()]
    marker = torch.full_like(next(other.parameters()), 7.0)
    next(other.parameters()).grad = marker
    x = torch.randn(4, 3, requires_grad=True)
    optim.minimize((ours(x) * other(x)).sum())
    gradients = [p.grad for p in other.parameters()]
    assert gradients[0] is marker and marker.eq(7).all()
    assert all(gradient is None for gradient in gradients[1:]) and x.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_gradients_that_others_left_are_neither_used_nor_touched() -> None:
    ours, theirs = pair()
    optim, reference = Optim(ours.parameters(), 1e-3), Optim(theirs.parameters(), 1e-3)
    x = torch.randn(4, 3)
    for parameter in ours.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    optim.minimize(ours(x).sum())
    reference.minimize(theirs(x).sum())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other) and mine.grad.eq(7).all() and other.grad is None


def test_a_parameter_that_the_loss_does_not_reach_stays() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    Optim([used, unused], 0.1).minimize(used.sum())
    assert torch.equal(unused, torch.ones(2)) and not torch.equal(used, torch.ones(2))


def test_state_continues_exactly() -> None:
    first, second = pair()
    one, two = Optim(first.parameters(), 1e-2), Optim(second.parameters(), 1e-3)
    x = torch.randn(4, 3)
    for _ in range(3):
        one.minimize(first(x).square().sum())
        two.minimize(second(x).sum())
    second.load_state_dict(first.state_dict())
    two.load_state_dict(
        {k: v.clone() if torch.is_tensor(v) else v for k, v in one.state_dict().items()}
    )
    for _ in range(3):
        one.minimize(first(x).square().sum())
        two.minimize(second(x).square().sum())
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        Optim([], 1e-3)
    with pytest.raises(ValueError, match="learning_rate"):
        Optim([nn.Parameter(torch.ones(1))], 0.0)


def test_polyak_moves_the_share_tau() -> None:
    target, source = pair()
    for parameter in source.parameters():
        parameter.data.add_(1.0)
    before = [p.clone() for p in target.parameters()]
    kept = [p.clone() for p in source.parameters()]
    polyak(target, source, 0.25)
    for now, old, new in zip(target.parameters(), before, kept, strict=True):
        torch.testing.assert_close(now.data, 0.75 * old + 0.25 * new)
    assert all(torch.equal(a, b) for a, b in zip(kept, source.parameters(), strict=True))
    polyak(target, source, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), kept, strict=True))
