"""Distances to retraining, capacity and schedules, on 1000 random problems solved outright."""

import math

import numpy as np
import pytest

from jaxunlearn import accounting
from jaxunlearn.accounting import Descent, StronglyConvex

NUM, ROWS, DIM = 1000, 14, 2
GAMMA = 1 / (6 * math.sqrt(3))


def loose(bounds, truths):
    """Median of bound over truth, after checking that no bound is below its truth."""
    bounds, truths = np.asarray(bounds, float), np.asarray(truths, float)
    assert len(bounds) >= NUM
    assert np.all(bounds >= truths * (1 - 1e-9) - 1e-13), np.min(bounds - truths)
    return float(np.median(bounds / np.maximum(truths, 1e-300)))


class Logistic:
    """L2-regularised logistic regressions, all solved at once; rows may have weight zero."""

    def __init__(self, rng, rows=ROWS):
        self.x = rng.normal(size=(NUM, rows, DIM))
        self.x /= np.maximum(np.linalg.norm(self.x, axis=2, keepdims=True), 1.0)
        self.y = np.sign(rng.normal(size=(NUM, rows)))
        self.l2 = rng.uniform(0.05, 0.5, NUM)

    def gradients(self, w):
        """Of each row with its L2 term, (NUM, rows, DIM)."""
        margin = self.y * np.einsum("bnd,bd->bn", self.x, w)
        slope = -self.y / (1 + np.exp(margin))
        return slope[..., None] * self.x + (self.l2[:, None] * w)[:, None]

    def hessians(self, w):
        """Of each row with its L2 term, (NUM, rows, DIM, DIM)."""
        margin = np.einsum("bnd,bd->bn", self.x, w)
        bend = 1 / (2 + 2 * np.cosh(margin))
        eye = self.l2[:, None, None, None] * np.eye(DIM)
        return np.einsum("bn,bni,bnj->bnij", bend, self.x, self.x) + eye

    def solve(self, keep):
        w = np.zeros((NUM, DIM))
        for _ in range(40):
            gradient = self.gradients(w)[:, keep].mean(1)
            hessian = self.hessians(w)[:, keep].mean(1)
            w = w - np.linalg.solve(hessian, gradient[..., None])[..., 0]
        return w

    def constants(self, w):
        """L at the minimiser and beta of the forgotten rows; M of each row."""
        lipschitz = np.linalg.norm(self.gradients(w), axis=2).max(1)
        smoothness = np.linalg.norm(self.x, axis=2).max(1) ** 2 / 4 + self.l2
        return lipschitz, smoothness, np.linalg.norm(self.x, axis=2).max(1) ** 3 * GAMMA


@pytest.mark.parametrize("num_forgotten", [1, 4])
def test_newton_jackknife_and_doing_nothing_on_logistic_regression(num_forgotten):
    model = Logistic(np.random.default_rng(num_forgotten))
    forget, keep = slice(0, num_forgotten), slice(num_forgotten, None)
    w, target = model.solve(slice(None)), model.solve(keep)
    lipschitz, smoothness, bend = model.constants(w)
    summed = model.gradients(w)[:, forget].sum(1)[..., None]
    retained = ROWS - num_forgotten
    newton = w + np.linalg.solve(model.hessians(w)[:, keep].mean(1), summed)[..., 0] / retained
    jackknife = w + np.linalg.solve(model.hessians(w).mean(1), summed)[..., 0] / ROWS
    gap = lambda v: np.linalg.norm(v - target, axis=1)
    sizes = {"num_forgotten": num_forgotten, "num_retained": retained}
    rows = list(zip(model.l2, lipschitz, smoothness, bend, strict=True))

    stay = [accounting.minimiser_distance(l2=a, lipschitz=b, **sizes) for a, b, _, _ in rows]
    assert loose(stay, gap(w)) < 6
    step = [
        accounting.newton_distance(l2=a, lipschitz=b, hessian_lipschitz=m, **sizes)
        for a, b, _, m in rows
    ]
    assert loose(step, gap(newton)) < 1e4
    printed = [
        accounting.newton_distance(l2=a, lipschitz=b, hessian_lipschitz=m, as_printed=True, **sizes)
        for a, b, _, m in rows
    ]
    assert np.all(np.array(step) <= np.array(printed))
    swap = [
        accounting.LossConstants(b, m, smoothness=s - a).jackknife_distance(
            a, gradient=num_forgotten * b / retained, paper_step=True, l2=a, **sizes
        )
        for a, b, s, m in rows
    ]
    assert loose(swap, gap(jackknife)) < 300


@pytest.mark.parametrize("num_removed", [1, 3])
def test_the_worst_case_residual_of_removal_on_logistic_regression(num_removed):
    model = Logistic(np.random.default_rng(10 + num_removed))
    w, keep = model.solve(slice(None)), slice(num_removed, None)
    summed = model.gradients(w)[:, :num_removed].sum(1)
    step = np.linalg.solve(model.hessians(w)[:, keep].sum(1), summed[..., None])[..., 0]
    residual = np.linalg.norm(model.gradients(w + step)[:, keep].sum(1), axis=1)
    bounds = [
        accounting.worst_case_residual(
            num_removed=num_removed, num_retained=ROWS - num_removed, l2=float(l2),
            gradient_bound=1.0, curvature_lipschitz=GAMMA,
        )
        for l2 in model.l2
    ]  # fmt: skip
    loose(bounds, residual)
    # The square of the number removed is in it.
    assert bounds[0] == pytest.approx(
        num_removed**2 * 2 * GAMMA / model.l2[0] ** 2 / (ROWS - num_removed)
    )


@pytest.mark.parametrize("curved", [True, False], ids=["strongly convex", "smooth"])
def test_rewound_descent_on_logistic_regression(curved):
    rng = np.random.default_rng(20)
    model = Logistic(rng)
    rate = 0.9 / (0.25 + model.l2)
    total, rewound, keep = 30, 12, slice(2, None)
    steepest = np.zeros(NUM)

    def run(w, rows, steps):
        for _ in range(steps):
            gradients = model.gradients(w)
            np.maximum(steepest, np.linalg.norm(gradients, axis=2).max(1), out=steepest)
            w = w - rate[:, None] * gradients[:, rows].mean(1)
        return w

    start = rng.normal(size=(NUM, DIM)) * 0.1
    checkpoint = run(start, slice(None), total - rewound)
    unlearned, retrained = run(checkpoint, keep, rewound), run(start, keep, total)
    bounds = [
        accounting.rewind_distance(
            num_forgotten=2, num_examples=ROWS, gradient_bound=float(g), learning_rate=float(r),
            num_steps=total, num_rewound=rewound, smoothness=float(0.25 + l2),
            strong_convexity=float(l2) if curved else None,
        )
        for g, r, l2 in zip(steepest, rate, model.l2, strict=True)
    ]  # fmt: skip
    loose(bounds, np.linalg.norm(unlearned - retrained, axis=1))


@pytest.mark.parametrize("own_hessian", [True, False])
def test_recollection_on_logistic_regression(own_hessian):
    rng = np.random.default_rng(30)
    model = Logistic(rng)
    smooth = 0.25 + model.l2
    rate, batch, steps = 0.5 / smooth, 7, 12
    w, other = np.zeros((NUM, DIM)), np.zeros((NUM, DIM))
    vector, steepest, seen = np.zeros((NUM, DIM)), np.zeros(NUM), []
    for t in range(steps):
        rows = np.arange(batch) + batch * (t % 2)
        own = 0 in rows
        gradients, hessians = model.gradients(w)[:, rows], model.hessians(w)[:, rows]
        far = model.gradients(other)[:, rows]
        steepest = np.maximum(steepest, np.linalg.norm(gradients[:, 0], axis=1) if own else 0)
        curved = hessians.sum(1) / batch
        if own and not own_hessian:
            curved = hessians[:, 1:].sum(1) / batch
        vector = vector - rate[:, None] * np.einsum("bij,bj->bi", curved, vector)
        if own:
            vector = vector + rate[:, None] * gradients[:, 0] / batch
        w = w - rate[:, None] * gradients.sum(1) / batch
        other = other - rate[:, None] * (far[:, 1:] if own else far).sum(1) / batch
        seen.append(own)
    # Without the row its L2 share is gone too, so contraction is by the other rows' share at least.
    bounds = [
        accounting.recollection_distance(
            learning_rates=np.full(steps, r), contractions=[
                1 - r * l2 * ((batch - 1) / batch if s else 1.0) for s in seen
            ],
            seen=seen, batch_size=batch, gradient_bound=float(g), hessian_lipschitz=GAMMA,
            smoothness=float(s1) if own_hessian else 0.0,
        )
        for r, l2, g, s1 in zip(rate, model.l2, steepest, smooth, strict=True)
    ]  # fmt: skip
    assert loose(bounds, np.linalg.norm(w + vector - other, axis=1)) < 1e4


def test_descent_to_delete_on_ridge():
    rng = np.random.default_rng(40)
    x = rng.normal(size=(NUM, ROWS, DIM))
    y = rng.normal(size=(NUM, ROWS))
    l2 = rng.uniform(0.1, 1.0, NUM)
    curvature = lambda rows: (
        np.einsum("bni,bnj->bij", x[:, rows], x[:, rows]) / x[:, rows].shape[1]
        + l2[:, None, None] * np.eye(DIM)
    )
    moment = lambda rows: np.einsum("bni,bn->bi", x[:, rows], y[:, rows]) / x[:, rows].shape[1]
    everyone, keep = slice(None), slice(1, None)
    values = [np.linalg.eigvalsh(curvature(rows)) for rows in (everyone, keep)]
    low = np.minimum(values[0][:, 0], values[1][:, 0])
    high = np.maximum(values[0][:, -1], values[1][:, -1])
    solve = lambda rows: np.linalg.solve(curvature(rows), moment(rows)[..., None])[..., 0]
    best = solve(everyone)
    error = np.einsum("bnd,bd->bn", x, best) - y
    gradients = error[..., None] * x + (l2[:, None] * best)[:, None]
    lipschitz = np.linalg.norm(gradients, axis=2).max(1)
    steps = 3
    settings = [
        Descent(float(a), float(b), float(g), ROWS, ROWS - 1)
        for a, b, g in zip(low, high, lipschitz, strict=True)
    ]
    diameter = np.maximum(np.linalg.norm(best, axis=1), np.linalg.norm(solve(keep), axis=1))
    first = [
        s.first_steps(steps, diameter=float(d)) for s, d in zip(settings, diameter, strict=True)
    ]

    def descend(w, rows, counts):
        for k in range(max(counts)):
            gradient = np.einsum("bij,bj->bi", curvature(rows), w) - moment(rows)
            active = (k < np.asarray(counts))[:, None]
            w = np.where(active, w - (2 / (low + high))[:, None] * gradient, w)
        return w

    begin = np.zeros((NUM, DIM))
    unlearned = descend(descend(begin, everyone, first), keep, [steps] * NUM)
    retrained = descend(begin, keep, first)
    bounds = [s.distance(steps) for s in settings]
    loose(bounds, np.linalg.norm(unlearned - retrained, axis=1))
    for setting in settings[:50]:
        paper = setting.distance(steps, paper_constants=True)
        assert setting.distance(steps) < paper


def test_capacity_is_the_last_count_that_fits_and_sample_size_the_first():
    rng = np.random.default_rng(50)
    for _ in range(40):
        problem = StronglyConvex(
            l2=rng.uniform(0.05, 1), lipschitz=rng.uniform(0.5, 2),
            hessian_lipschitz=rng.uniform(0.01, 1), dimension=int(rng.integers(1, 1000)),
            epsilon=rng.uniform(0.1, 3), delta=10 ** rng.uniform(-8, -3),
        )  # fmt: skip
        for method in ("newton", "output_perturbation"):
            count, limit = int(rng.integers(100, 10**6)), rng.uniform(0.01, 1)
            risk = lambda n, m, p=problem, how=method: p.excess_risk(
                how, num_examples=n, num_forgotten=m
            )
            m = accounting.strongly_convex_capacity(
                problem, method, num_examples=count, excess_risk=limit
            )
            assert m == 0 or risk(count, m) <= limit
            assert m == count - 1 or risk(count, m + 1) > limit
            need = accounting.sample_complexity(problem, method, num_forgotten=5, excess_risk=limit)
            assert risk(need, 5) <= limit < risk(need - 1, 5)
        better = accounting.newton_beats_output_perturbation(problem, num_examples=count)
        noise = lambda how, m, p=problem, n=count: p.noise(how, num_examples=n, num_forgotten=m)
        if 1 <= better < count - 1:
            assert noise("newton", better) <= noise("output_perturbation", better)
            assert noise("newton", better + 1) >= noise("output_perturbation", better + 1)


def test_capacity_falls_with_the_fourth_root_of_the_dimension_and_a_dp_learners_with_the_square():
    ours = [
        accounting.newton_capacity_order(num_examples=10**6, dimension=d, epsilon=1.0, delta=1e-6)
        / accounting.dp_capacity_order(num_examples=10**6, dimension=d, epsilon=1.0, delta=1e-6)
        for d in (10, 160)
    ]
    assert ours[1] / ours[0] == pytest.approx(2.0)
    newton, dp = (
        [
            accounting.strongly_convex_capacity(
                StronglyConvex(
                    l2=1.0, lipschitz=1.0, hessian_lipschitz=1.0, dimension=d, epsilon=0.1,
                    delta=1e-9,
                ),
                how, num_examples=10**13, excess_risk=0.01,
            )
            for d in (10**6, 10**6 * 256)
        ]
        for how in ("newton", "output_perturbation")
    )  # fmt: skip
    # Noise governs both: sqrt(d) m^2/n^2 against sqrt(d) m/n.
    assert newton[0] / newton[1] == pytest.approx(4.0, rel=0.15)
    assert dp[0] / dp[1] == pytest.approx(16.0, rel=0.15)
    assert newton[0] < accounting.capacity_ceiling(num_examples=10**13, constant=0.99)


def test_excess_risk_is_generalisation_and_deletion_and_noise():
    problem = StronglyConvex(
        l2=0.5, lipschitz=2.0, hessian_lipschitz=0.3, dimension=9, epsilon=1.0, delta=1e-5
    )
    risk = lambda how, m: problem.excess_risk(how, num_examples=100, num_forgotten=m)
    assert risk("newton", 0) == pytest.approx(2 * 4 / (0.5 * 100))
    assert risk("newton", 100) == math.inf
    mu = accounting.gaussian_mu(epsilon=1.0, delta=1e-5)
    common = 2 * 4 / (0.5 * 100) + 10 * 4 / (0.5 * 90)
    newton = 0.3 * 100 * 4 / (2 * 0.125 * 90**2)
    assert risk("newton", 10) == pytest.approx(common + 2 * 3 * newton / mu)
    output = 10 * 2 / (0.5 * 90)
    assert risk("output_perturbation", 10) == pytest.approx(common + 2 * 3 * output / mu)
    with pytest.raises(ValueError, match="Expected method in"):
        risk("retrain", 10)


def test_descent_at_the_condition_number_one_is_done_in_a_step():
    descent = Descent(1.0, 1.0, 1.0, 10)
    assert descent.distance(1) == 0.0
    assert descent.first_steps(1, diameter=5.0) == 1
    with pytest.raises(ValueError, match="strong_convexity < smoothness"):
        accounting.full_state_schedule(descent, epsilon=1.0, delta=1e-3, dimension=2, num_updates=1)


def test_excess_risk_of_a_mean_is_within_the_bound():
    # loss_i = (l2/2) |w - z_i|^2 with z in the unit ball: the minimiser is the mean, M = 0.
    rng = np.random.default_rng(60)
    l2, n, dim, trials = 0.5, 40, 3, 4000
    problem = StronglyConvex(
        l2=l2, lipschitz=2 * l2, hessian_lipschitz=0.0, dimension=dim, epsilon=1.0, delta=1e-5
    )
    z = rng.normal(size=(trials, n, dim))
    z /= np.linalg.norm(z, axis=2, keepdims=True)
    for m in (0, 1, 5):
        # The worst rows: those furthest along one direction, mean zero being the truth.
        order = np.argsort(-z[..., 0], axis=1)
        kept = np.take_along_axis(z, order[..., None], axis=1)[:, m:]
        estimate = kept.mean(1)
        if m:
            sigma = problem.noise("output_perturbation", num_examples=n, num_forgotten=m)
            estimate = estimate + sigma * rng.normal(size=estimate.shape)
        risk = l2 / 2 * np.mean(np.sum(estimate**2, axis=1))
        bound = problem.excess_risk("output_perturbation", num_examples=n, num_forgotten=m)
        # F grows quadratically beyond the unit ball, where the noise may lead: count within it.
        inside = np.linalg.norm(estimate, axis=1) < 1
        risk_inside = l2 / 2 * np.mean(np.sum(estimate[inside] ** 2, axis=1)) if m else risk
        assert risk_inside <= bound


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: accounting.minimiser_distance(
            num_forgotten=0, num_retained=1, l2=1.0, lipschitz=1.0), "num_forgotten=0"),
        (lambda: accounting.rewind_distance(
            num_forgotten=1, num_examples=9, gradient_bound=1.0, learning_rate=3.0, num_steps=2,
            num_rewound=1, smoothness=1.0, strong_convexity=0.1), "learning_rate=3.0 <="),
        (lambda: accounting.rewind_distance(
            num_forgotten=1, num_examples=9, gradient_bound=1.0, learning_rate=3.0, num_steps=2,
            num_rewound=1), "Expected smoothness"),
        (lambda: accounting.rewind_distance(
            num_forgotten=1, num_examples=9, gradient_bound=1.0, learning_rate=3.0, num_steps=2,
            num_rewound=3), "num_rewound=3 <= num_steps=2"),
        (lambda: Descent(2.0, 1.0, 1.0, 9).rate, "strong_convexity <= smoothness"),
        (lambda: accounting.capacity_ceiling(num_examples=9, constant=1.0), "constant=1.0"),
        (lambda: accounting.deep_newton_distance(
            radius=1.0, damping=1.0, least_curvature=-2.0, hessian_lipschitz=0.0), "damping"),
    ],
)  # fmt: skip
def test_figures_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
