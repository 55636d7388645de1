"""Models of chunks of actions with known answers, for proofs and tests.

Use them where a trained policy is asked for: `--method.policy esscher.chunk_models:dodge_expert`. Your
own is a function of the same kind: called with the task's specification, it returns a
`esscher.distributions.chunks.ChunkModel`; `esscher.adapters.chunk_models.from_diffusers` makes one of
an eps-network and a scheduler of diffusers.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from esscher.distributions.chunks import ChunkModel
from esscher.distributions.goals import GoalColumns, Observed
from esscher.envs import Dodge
from esscher.functional.diffusion import alpha_bars
from esscher.nn.scaling import Scaling
from esscher.types import Spec


class DodgeExpert(nn.Module):
    """The exact noise in chunks of esscher.envs:Dodge's expert, at every level.

    A chunk goes to one side m = +-1: u = clip(4 (0.6 m - y), -1, 1), run without noise from the
    observed y, and its numbers have deviation `std`. Both sides are equally likely while |y| < 0.3,
    then only that where one is. So clean chunks are a mixture of two Gaussians, and so are noisy ones.
    """

    alpha_bars: Tensor
    decided = 0.3

    def __init__(self, kept: Float[Tensor, "k"], horizon: int, std: float):
        super().__init__()
        self.horizon, self.std = horizon, std
        self.register_buffer("alpha_bars", kept.double())

    def forward(
        self,
        z: Float[Tensor, "b h a"],
        level: Float[Tensor, "b"],
        condition: Float[Tensor, "b 2"],
    ) -> Float[Tensor, "b h a"]:
        kept = self.alpha_bars[level.long()].view(-1, 1, 1)
        x, noise = z.double() / kept.sqrt(), (1 - kept) / kept
        height = condition[:, 1].double()
        means, spread = self.means(height), self.std**2
        distance = (x.squeeze(-1) - means).square().sum(-1)
        logits = -distance / (2 * (spread + noise.view(1, -1)))
        sides = torch.tensor([1.0, -1.0], device=z.device).view(2, 1)
        apart = (height.abs() >= self.decided) & (height * sides < 0)
        share = logits.masked_fill(apart, -torch.inf).softmax(0).unsqueeze(-1)
        mean = (share * means).sum(0).unsqueeze(-1)
        clean = (spread * x + noise * mean) / (spread + noise)
        return ((z.double() - kept.sqrt() * clean) / (1 - kept).sqrt()).to(z.dtype)

    def means(self, height: Float[Tensor, "b"]) -> Float[Tensor, "2 b h"]:
        """The clean chunks of both sides."""
        sides = torch.tensor([1.0, -1.0], dtype=height.dtype, device=height.device).view(2, 1)
        y, rows = height.expand(2, -1), []
        for _ in range(self.horizon):
            rows.append((Dodge.drift * (Dodge.target * sides - y)).clamp(-1, 1))
            y = y + Dodge.stride * rows[-1]
        return torch.stack(rows, -1)


def dodge_expert(spec: Spec) -> ChunkModel:
    """Chunks of 8 velocities in esscher.envs:Dodge, by their exact denoiser; 100 levels."""
    return _dodge_expert(spec, 100)


def quick_dodge_expert(spec: Spec) -> ChunkModel:
    """The same with 10 levels."""
    return _dodge_expert(spec, 10)


def _dodge_expert(spec: Spec, levels: int) -> ChunkModel:
    kept = alpha_bars("squaredcos_cap_v2", levels)
    observed = Observed(spec.obs_dim, GoalColumns(), "none")
    observed.scaling = Scaling.identity(spec.obs_dim, "observation")
    actions = Scaling.identity(spec.action_dim, "action")
    network = DodgeExpert(kept, 8, 0.05)
    return ChunkModel(network, kept, observed, actions, horizon=8, obs_steps=1)
