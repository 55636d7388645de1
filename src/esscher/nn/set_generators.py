"""Conditional generators: from a vector z that stands for a distribution to samples of it.

Each has `terms`, the loss of every set given its vector (of the variational one `parts`), and `draw`:
as many samples of each vector as there is noise for. Samples are vectors of about unit scale.

| kind | sample | loss of a set |
|---|---|---|
| ddpm | denoised in T steps | mean |eps - eps_theta(x_t, z, t / T)|^2 |
| cvae | decoder(code, z), code ~ N(0, I) | mean |x - decoder|^2 + beta KL(q(code | x, z) || N(0, I)) |
| sliced_w2, mmd, sinkhorn | g(noise, z), noise ~ N(0, I) | a distance of drawn from real samples |

Source: Generative Distribution Embeddings (arXiv 2505.18150), sec. 3 and appendix A.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from esscher.functional.diffusion import alpha_bars, denoised_of, reverse_kernel, sigma_of_alpha_bar
from esscher.functional.reductions import masked_mean
from esscher.functional.transport import (
    mmd_terms,
    random_directions,
    sinkhorn_divergence_terms,
    sliced_w2_terms,
)
from esscher.nn.mlp import MLP

Distance = Literal["sliced_w2", "mmd", "sinkhorn"]
Mask = Bool[Tensor, "b m"] | None
Noise = Callable[[int], Tensor]
"""Number of a step, counted from 0 -> standard normal noise of that step."""


def mean_of_sets(terms: Float[Tensor, "b m"], mask: Mask) -> Float[Tensor, "b"]:
    """Of each set, over the samples that are there."""
    return terms.mean(1) if mask is None else masked_mean(terms, mask, dim=1)


def _with(z: Float[Tensor, "b l"], *parts: Float[Tensor, "b m _"]) -> Float[Tensor, "b m _"]:
    """Parts of each sample, and the vector of its set behind them."""
    told = z.unsqueeze(1).expand(-1, parts[0].shape[1], -1)
    return torch.cat([*parts, told], -1)


class DiffusionGenerator(nn.Module):
    """Denoising diffusion: a perceptron that predicts the noise, drawn from by ancestral steps.

    Args:
        dim: of a sample.
        latent: of z.
        width: of the hidden layers.
        layers: hidden ones.
        steps: T.
        betas: of the first and the last step; a straight line between them.
    """

    alpha_bar: Tensor

    def __init__(
        self,
        dim: int,
        latent: int,
        width: int,
        layers: int,
        steps: int,
        betas: tuple[float, float],
    ):
        super().__init__()
        self.dim, self.steps = dim, steps
        self.network = MLP([dim + latent + 1, *[width] * layers, dim], "selu")
        table = alpha_bars("linear", steps, *betas).float()
        self.register_buffer("alpha_bar", table, persistent=False)

    def noise_shape(self, count: int) -> tuple[int, int]:
        """Of one draw of noise for so many samples."""
        return count, self.dim

    def terms(
        self, x: Float[Tensor, "b m d"], z: Float[Tensor, "b l"], mask: Mask
    ) -> Float[Tensor, "b"]:
        step = torch.randint(self.steps, x.shape[:2], device=x.device)
        noise = torch.randn_like(x)
        kept = self.alpha_bar[step].unsqueeze(-1)
        noisy = kept.sqrt() * x + (1 - kept).sqrt() * noise
        error = (noise - self.predicted(noisy, z, step)).square().mean(-1)
        return mean_of_sets(error, mask)

    def predicted(
        self, noisy: Float[Tensor, "b m d"], z: Float[Tensor, "b l"], step: Tensor
    ) -> Float[Tensor, "b m d"]:
        """The noise in sqrt(abar) x + sqrt(1 - abar) eps; steps count from 0, and the network is told
        t / T with t from 1.
        """
        place = ((step + 1) / self.steps).to(noisy).unsqueeze(-1).expand(*noisy.shape[:2], 1)
        return self.network(_with(z, noisy, place))

    def draw(self, z: Float[Tensor, "b l"], noise: Noise) -> Float[Tensor, "b m d"]:
        """Ancestral sampling, with sigma_t^2 = beta_t.

        In coordinates x = x0 + sigma eps the mean of a step is that of the reverse kernel at eta 1,
        whose variance is the posterior's; beta_t is (sigma^2 - next^2) alpha_t there, a little more.
        The last step has no noise.

        Source: Ho et al. 2020 (DDPM, arXiv 2006.11239), algorithm 2 and sec. 3.2.
        """
        sigma = sigma_of_alpha_bar(self.alpha_bar)
        zero = sigma.new_zeros(())
        x = noise(0) * (1 + sigma[-1].square()).sqrt()  # N(0, I) in the network's coordinates.
        for step in range(self.steps - 1, -1, -1):
            here, following = sigma[step], sigma[step - 1] if step else zero
            scale = (1 + here.square()).rsqrt()
            eps = self.predicted(x * scale, z, torch.full((len(x), 1), step, device=x.device))
            denoised = denoised_of("epsilon", eps, x, here)
            x, _ = reverse_kernel(x, denoised, here, following, 1.0)
            if step:
                alpha = (1 + following.square()) * scale.square()
                spread = ((here.square() - following.square()) * alpha).sqrt()
                x = x + spread * noise(self.steps - step)
        return x


class VariationalGenerator(nn.Module):
    """A conditional variational autoencoder; its decoder's mean is what is drawn.

    Args:
        dim: of a sample.
        latent: of z.
        width: of the hidden layers.
        layers: hidden ones, of encoder and decoder each.
        code: components of the code.
    """

    def __init__(self, dim: int, latent: int, width: int, layers: int, code: int):
        super().__init__()
        self.code = code
        self.encoder = MLP([dim + latent, *[width] * layers, 2 * code], "selu")
        self.decoder = MLP([code + latent, *[width] * layers, dim], "selu")

    def noise_shape(self, count: int) -> tuple[int, int]:
        """Of one draw of noise for so many samples."""
        return count, self.code

    def parts(
        self, x: Float[Tensor, "b m d"], z: Float[Tensor, "b l"], mask: Mask
    ) -> tuple[Float[Tensor, "b"], Float[Tensor, "b"]]:
        """Mean squared error and KL of each set, both means over components.

        KL = -1/2 mean(1 + log v - mu^2 - v) of the code's N(mu, v) from N(0, I), nats a component.
        """
        mean, log_variance = self.encoder(_with(z, x)).chunk(2, -1)
        code = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        error = (x - self.decoder(_with(z, code))).square().mean(-1)
        kl = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).mean(-1)
        return mean_of_sets(error, mask), mean_of_sets(kl, mask)

    def draw(self, z: Float[Tensor, "b l"], noise: Noise) -> Float[Tensor, "b m d"]:
        return self.decoder(_with(z, noise(0)))


class DirectGenerator(nn.Module):
    """x = g(noise, z), trained by a distance between drawn and real sets, through the samples.

    Args:
        dim: of a sample.
        latent: of z.
        width: of the hidden layers.
        layers: hidden ones.
        code: components of the noise.
        distance: sliced_w2 (squared), mmd (squared, its bandwidth the median distance) or sinkhorn
            (debiased, half a squared distance).
        projections: random directions of sliced_w2, drawn anew for each loss.
        epsilon: of sinkhorn, in units of half a squared distance.
        iterations: of sinkhorn.
    """

    def __init__(
        self,
        dim: int,
        latent: int,
        width: int,
        layers: int,
        code: int,
        distance: Distance,
        projections: int,
        epsilon: float,
        iterations: int,
    ):
        super().__init__()
        self.code, self.distance, self.projections = code, distance, projections
        self.epsilon, self.iterations = epsilon, iterations
        self.network = MLP([code + latent, *[width] * layers, dim], "selu")

    def noise_shape(self, count: int) -> tuple[int, int]:
        """Of one draw of noise for so many samples."""
        return count, self.code

    def terms(
        self, x: Float[Tensor, "b m d"], z: Float[Tensor, "b l"], mask: Mask
    ) -> Float[Tensor, "b"]:
        drawn = self.draw(z, lambda _: torch.randn(*x.shape[:2], self.code, device=x.device))
        if self.distance == "sliced_w2":
            return sliced_w2_terms(drawn, x, random_directions(self.projections, x[0]), mask)
        if self.distance == "mmd":
            return mmd_terms(drawn, x, x_mask=mask, y_mask=mask)
        return sinkhorn_divergence_terms(
            drawn,
            x,
            epsilon=self.epsilon,
            iterations=self.iterations,
            x_mask=mask,
            y_mask=mask,
        )

    def draw(self, z: Float[Tensor, "b l"], noise: Noise) -> Float[Tensor, "b m d"]:
        return self.network(_with(z, noise(0)))


SetGenerator = DiffusionGenerator | VariationalGenerator | DirectGenerator
