"""Randomised low-rank eigendecompositions of an operator, and preconditioners."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from jaxunlearn.kernels._checks import check_number
from jaxunlearn.kernels._stable import widen
from jaxunlearn.kernels.solves.block import STACK, gram, mix, orthonormal, placed, stacked
from jaxunlearn.kernels.solves.common import (
    Matvec,
    Solution,
    Solver,
    Space,
    as_function,
    as_vector,
    check_stack,
    like,
    problem,
    zeros,
)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["vectors", "eigenvalues", "negative_curvature"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class NystromApproximation:
    """A ~ U diag(eigenvalues) U', a pytree.

    vectors: U', orthonormal rows: leaves (rank, *shape), float32 or wider. Zero where the operator
      has a lower rank.
    eigenvalues: (rank,), descending, >= 0.
    negative_curvature: whether the sketch met a direction with p' A p <= 0 beyond rounding.
    """

    vectors: PyTree
    eigenvalues: Float[Array, " rank"]
    negative_curvature: Bool[Array, ""]

    def product(self, vector: PyTree) -> PyTree:
        """U diag(eigenvalues) U' v."""

        def product(self, vector):
            return like(_combine(self, self.eigenvalues * self._coordinates(vector)), vector)

        return placed(product, self, vector, like=vector, template=_like_vector)

    def inverse(self, damping: float | Array) -> Matvec:
        """v -> (U diag(eigenvalues) U' + damping I)^-1 v, near that of A + damping I."""
        _check_damping(damping)
        return self._function(1.0 / (self.eigenvalues + damping), 1.0 / damping)

    def preconditioner(self, damping: float | Array) -> Matvec:
        """v -> M^-1 v for A + damping I: its large eigenvalues are moved to the smallest kept one.

            M^-1 = (smallest + damping) U (diag(eigenvalues) + damping I)^-1 U' + (I - U U')

        Frangella, Tropp and Udell 2023, equation 5.3. Costs 4 rank n operations. Use `jax.vmap` of
        it for `cg(many=True)`.
        """
        _check_damping(damping)
        smallest = jnp.min(self.eigenvalues)
        return self._function((smallest + damping) / (self.eigenvalues + damping), 1.0)

    def solver(self, damping: float | Array, *, many: bool = False) -> Solver:
        """`inverse(damping)` as a solver of A + damping I: no product but the residual's.

        Exact if A has no higher rank than the sketch; `refined` makes it a convergent iteration
        where the part left out is below `damping`. An `x0` is a start from which what is left is
        solved, for one product more.
        """
        inverse = self.inverse(damping)
        space = Space(many)

        def solve(matvec: Matvec, rhs: PyTree, *, x0=None, key=None) -> Solution:
            del key
            if many:
                check_stack(rhs)
            system = problem(space, as_function(matvec), rhs, x0, 0.0)
            x = jax.vmap(inverse)(system.residual) if many else inverse(system.residual)
            negative = zeros(space, system.rhs, bool) | self.negative_curvature
            return system.solution(x, zeros(space, system.rhs, jnp.int32), negative)

        return solve

    def _coordinates(self, vector: PyTree) -> Float[Array, " rank"]:
        """U' v."""
        return gram(self.vectors, jax.tree.map(lambda v: jnp.asarray(v)[None], vector))[:, 0]

    def _function(self, inside: Array, outside: float | Array) -> Matvec:
        """v -> U diag(inside) U' v + outside (I - U U') v."""

        def apply(self, inside, outside, vector: PyTree) -> PyTree:
            pulled = _combine(self, (inside - outside) * self._coordinates(vector))
            moved = jax.tree.map(lambda v, p: outside * v + p, widen(vector), pulled)
            return like(moved, as_vector(vector))

        operands = self, inside, outside
        return lambda vector: placed(apply, *operands, vector, like=vector, template=_like_vector)


def nystrom(
    matvec: Matvec,
    vector: PyTree,
    *,
    rank: int,
    key: Key[Array, ""],
    many: bool = False,
) -> NystromApproximation:
    """Randomised Nystrom approximation of a positive semidefinite operator.

        A ~ Y (Omega' Y)^+ Y',  Y = A Omega,  Omega random with `rank` orthonormal columns

    Computed for A + nu I with nu = sqrt(n) eps ||Y||, which is taken off the eigenvalues again.

    Args:
      matvec: v -> A v, without damping; stacks of `rank` vectors to stacks with `many`.
      vector: one vector; only its shapes and dtypes are read.
      rank: the size of the sketch, between 1 and the number of unknowns. The error is a small
        multiple of the eigenvalues beyond about rank / 2.
      key: of the sketch.

    Returns:
      A `NystromApproximation`.

    Cost: `rank` products, 28 n rank^2 operations, and seven decompositions of size rank.
    Memory: three times rank copies of the vector.

    Raises:
      ValueError: `rank` out of range.

    References: Frangella, Tropp and Udell 2023, "Randomized Nystrom preconditioning", algorithm
      2.1. Deviations: eigendecompositions of Gram matrices stand for QR, Cholesky and SVD, so that
      leaves keep their shapes and the rank may be anything.

    >>> matvec = lambda v: jnp.array([4.0, 1.0, 0.0]) * v
    >>> approximation = nystrom(matvec, jnp.zeros(3), rank=3, key=jax.random.key(0))
    >>> approximation.eigenvalues.round(4) + 0.0
    Array([4., 1., 0.], dtype=float32)
    >>> approximation.inverse(1.0)(jnp.array([5.0, 2.0, 1.0])).round(4)
    Array([1., 1., 1.], dtype=float32)
    """
    vector = as_vector(vector)
    leaves, treedef = jax.tree.flatten(vector)
    size = sum(leaf.size for leaf in leaves)
    if not 1 <= rank <= size:
        raise ValueError(f"Expected 1 <= rank={rank} <= {size}, the number of unknowns.")
    wide = [jnp.promote_types(leaf.dtype, jnp.float32) for leaf in leaves]

    def draw(_, keys):
        draws = [jax.random.normal(k, (rank, *v.shape), d) for k, v, d in zip(keys, leaves, wide)]
        return like(orthonormal(jax.tree.unflatten(treedef, draws), 2)[0], vector)

    omega = placed(draw, vector, jax.random.split(key, len(leaves)), like=vector, template=stacked)
    matvec = as_function(matvec)
    sketch = widen(matvec(omega) if many else jax.vmap(matvec)(omega))
    template = lambda vectors, small: NystromApproximation(stacked(vectors, small), small, small)
    decompose = functools.partial(_decompose, size)
    return placed(decompose, widen(omega), sketch, like=vector, template=template)


@functools.partial(jax.jit, static_argnums=0)
def _decompose(size: int, omega: PyTree, sketch: PyTree) -> NystromApproximation:
    """Eigenvalues and vectors of Y (Omega' Y)^+ Y', shifted and shifted back."""
    norm = jnp.sqrt(jnp.sum(STACK.norm(sketch) ** 2))
    eps = jnp.finfo(norm.dtype).eps
    shift = jnp.sqrt(float(size)) * eps * norm
    sketch = STACK.axpy(shift, omega, sketch)
    core = gram(omega, sketch)
    values, vectors = jnp.linalg.eigh(0.5 * (core + core.T))
    kept = values > 0.5 * shift
    inverse_root = jnp.where(kept, 1.0 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)
    half = mix((vectors * inverse_root).T, sketch)  # B with A + nu I ~ B' B
    basis, _ = orthonormal(half, 3)
    left, singular, _ = jnp.linalg.svd(gram(basis, half))
    finite = jnp.isfinite(norm)
    return NystromApproximation(
        vectors=mix(left.T, basis),
        eigenvalues=jnp.where(finite, jnp.maximum(singular**2 - shift, 0.0), jnp.nan),
        negative_curvature=~finite | jnp.any(values < -shift),
    )


def jacobi(diagonal: PyTree, *, damping: float | Array = 0.0) -> Matvec:
    """The diagonal preconditioner, v -> v / (diagonal + damping).

    Args:
      diagonal: shaped like the vectors; exact, or an estimate. Entries that are not positive with
        `damping` on top, as estimates can be, are replaced by the mean of those that are.
      damping: >= 0.

    Returns:
      A function of one vector, or of a stack of them.

    Cost: no product; one multiplication an entry.

    >>> jacobi(jnp.array([2.0, 4.0]))(jnp.array([2.0, 2.0]))
    Array([1. , 0.5], dtype=float32)
    """
    check_number("damping", damping, least=0)
    damped = jax.tree.map(lambda d: widen(d) + damping, diagonal)
    usable = jax.tree.map(lambda d: (d > 0) & jnp.isfinite(d), damped)
    total = sum(jnp.sum(jnp.where(u, d, 0.0)) for d, u in _pairs(damped, usable))
    count = sum(jnp.sum(u) for _, u in _pairs(damped, usable))
    mean = jnp.where(count > 0, total / jnp.maximum(count, 1), 1.0)
    scale = jax.tree.map(lambda d, u: 1.0 / jnp.where(u, d, mean), damped, usable)
    return lambda vector: jax.tree.map(lambda v, s: (v * s).astype(v.dtype), vector, scale)


def _combine(approximation: NystromApproximation, coordinates: Float[Array, " rank"]) -> PyTree:
    """U c."""
    combined = mix(coordinates[None, :], approximation.vectors)
    return jax.tree.map(lambda leaf: leaf[0], combined)


def _like_vector(vectors: PyTree, small) -> PyTree:
    """Specs of a vector."""
    return vectors


def _pairs(a: PyTree, b: PyTree):
    return list(zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def _check_damping(damping: float | Array) -> None:
    """Refuse to invert an approximation that has no full rank."""
    check_number("damping", damping, above=0)
