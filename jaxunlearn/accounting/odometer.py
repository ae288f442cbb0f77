"""Budgets over many requests: quoted apart from spent, in integers, with quotas and alarms.

Every amount is read as the decimal that Python prints for it and counted in whole units of 10^-30,
costs rounded up and totals down. So ten times 0.1 is exactly 1.0, no sum of costs ever exceeds its
total, and nothing drifts.

What is fixed in advance is the total; the costs may be chosen as the stream goes on, from what was
released before. That makes it a privacy filter, and its sums are valid for basic composition
(Rogers et al. 2016), zCDP (Feldman and Zrnic 2021) and Gaussian mu^2 (Smith and Thakurta 2022).

A requester whose rows are expensive to delete, by accident or by design, can use up a budget that
was meant for all (slow-down poisoning, Marchant et al. 2022). Three things stand against that: a
cap on each request, a quota for each requester that retraining does not reset, and alarms. A
request beyond cap or quota is refused by `QuotaExceededError`, which is no `BudgetExhaustedError`:
it calls for no retraining.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxunlearn import errors
from jaxunlearn.accounting.amounts import amount_below, amount_of, units_down, units_up
from jaxunlearn.accounting.composition import basic_composition
from jaxunlearn.accounting.gaussian import gaussian_epsilon, gaussian_mu
from jaxunlearn.accounting.rounding import raised
from jaxunlearn.accounting.zcdp import zcdp_budget, zcdp_epsilon
from jaxunlearn.types import Quote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """One way to serve a request.

    name: of the method.
    costs: what it takes of each resource by name; resources that it does not touch may be left out.
    guarantee: "exact", "certified", "bounded" or "heuristic".
    seconds: an estimate, or None.  memory_bytes: extra memory at its peak.
    """

    name: str
    costs: Mapping[str, float] = dataclasses.field(default_factory=dict)
    guarantee: str = "certified"
    seconds: float | None = None
    memory_bytes: int = 0

    @classmethod
    def of_quote(cls, name: str, quote: Quote, **costs: float) -> "Option":
        """What an unlearner's `quote` says, with what it would cost of the odometer's resources.

        Raises:
          ValueError: the quote is not feasible, which makes it no way to serve the request.

        >>> quote = Quote(feasible=True, reason="", guarantee="exact", seconds=2.0)
        >>> Option.of_quote("replay", quote, deletions=1).seconds
        2.0
        """
        if not quote.feasible:
            raise ValueError(f"Expected a feasible quote of {name!r}, got: {quote.reason}")
        return cls(
            name=name,
            costs=costs,
            guarantee=quote.guarantee,
            seconds=quote.seconds,
            memory_bytes=quote.memory_bytes,
        )


class Request(NamedTuple):
    """A deletion as the odometer sees it.

    option: how it would be served.  requester: who asks; all who give no name share one quota.
    alternatives: other ways to serve it, retraining among them.
    """

    option: Option
    requester: str | None = None
    alternatives: tuple[Option, ...] = ()


class Spent(NamedTuple):
    """What has been spent, in units of 10^-30: plain integers, fit for JSON, never changed.

    totals: by resource.  by_requester: by requester, then by resource.
    """

    totals: Mapping[str, int]
    by_requester: Mapping[str, Mapping[str, int]]

    @classmethod
    def of(cls, **amounts: float) -> "Spent":
        """Amounts spent by nobody in particular, rounded up."""
        return cls({name: units_up(amount) for name, amount in amounts.items()}, {})


class Alarm(NamedTuple):
    """A threshold that a request crosses.

    resource: by name.  threshold: the share of its total, or of the requester's quota, now passed.
    requester: whose quota; None for the total.
    """

    resource: str
    threshold: float
    requester: str | None = None


class Preview(NamedTuple):
    """What a request would cost. Nothing is spent by asking.

    fits: whether `spend` would accept it; reason: why not, or "".
    epsilon, delta: of everything spent so far and this request; None without a privacy resource.
    seconds, memory_bytes: of the option asked for.
    left: of each resource after it (before it, where it does not fit), rounded down.
    retrain_due: the total does not hold it, or would not hold another like it.
    cheapest: the fastest alternative that fits (by seconds, then memory), or None.
    alarms: thresholds that it would cross.
    """

    fits: bool
    reason: str
    epsilon: float | None
    delta: float | None
    seconds: float | None
    memory_bytes: int
    left: dict[str, float]
    retrain_due: bool
    cheapest: Option | None
    alarms: tuple[Alarm, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odometer:
    """Totals, quotas and caps, fixed before the first request; the state is a `Spent`, outside.

    totals: of each resource over all requests.
    quotas: of each resource to any one requester.  caps: of each resource to any one request.
    thresholds: shares at which an alarm goes off.
    delta: of the privacy resource "mu_squared" or "rho" (`for_gaussian`, `for_zcdp`).
    extra_epsilon: what `privacy` adds once anything is spent, for releases on a grid.

    >>> odometer = Odometer(totals={"deletions": 3}, quotas={"deletions": 2})
    >>> request = Request(Option(name="newton", costs={"deletions": 2}), requester="a")
    >>> spent = odometer.spend(odometer.start(), request)
    >>> odometer.preview(spent, request).reason
    "Expected requester 'a' to ask for at most 0 of deletions (quota 2), got 2."
    """

    totals: Mapping[str, float]
    quotas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    caps: Mapping[str, float] = dataclasses.field(default_factory=dict)
    thresholds: tuple[float, ...] = (0.5, 0.8, 0.95)
    delta: float | None = None
    extra_epsilon: float = 0.0

    def __post_init__(self):
        for limits in (self.totals, self.quotas, self.caps):
            for name, amount in limits.items():
                if not 0 <= amount < math.inf:
                    raise ValueError(f"Expected {name}={amount} >= 0 and finite.")
                if name not in self.totals:
                    raise ValueError(f"Expected {name!r} among the totals {sorted(self.totals)}.")
        if not all(0 < threshold <= 1 for threshold in self.thresholds):
            raise ValueError(f"Expected thresholds={self.thresholds} in (0, 1].")

    @classmethod
    def for_gaussian(
        cls,
        *,
        epsilon: float,
        delta: float,
        total_mu: float | None = None,
        totals: Mapping[str, float] | None = None,
        **limits,
    ) -> "Odometer":
        """Gaussian releases, which spend "mu_squared": exact composition.

        Args:
          total_mu: None is `gaussian_mu(epsilon, delta)`; releases on the grid need `certified_mu`.
          totals: of further resources.
        """
        mu = gaussian_mu(epsilon=epsilon, delta=delta) if total_mu is None else total_mu
        # Room for `privacy` to round up: all of it spent is still at most epsilon.
        square = mu * mu * (1 - 2.0**-37)
        return cls(totals={"mu_squared": square, **(totals or {})}, delta=delta, **limits)

    @classmethod
    def for_zcdp(
        cls, *, epsilon: float, delta: float, totals: Mapping[str, float] | None = None, **limits
    ) -> "Odometer":
        """Releases that spend "rho": zero-concentrated privacy."""
        rho = zcdp_budget(epsilon=epsilon, delta=delta)
        return cls(totals={"rho": rho, **(totals or {})}, delta=delta, **limits)

    @classmethod
    def for_basic(
        cls, *, epsilon: float, delta: float, totals: Mapping[str, float] | None = None, **limits
    ) -> "Odometer":
        """Releases that spend "epsilon" and "delta", which add."""
        return cls(totals={"epsilon": epsilon, "delta": delta, **(totals or {})}, **limits)

    def start(self) -> Spent:
        """Nothing spent."""
        return Spent(dict.fromkeys(self.totals, 0), {})

    def retrained(self, spent: Spent, *, keep_quotas: bool = True) -> Spent:
        """After retraining with fresh noise: totals anew, requesters' quotas as used as before."""
        return self.start()._replace(by_requester=spent.by_requester if keep_quotas else {})

    def spend(self, spent: Spent, request: Request) -> Spent:
        """What is spent after the request. `spent` itself is never changed.

        Raises:
          BudgetExhaustedError: a total does not hold it.
          QuotaExceededError: it is above its cap, or its requester above the quota.
          ValueError: a cost that is negative, not finite, or of no resource here.
        """
        refusal = self._refusal(spent, request)
        if refusal is not None:
            raise refusal
        return self._after(spent, request)

    def preview(self, spent: Spent, request: Request) -> Preview:
        """What the request would cost, and the cheapest other way; spends nothing."""
        refusal = self._refusal(spent, request)
        after = self._after(spent, request)
        fits = refusal is None
        exhausted = isinstance(refusal, errors.BudgetExhaustedError)
        again = self._overdrawn(after, self._costs(request.option)) is not None
        epsilon, delta = self.privacy(after)
        left = after if fits else spent
        return Preview(
            fits=fits,
            reason="" if refusal is None else str(refusal),
            epsilon=epsilon,
            delta=delta,
            seconds=request.option.seconds,
            memory_bytes=request.option.memory_bytes,
            left={name: amount_below(self._left(left, name)) for name in self.totals},
            retrain_due=exhausted or (fits and again),
            cheapest=self._cheapest(spent, request),
            alarms=self._alarms(spent, after, request.requester) if fits else (),
        )

    def privacy(self, spent: Spent) -> tuple[float | None, float | None]:
        """(epsilon, delta) of all that is spent: an upper bound; None without such a resource.

        >>> odometer = Odometer.for_gaussian(epsilon=1.0, delta=1e-5)
        >>> epsilon, delta = odometer.privacy(odometer.start())
        >>> epsilon, delta
        (0.0, 1e-05)
        """
        amounts = {name: amount_of(units) for name, units in spent.totals.items()}
        if "mu_squared" in self.totals and self.delta is not None:
            if amounts["mu_squared"] == 0.0:
                return 0.0, self.delta
            mu = raised(math.sqrt(amounts["mu_squared"]))
            epsilon = gaussian_epsilon(delta=self.delta, noise_stddev=1.0, sensitivity=mu)
            return epsilon + self.extra_epsilon, self.delta
        if "rho" in self.totals and self.delta is not None:
            return zcdp_epsilon(amounts["rho"], delta=self.delta), self.delta
        if "epsilon" in self.totals:
            total = basic_composition([(amounts["epsilon"], amounts.get("delta", 0.0))])
            return total.epsilon, total.delta
        return None, None

    def _costs(self, option):
        """Costs in units, rounded up; every name known and every amount sensible."""
        for name, amount in option.costs.items():
            if name not in self.totals:
                raise ValueError(f"Expected costs of {sorted(self.totals)}, got {name!r}.")
            if not amount >= 0 or amount == math.inf:
                raise ValueError(f"Expected a finite cost {name}={amount} >= 0.")
        return {name: units_up(amount) for name, amount in option.costs.items()}

    def _left(self, spent, name):
        """Units left of a total."""
        return units_down(self.totals[name]) - spent.totals.get(name, 0)

    def _overdrawn(self, spent, costs):
        """The first resource whose total does not hold the costs, or None."""
        return next((name for name, cost in costs.items() if cost > self._left(spent, name)), None)

    def _refusal(self, spent, request):
        """The error that `spend` would raise, or None."""
        costs = self._costs(request.option)
        show = lambda units: f"{amount_below(units):.6g}"
        for name, cost in costs.items():
            if name in self.caps and cost > units_down(self.caps[name]):
                return errors.QuotaExceededError(
                    f"Expected at most {self.caps[name]:.6g} of {name} in one request, got "
                    f"{request.option.costs[name]:.6g}. Ask for fewer rows at a time."
                )
            if name in self.quotas:
                own = spent.by_requester.get(_key(request.requester), {}).get(name, 0)
                left = max(0, units_down(self.quotas[name]) - own)
                if cost > left:
                    return errors.QuotaExceededError(
                        f"Expected requester {_key(request.requester)!r} to ask for at most "
                        f"{show(left)} of {name} (quota {self.quotas[name]:.6g}), got "
                        f"{request.option.costs[name]:.6g}."
                    )
        name = self._overdrawn(spent, costs)
        if name is None:
            return None
        return errors.BudgetExhaustedError(
            f"Expected at most {show(max(0, self._left(spent, name)))} of {name} (total "
            f"{self.totals[name]:.6g}), got {request.option.costs[name]:.6g}. Nothing was spent: "
            "retrain on the retain set, or take an alternative of the preview."
        )

    def _after(self, spent, request):
        """`spent` and the request, whether it fits or not; new mappings."""
        totals = {name: spent.totals.get(name, 0) for name in self.totals}
        own = dict(spent.by_requester.get(_key(request.requester), {}))
        for name, cost in self._costs(request.option).items():
            totals[name] += cost
            own[name] = own.get(name, 0) + cost
        return Spent(totals, {**spent.by_requester, _key(request.requester): own})

    def _cheapest(self, spent, request):
        """The fastest alternative that would be accepted."""
        fitting = [
            option
            for option in request.alternatives
            if self._refusal(spent, request._replace(option=option)) is None
        ]
        seconds = lambda option: math.inf if option.seconds is None else option.seconds
        return min(fitting, key=lambda option: (seconds(option), option.memory_bytes), default=None)

    def _alarms(self, before, after, requester):
        """Thresholds of totals and of the requester's quota that lie between the two states."""
        key, found = _key(requester), []
        for name, total in self.totals.items():
            pairs = [(None, total, before.totals.get(name, 0), after.totals[name])]
            if name in self.quotas:
                own = (state.by_requester.get(key, {}).get(name, 0) for state in (before, after))
                pairs.append((key, self.quotas[name], *own))
            for who, limit, old, new in pairs:
                marks = ((share, units_up(share * limit)) for share in self.thresholds)
                found += [Alarm(name, share, who) for share, mark in marks if old < mark <= new]
        return tuple(found)


def _key(requester):
    """Requesters by name; the nameless are one."""
    return "" if requester is None else requester
