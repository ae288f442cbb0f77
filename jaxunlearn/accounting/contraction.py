"""How noisy steps shrink a Renyi divergence, where the reference law has a log-Sobolev inequality.

Both chains run the same step: an l-Lipschitz map, then N(0, s^2 I), then perhaps a projection. The
map and the projection do not raise D_alpha. Along the noise, heat flows for "time" s^2/2 through
both laws, and if the reference satisfies KL <= (C/2) Fisher information before it,

    d/dt D_alpha <= -(2 / (alpha (C + 2 t))) D_alpha   (Vempala and Wibisono 2019, Lemma 5)

whence D_alpha falls by the factor (1 + s^2/C)^(-1/alpha) [D]. The map takes C to l^2 C at most and
the noise adds s^2, so C_(k+1) = l^2 C_k + s^2: l = 1 - rate m for m-strongly convex losses with
rate <= 1 / smoothness, 1 for convex ones, 1 + rate * smoothness in general, where C, and with it
the bound, grows exponentially. Mini-batch steps: take the worst batch's l, the indices being the
same for both chains.
"""

import math
from typing import NamedTuple

from jaxunlearn.accounting._checks import expect, expect_count
from jaxunlearn.accounting.renyi import RenyiCurve
from jaxunlearn.accounting.rounding import lowered, raised


class NoisySteps(NamedTuple):
    """Equal noisy steps, the same on both sides.

    lipschitz: l of the map.  noise_stddev: s of the noise per coordinate, after the map.
    lsi_constant: C of the reference law before the first step, an upper bound: KL <= (C/2) FI.
      C of N(m, v I) is v; `stationary_lsi` gives that of the steps' own stationary law.
    """

    lipschitz: float
    noise_stddev: float
    lsi_constant: float

    def check(self) -> "NoisySteps":
        """Itself, or ValueError."""
        for name, value in self._asdict().items():
            expect(name, value, at_least=0.0)
        return self

    def after(self, num_steps: int) -> "NoisySteps":
        """The same steps, with the log-Sobolev constant after `num_steps` of them: an upper bound.

        >>> NoisySteps(lipschitz=0.5, noise_stddev=1.0, lsi_constant=4.0).after(1).lsi_constant
        2.0...
        """
        constant = self.check().lsi_constant
        for _ in range(expect_count("num_steps", num_steps, at_least=0)):
            following = raised(self.lipschitz**2 * constant + self.noise_stddev**2)
            if following == constant:
                break
            constant = following
        return self._replace(lsi_constant=constant)


def stationary_lsi(*, lipschitz: float, noise_stddev: float) -> float:
    """s^2 / (1 - l^2), the fixed point of the log-Sobolev recursion for l < 1: an upper bound [D].

    It bounds the stationary law of such steps, and every law on the way to it from a start with a
    smaller constant (a point has 0).

    >>> 1.3333 < stationary_lsi(lipschitz=0.5, noise_stddev=1.0) < 1.3334
    True
    """
    expect("lipschitz", lipschitz, at_least=0.0)
    expect("noise_stddev", noise_stddev, at_least=0.0)
    if not lipschitz < 1:
        raise ValueError(f"Expected lipschitz={lipschitz} < 1: otherwise the constant only grows.")
    return raised(noise_stddev**2 / ((1 - lipschitz) * (1 + lipschitz)))


def renyi_decay(steps: NoisySteps, *, order: float, num_steps: int) -> float:
    """The factor by which `num_steps` noisy steps shrink D_order: an upper bound.

        prod_k (1 + s^2 / (l^2 C_k))^(-1/order),    C_(k+1) = l^2 C_k + s^2         [D]

    >>> steps = NoisySteps(lipschitz=0.9, noise_stddev=1.0, lsi_constant=1 / 0.19)
    >>> round(7.6 * renyi_decay(steps, order=4.0, num_steps=5), 5)
    5.84009

    Cost: `num_steps` host operations, fewer once C_k stands still.
    """
    steps.check()
    count = expect_count("num_steps", num_steps, at_least=0)
    variance, constant, log_factor = steps.noise_stddev**2, steps.lsi_constant, 0.0
    for k in range(count):
        before = raised(steps.lipschitz**2 * constant)
        if before == 0.0:
            return 0.0  # the reference is one Gaussian: its step forgets the input
        rate = lowered(math.log1p(variance / before))
        following = raised(before + variance)
        if following == constant:
            log_factor += (count - k) * rate
            break
        log_factor, constant = log_factor + rate, following
    return min(1.0, raised(math.exp(-lowered(log_factor) / order)))


def contract(curve: RenyiCurve, steps: NoisySteps, *, num_steps: int) -> RenyiCurve:
    """The curve after `num_steps` noisy steps on both sides: an upper bound at every order [D].

    The reference (second argument of D_alpha) is the one whose log-Sobolev constant `steps` states.

    >>> steps = NoisySteps(lipschitz=0.5, noise_stddev=1.0, lsi_constant=4 / 3)
    >>> round(contract(RenyiCurve.linear(1.0), steps, num_steps=2)(2.0), 6)
    0.5
    """
    decay = lambda order: renyi_decay(steps, order=order, num_steps=num_steps)
    return RenyiCurve(lambda order: raised(curve(order) * decay(order)), curve.orders)


def contraction_rate(*, lipschitz: float) -> float:
    """c = -2 ln l, the rate of decay at stationarity: a lower bound.

    D_alpha falls by e^(-c k / alpha) [D: `renyi_decay` at `stationary_lsi`]. For gradient steps it
    exceeds rate * m, which Chien et al. 2024 use, more than twofold.

    >>> round(contraction_rate(lipschitz=0.95), 9)
    0.102586589
    """
    if not 0 < lipschitz < 1:
        raise ValueError(f"Expected lipschitz={lipschitz} strictly between 0 and 1.")
    return lowered(-2 * math.log(lipschitz))


def steps_to_unlearn(*, divergence: float, target: float, order: float, rate: float) -> int:
    """Steps after which D_order <= target, if retraining goes on as long: enough, an upper bound.

        k >= (alpha / c) ln(D / target)                                               [D]

    Args:
      divergence: D_order before the first step, of learning with the rows from learning without.
      target: > 0.  order: alpha > 1.  rate: c, `contraction_rate`.

    >>> steps_to_unlearn(divergence=1.0, target=0.01, order=4.0, rate=0.10258658878)
    180
    """
    expect("divergence", divergence, at_least=0.0)
    expect("target", target, above_=0.0)
    expect("rate", rate, above_=0.0)
    if divergence <= target:
        return 0
    return math.ceil(raised(order / rate * math.log(divergence / target)))


class Stationarity(NamedTuple):
    """How far learning was from its stationary law nu', in the two orders that the bound needs.

    learned: D_(4 alpha - 1)(pi' || nu').  reference: D_(2 alpha - 1)(nu' || pi'). Zeros state the
    idealisation that training had converged, which is an assumption of the certificate.
    """

    learned: float
    reference: float


def steps_to_stationary_target(
    *, divergence: float, target: float, order: float, rate: float, stationarity: Stationarity
) -> int:
    """Steps after which D_order from *finished* retraining is at most target + S2: an upper bound.

        k >= (2 a / c) ln((a - 1/2)/(a - 1) [(2 a - 1/2)/(2 a - 1) D_(4a) + S1] / target)     [D]

    logarithmic in the divergence at order 4 a, as Sepahvand et al. 2025 state it; S2, the distance
    of retraining itself from stationarity, no number of steps removes.

    Args:
      divergence: D_(4 order) of learning with the rows from learning without.

    >>> at_rest = Stationarity(learned=0.0, reference=0.0)
    >>> steps_to_stationary_target(
    ...     divergence=1.0, target=0.1, order=2.0, rate=0.01, stationarity=at_rest
    ... )
    1145
    """
    expect("divergence", divergence, at_least=0.0)
    expect("target", target, above_=0.0)
    expect("rate", rate, above_=0.0)
    expect("stationarity.learned", stationarity.learned, at_least=0.0)
    inner = (2 * order - 0.5) / (2 * order - 1) * divergence + stationarity.learned
    total = raised((order - 0.5) / (order - 1) * inner)
    if total <= target:
        return 0
    return math.ceil(raised(2 * order / rate * math.log(total / target)))
