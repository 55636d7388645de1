"""Every method computes where it is told to: tensors that say they are on a GPU, and refuse others."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from esscher.registry import catalogue
from esscher.runtime.device import RuntimeConfig
from pretended_gpu import GPU, OnGpu, pretended_gpu
from support import advance, parts_after, smoke, take_over

CUDA = RuntimeConfig(device="cuda", threads=1, graph="eager")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("slug", list(catalogue()))
def test_it_learns_is_judged_and_goes_on_where_it_is_told(
    slug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = replace(smoke(slug).evaluation, episodes=2, step_limit=20)
    experiment = smoke(slug, runtime=CUDA, evaluation=judged)
    with pretended_gpu(monkeypatch):
        parts, others = parts_after(experiment, 2), parts_after(experiment, 1)
        parts.world.evaluate(parts.method, 0)
        for name, weight in parts.method.policy.named_parameters():
            assert weight.device == GPU, name
        take_over(parts, others)
        advance(others, experiment, 1)
        for part in (parts, others):
            part.close()


def test_the_pretence_refuses_what_a_gpu_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.arange(3.0)
    with pretended_gpu(monkeypatch):
        there = here.to("cuda")
        assert (
            there.device == GPU and here.device.type == "cpu" and there.cpu().device.type == "cpu"
        )
        for wrong in (
            lambda: here + there,
            lambda: torch.cat([there, here]),
            lambda: here[there.long()],
            lambda: torch.where(there > 1, here, there),
            lambda: nn.Linear(3, 2)(there),
            lambda: torch.randn(3, device="cuda", generator=torch.Generator()),
            lambda: there.clone().uniform_(generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match=r"different devices|generator"):
                wrong()
        for reading in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match=r"Tensor.cpu\(\)"):
                reading()


def test_the_pretence_permits_what_a_gpu_permits(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.arange(3.0)
    with pretended_gpu(monkeypatch):
        there = here.to("cuda")
        made = (
            torch.ones(3, device=there.device),
            torch.zeros_like(there),
            there.new_tensor([1, 2, 3]),
        )
        numbers = (
            there + here[2],
            there[here.long()],
            there.type_as(made[0]),
            here.to(there),
            2 * there,
        )
        assert all(isinstance(x, OnGpu) for x in (*made, *numbers))
        into = torch.zeros(3)
        into.copy_(there)
        assert type(into) is torch.Tensor and into.tolist() == there.tolist() == [0, 1, 2]

        tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        tied[1].weight = tied[0].weight
        weights = list(tied.parameters())
        assert next(tied.to("cuda").parameters()) is weights[0] and tied[1].weight is weights[0]
        twin = copy.deepcopy(tied)
        assert twin[1].weight is twin[0].weight is not weights[0]
        for module in (tied, twin):
            module(there).sum().backward()
            gradients = torch.autograd.grad(module(there).sum(), list(module.parameters()))
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                assert isinstance(parameter, nn.Parameter) and parameter.device == GPU
                assert gradient.device == GPU and torch.equal(parameter.grad, gradient)
