"""f-divergences D_f(P||Q) = E_Q[f(u)], u = dP/dQ, one record per generator f.

Papers disagree about which direction is "forward" and which alpha is which, so only generators
have names here; every method's symbol table says which ratio is its u. All functions take
log u (nats), since u itself leaves the range of floats. The map between generators and papers:

  generator         f(u)                                  D_f(P||Q)
  kl                u log u                               KL(P||Q)
  reverse_kl        -log u                                KL(Q||P)
  js                u log u - (u+1) log((u+1)/2)          2 x Jensen-Shannon (half weights)
  pearson_chi2      (u-1)^2                               sum (p-q)^2 / q
  neyman_chi2       (u-1)^2 / u                           sum (p-q)^2 / p
  squared_hellinger (sqrt(u)-1)^2                         sum (sqrt(p)-sqrt(q))^2
  total_variation   |u-1| / 2                             sum |p-q| / 2
  jeffreys          (u-1) log u                           KL(P||Q) + KL(Q||P)
  softened_kl       (u+1) log((u+1)/2)                    2 KL(M||Q), M = (P+Q)/2
  softened_reverse_kl  (u+1) log((u+1)/(2u))              2 KL(M||P)
  alpha(a)          (u^(1-a) - (1-a) u - a) / (a (a-1))   kl at a -> 0, reverse_kl at a -> 1,
                      pearson/2 at -1, neyman/2 at 2, 2 x squared_hellinger at 1/2

alpha tends to u log u - (u-1) and -log u + (u-1): its limits differ from kl and reverse_kl by an
affine term that vanishes under E_Q but shifts f' by -1 and +1.
"""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

Fn = Callable[[Tensor], Tensor]

INFINITY = float("inf")
LOG_2 = math.log(2.0)
# exp(-1e4) is 0 in every float type: a floor for log u where u log u must be 0, not 0 * inf.
LOG_ZERO = -1e4


@dataclass(frozen=True, kw_only=True)
class FDivergence:
    """A convex generator f with f(1) = 0, its derivatives and its conjugate.

    `f`, `df`, `d2f` (in u) and `curvature` = u^2 f''(u) are functions of log u. `conj` is
    f*(y) = sup_u (u y - f(u)) and `dconj` its derivative, the inverse of f'. `domain` is the open
    range of f', (f'(0), f'(inf)): the y whose maximising u is a proper ratio. Above it f* is inf
    and the formulas return inf or NaN; below it see `conj_positive`. Two records are equal if
    their names are.
    """

    name: str
    f: Fn = field(compare=False)
    df: Fn = field(compare=False)
    d2f: Fn = field(compare=False)
    curvature: Fn = field(compare=False)
    conj: Fn = field(compare=False)
    dconj: Fn = field(compare=False)
    domain: tuple[float, float] = field(compare=False)
    swap: Callable[[], "FDivergence"] = field(compare=False, repr=False)

    def swapped(self) -> "FDivergence":
        """The generator u f(1/u), for which D(Q||P) is this D(P||Q)."""
        return self.swap()

    def conj_positive(self, y: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """Conjugate over u >= 0, constant -f(0) below the domain.

        sup_{u >= 0} (u y - f(u)) = conj(max(y, domain[0])).

        Gradient: to y, equal to `dconj_positive`.
        """
        return self.conj(y.clamp(min=self.domain[0]))

    def dconj_positive(self, y: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        """The ratio u >= 0 that attains `conj_positive`, zero below the domain.

        max(0, (f')^{-1}(y)).

        Gradient: to y inside the domain.
        """
        ratio = self.dconj(y.clamp(min=self.domain[0]))
        return ratio.masked_fill(y <= self.domain[0], 0.0)


def kl() -> FDivergence:
    """U log u, so that D_f(P||Q) = KL(P||Q)."""
    return FDivergence(
        name="kl",
        f=_u_log_u,
        df=lambda log_u: log_u + 1,
        d2f=lambda log_u: torch.exp(-log_u),
        curvature=torch.exp,
        conj=lambda y: torch.exp(y - 1),
        dconj=lambda y: torch.exp(y - 1),
        domain=(-INFINITY, INFINITY),
        swap=reverse_kl,
    )


def reverse_kl() -> FDivergence:
    """-log u, so that D_f(P||Q) = KL(Q||P)."""
    return FDivergence(
        name="reverse_kl",
        f=lambda log_u: -log_u,
        df=lambda log_u: -torch.exp(-log_u),
        d2f=lambda log_u: torch.exp(-2 * log_u),
        curvature=torch.ones_like,
        conj=lambda y: -1 - torch.log(-y),
        dconj=lambda y: torch.exp(-torch.log(-y)),  # NaN for y > 0, where -1 / y is a number.
        domain=(-INFINITY, 0.0),
        swap=kl,
    )


def js() -> FDivergence:
    """U log u - (u+1) log((u+1)/2): twice the half-weighted Jensen-Shannon divergence."""

    def f(log_u: Tensor) -> Tensor:
        # The two u log u terms cancel before they are formed: log u - log(1+u) = logsigmoid.
        log_u = log_u.clamp(min=LOG_ZERO)
        return log_u.exp() * (LOG_2 + logsigmoid(log_u)) + LOG_2 + logsigmoid(-log_u)

    return FDivergence(
        name="js",
        f=f,
        df=lambda log_u: LOG_2 + logsigmoid(log_u),
        d2f=lambda log_u: torch.exp(logsigmoid(-log_u) - log_u),
        curvature=torch.sigmoid,
        conj=lambda y: -torch.log1p(-torch.expm1(y)),
        dconj=lambda y: torch.exp(y - torch.log1p(-torch.expm1(y))),
        domain=(-INFINITY, LOG_2),
        swap=js,
    )


def pearson_chi2() -> FDivergence:
    """(u-1)^2, so that D_f(P||Q) = sum (p-q)^2 / q."""
    return FDivergence(
        name="pearson_chi2",
        f=lambda log_u: torch.expm1(log_u).square(),
        df=lambda log_u: 2 * torch.expm1(log_u),
        d2f=lambda log_u: torch.full_like(log_u, 2.0),
        curvature=lambda log_u: 2 * torch.exp(2 * log_u),
        conj=lambda y: y * (y / 4 + 1),
        dconj=lambda y: y / 2 + 1,
        domain=(-2.0, INFINITY),
        swap=neyman_chi2,
    )


def neyman_chi2() -> FDivergence:
    """(u-1)^2 / u, so that D_f(P||Q) = sum (p-q)^2 / p."""
    return FDivergence(
        name="neyman_chi2",
        f=lambda log_u: 4 * torch.sinh(log_u / 2).square(),
        df=lambda log_u: -torch.expm1(-2 * log_u),
        d2f=lambda log_u: 2 * torch.exp(-3 * log_u),
        curvature=lambda log_u: 2 * torch.exp(-log_u),
        conj=lambda y: 2 - 2 * torch.sqrt(1 - y),
        dconj=lambda y: torch.rsqrt(1 - y),
        domain=(-INFINITY, 1.0),
        swap=pearson_chi2,
    )


def squared_hellinger() -> FDivergence:
    """(sqrt(u)-1)^2, so that D_f(P||Q) = sum (sqrt(p)-sqrt(q))^2."""
    return FDivergence(
        name="squared_hellinger",
        f=lambda log_u: torch.expm1(log_u / 2).square(),
        df=lambda log_u: -torch.expm1(-log_u / 2),
        d2f=lambda log_u: 0.5 * torch.exp(-1.5 * log_u),
        curvature=lambda log_u: 0.5 * torch.exp(0.5 * log_u),
        # 1 / (1 - y) as exp(-log(1 - y)), which is no number for y > 1.
        conj=lambda y: torch.expm1(-torch.log1p(-y)),
        dconj=lambda y: torch.exp(-2 * torch.log1p(-y)),
        domain=(-INFINITY, 1.0),
        swap=squared_hellinger,
    )


def total_variation() -> FDivergence:
    """|u-1| / 2; not differentiable at u = 1, where df is 0, and df has no inverse.

    d2f and curvature are 0 (their value away from u = 1), so nothing weighted by them learns.
    dconj is the derivative of conj, the constant 1, not an inverse of df.
    """
    return FDivergence(
        name="total_variation",
        f=lambda log_u: 0.5 * torch.expm1(log_u).abs(),
        df=lambda log_u: (0.5 * torch.sign(log_u)).masked_fill(log_u.isnan(), float("nan")),
        d2f=torch.zeros_like,
        curvature=torch.zeros_like,
        conj=lambda y: y.masked_fill(y > 0.5, INFINITY),
        dconj=torch.ones_like,
        domain=(-0.5, 0.5),
        swap=total_variation,
    )


def jeffreys() -> FDivergence:
    """(u-1) log u, so that D_f(P||Q) = KL(P||Q) + KL(Q||P)."""
    return FDivergence(
        name="jeffreys",
        f=lambda log_u: torch.expm1(log_u) * log_u,
        df=lambda log_u: log_u - torch.expm1(-log_u),
        d2f=lambda log_u: torch.exp(-log_u) + torch.exp(-2 * log_u),
        curvature=lambda log_u: 1 + torch.exp(log_u),
        conj=lambda y: torch.expm1(_jeffreys_inverse(y)) + _jeffreys_inverse(y),
        dconj=lambda y: torch.exp(_jeffreys_inverse(y)),
        domain=(-INFINITY, INFINITY),
        swap=jeffreys,
    )


def softened_kl() -> FDivergence:
    """(u+1) log((u+1)/2), so that D_f(P||Q) = 2 KL(M||Q) with M = (P+Q)/2."""
    return FDivergence(
        name="softened_kl",
        f=lambda log_u: (1 + torch.exp(log_u)) * (-logsigmoid(-log_u) - LOG_2),
        df=lambda log_u: 1 - LOG_2 - logsigmoid(-log_u),
        d2f=lambda log_u: torch.sigmoid(-log_u),
        curvature=lambda log_u: torch.exp(log_u + logsigmoid(log_u)),
        conj=lambda y: 2 * torch.exp(y - 1) - y,
        dconj=lambda y: torch.expm1(y - 1 + LOG_2),
        domain=(1 - LOG_2, INFINITY),
        swap=softened_reverse_kl,
    )


def softened_reverse_kl() -> FDivergence:
    """(u+1) log((u+1)/(2u)), so that D_f(P||Q) = 2 KL(M||P) with M = (P+Q)/2.

    Source: Xu et al. 2025, f-distill (arXiv 2502.15681), table 1.
    """

    def df(log_u: Tensor) -> Tensor:
        # A floor, where log(1/u) - 1/u would be inf - inf.
        log_u = log_u.clamp(min=LOG_ZERO)
        return -LOG_2 - logsigmoid(log_u) - torch.exp(-log_u)

    return FDivergence(
        name="softened_reverse_kl",
        f=lambda log_u: (1 + torch.exp(log_u)) * (-logsigmoid(log_u) - LOG_2),
        df=df,
        d2f=lambda log_u: torch.exp(logsigmoid(-log_u) - 2 * log_u),
        curvature=lambda log_u: torch.sigmoid(-log_u),
        conj=lambda y: LOG_2 - 1 - torch.log1p(_softened_inverse(y)),
        dconj=lambda y: 1 / _softened_inverse(y),
        domain=(-INFINITY, -LOG_2),
        swap=softened_kl,
    )


def alpha(a: float) -> FDivergence:
    """(u^(1-a) - (1-a) u - a) / (a (a-1)), every real a, with limits at a = 0 and a = 1.

    f' = (1 - u^-a) / a, f'' = u^(-a-1), f* = ((1 - a y)^((a-1)/a) - 1) / (1 - a). This is the
    convention of f-DPO; in others alpha is 1 - a, or 1 - 2a.

    Source: Wang et al. 2023, f-DPO (arXiv 2309.16240), table 1 for 0 < a < 1.
    Raises: ValueError if a is not finite.
    """
    if not math.isfinite(a):
        raise ValueError(f"alpha needs a finite parameter, got {a}")
    a = float(a)

    def f(log_u: Tensor) -> Tensor:
        # f_a(u) = u f_{1-a}(1/u): each half line uses the form that is bounded there.
        below = _alpha_below(log_u.clamp(max=0.0), a)
        above = log_u.clamp(min=0.0).exp() * _alpha_below(-log_u.clamp(min=0.0), 1 - a)
        return torch.where(log_u <= 0, below, above)

    def log_dconj(y: Tensor) -> Tensor:
        return y if a == 0 else -torch.log1p(-a * y) / a

    return FDivergence(
        name=f"alpha({a})",
        f=f,
        df=lambda log_u: _box_cox(log_u, -a),
        d2f=lambda log_u: _raise(log_u, -(a + 1)),
        curvature=lambda log_u: _raise(log_u, 1 - a),
        conj=lambda y: _box_cox(log_dconj(y), 1 - a),
        dconj=lambda y: torch.exp(log_dconj(y)),
        domain=(1 / a if a < 0 else -INFINITY, 1 / a if a > 0 else INFINITY),
        swap=lambda: alpha(1 - a),
    )


GENERATORS: dict[str, Callable[[], FDivergence]] = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "js": js,
    "pearson_chi2": pearson_chi2,
    "neyman_chi2": neyman_chi2,
    "squared_hellinger": squared_hellinger,
    "total_variation": total_variation,
    "jeffreys": jeffreys,
    "softened_kl": softened_kl,
    "softened_reverse_kl": softened_reverse_kl,
}


def by_name(name: str) -> FDivergence:
    """The generator of that name: a key of GENERATORS, or "alpha(a)" with a number a.

    Raises: ValueError naming the nearest names if there is none.
    """
    if name in GENERATORS:
        return GENERATORS[name]()
    if name.startswith("alpha(") and name.endswith(")"):
        try:
            return alpha(float(name[6:-1]))
        except ValueError:
            raise ValueError(f"alpha(a) needs a finite number a, got {name!r}") from None
    known = [*GENERATORS, "alpha(0.5)"]
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise ValueError(f"no f-divergence is called {name!r}; did you mean {' or '.join(nearest)}?")


def divergence(
    p_logits: Float[Tensor, "*s k"], q_logits: Float[Tensor, "*s k"], f: FDivergence
) -> Float[Tensor, "*s"]:
    """Exact D_f(P||Q) of categorical distributions from unnormalised logits over the last axis.

    sum_k q_k f(p_k / q_k), with the limits q f(0) where p = 0, p f'(inf) where q = 0 (inf if
    that is), and 0 where both are. In nats for the logarithmic generators.

    Gradient: to both arguments.
    """
    return divergence_terms(p_logits.log_softmax(-1), q_logits.log_softmax(-1), f).sum(-1)


def divergence_terms(
    log_p: Float[Tensor, "*s"], log_q: Float[Tensor, "*s"], f: FDivergence
) -> Float[Tensor, "*s"]:
    """Terms q f(p / q), whose sum over outcomes is D_f(P||Q), and whose mean over x ~ m is that if
    log_p and log_q are log p/m and log q/m at x. Limits as in `divergence`.

    Gradient: to both arguments.
    """
    both_zero = (log_p == -INFINITY) & (log_q == -INFINITY)
    log_u = log_p.masked_fill(both_zero, 0.0) - log_q.masked_fill(both_zero, 0.0)
    # q f(p/q) = p g(q/p) with g swapped, so neither side ever sees a ratio above one.
    below = log_q.exp() * f.f(log_u.clamp(max=0.0))
    above = log_p.exp() * f.swapped().f(-log_u.clamp(min=0.0))
    return torch.where(log_u <= 0, below, above)


def _u_log_u(log_u: Tensor) -> Tensor:
    return log_u.exp() * log_u.clamp(min=LOG_ZERO)


NEWTON_STEPS = 8
"""Both starts below lie on the side from which the convergence is monotone: enough in float64."""


def _jeffreys_inverse(y: Tensor) -> Tensor:
    """Log u with log u + 1 - 1/u = y; its gradient is that of the last step."""
    with torch.no_grad():
        log_u = torch.where(y > 1, y - 1, -torch.log1p((1 - y).clamp(min=0)))
        for _ in range(NEWTON_STEPS):
            log_u = log_u - (log_u - torch.expm1(-log_u) - y) * torch.sigmoid(log_u)
    return log_u - (log_u - torch.expm1(-log_u) - y) * torch.sigmoid(log_u)


def _softened_inverse(y: Tensor) -> Tensor:
    """V = 1/u > 0 with log((1+v)/2) - v = y, for y < -log 2; its gradient is that of the last step."""
    excess = -LOG_2 - y
    with torch.no_grad():
        v = excess + (2 * excess).sqrt()
        for _ in range(NEWTON_STEPS):
            v = v - (v - torch.log1p(v) - excess) * (1 + 1 / v)
    return v - (v - torch.log1p(v) - excess) * (1 + 1 / v)


def _raise(log_u: Tensor, exponent: float) -> Tensor:
    """u^c, which is 1 at c = 0 even for u = 0."""
    return torch.ones_like(log_u) if exponent == 0 else torch.exp(exponent * log_u)


def _box_cox(log_u: Tensor, exponent: float) -> Tensor:
    """(u^c - 1) / c, which is log u at c = 0."""
    return log_u if exponent == 0 else torch.expm1(exponent * log_u) / exponent


def _alpha_below(log_u: Tensor, a: float) -> Tensor:
    """The alpha generator for u <= 1, by whichever form is regular near this a and at u = 0."""
    if a >= 0.5:
        return (torch.expm1(log_u) - _box_cox(log_u, 1 - a)) / a
    log_u = log_u.clamp(min=LOG_ZERO)
    # u (1 - u^-a) / -a with the large factor taken out of the difference.
    product = _raise(log_u, 1 - max(a, 0.0)) * _box_cox(log_u, abs(a))
    return (product - torch.expm1(log_u)) / (1 - a)
