"""Curvature matrices as objects: `op @ v`, sums, multiples, damping. Pytrees that pass a `jit`."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxunlearn import tree
from jaxunlearn.kernels._curvature import check_damping
from jaxunlearn.kernels._operands import check_like
from jaxunlearn.kernels.fisher import Likelihood, empirical_fisher_vp_many, fisher_vp_many
from jaxunlearn.kernels.products import ggn_vp_many, hvp_many
from jaxunlearn.kernels.rowwise import check_params
from jaxunlearn.types import Batch, LossFn, Params


class LinearOperator:
    """A symmetric matrix on vectors shaped like the parameters, given by its products.

    `op @ v` takes one vector, or a stack of them with a leading axis on every leaf, and is jitted:
    parameters, batch and weights are its arguments, so operators on other data or at other
    parameters of the same shapes compile nothing. `op(v)` is the same, so that `op` itself is the
    matvec of a solver. `a + b`, `a - b`, `2.0 * a`, `-a` and `a.damped(x)` are operators; `a.T` is
    `a`.

    >>> matrix = hessian_operator(lambda w, x: jnp.mean(w @ w * x))(jnp.zeros(2), jnp.ones(3))
    >>> matrix.damped(0.5) @ jnp.array([1.0, 2.0])
    Array([2.5, 5. ], dtype=float32)
    >>> matrix.shape
    (2, 2)
    """

    @property
    def domain(self) -> PyTree:
        """Shapes and dtypes of a vector."""
        raise NotImplementedError

    def products(self, vectors: PyTree) -> PyTree:
        """The products with a stack of vectors, traced where it is called."""
        raise NotImplementedError

    def __matmul__(self, vectors: PyTree) -> PyTree:
        if not _is_stack(self.domain, vectors):
            check_like(self.domain, vectors)
            stacked = _product(self, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], vectors))
            return jax.tree.map(lambda leaf: leaf[0], stacked)
        check_like(self.domain, vectors, is_stack=True)
        return _product(self, vectors)

    def __call__(self, vectors: PyTree) -> PyTree:
        return self @ vectors

    @property
    def shape(self) -> tuple[int, int]:
        """(P, P), P the number of parameters."""
        return (tree.num_parameters(self.domain),) * 2

    @property
    def T(self) -> "LinearOperator":
        """The transpose: the operator itself."""
        return self

    def to_dense(self) -> Float[Array, "p p"]:
        """The matrix, in the order of `ravel_pytree`; for tests. Cost: P products, P^2 memory."""
        units = jnp.eye(self.shape[0])
        leaves, treedef = jax.tree.flatten(self.domain)
        sizes = [tree.num_parameters(leaf) for leaf in leaves]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        basis = [
            units[:, start : start + size].reshape(-1, *leaf.shape).astype(leaf.dtype)
            for leaf, start, size in zip(leaves, starts, sizes)
        ]
        if not leaves:
            return units
        columns = jax.tree.leaves(self @ jax.tree.unflatten(treedef, basis))
        return jnp.concatenate([leaf.reshape(len(units), -1) for leaf in columns], axis=1).T

    def damped(self, damping: float | Float[Array, ""]) -> "LinearOperator":
        """self + damping I, damping >= 0."""
        check_damping(damping)
        return Total((self, Scaled(Identity.like(self.domain), damping)))

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        if not isinstance(other, LinearOperator):
            return NotImplemented
        shapes = [jax.tree.map(lambda leaf: leaf.shape, op.domain) for op in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"Expected operators on the same shapes, got {shapes}.")
        return Total((self, other))

    def __mul__(self, scale: float | Float[Array, ""]) -> "LinearOperator":
        if isinstance(scale, LinearOperator) or jnp.shape(scale) != ():
            return NotImplemented
        return Scaled(self, scale)

    __rmul__ = __mul__

    def __neg__(self) -> "LinearOperator":
        return Scaled(self, -1.0)

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "batch", "options"],
    meta_fields=["many"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Curvature(LinearOperator):
    """A curvature matrix at `params` over `batch`.

    many: (params, batch, vectors, **options) -> products, as `hvp_many` returns.
    options: weights, num_rows, keys, leave_out, sample_keys; those that are given.
    """

    params: Params
    batch: Batch
    options: dict[str, Any]
    many: Callable[..., PyTree]

    @property
    def domain(self) -> PyTree:
        return jax.eval_shape(lambda p: jax.tree.map(jnp.asarray, p), self.params)

    def products(self, vectors: PyTree) -> PyTree:
        return self.many(self.params, self.batch, vectors, **self.options)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=[], meta_fields=["leaves", "treedef"]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Identity(LinearOperator):
    """The identity on vectors of these (shape, dtype) leaves."""

    leaves: tuple[tuple[tuple[int, ...], Any], ...]
    treedef: Any

    @classmethod
    def like(cls, params: PyTree) -> "Identity":
        """The identity on vectors like `params`."""
        leaves, treedef = jax.tree.flatten(params)
        return cls(tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves), treedef)

    @property
    def domain(self) -> PyTree:
        return self.treedef.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in self.leaves])

    def products(self, vectors: PyTree) -> PyTree:
        return vectors


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["operator", "scale"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True, eq=False)
class Scaled(LinearOperator):
    """scale * operator."""

    operator: LinearOperator
    scale: float | Float[Array, ""]

    @property
    def domain(self) -> PyTree:
        return self.operator.domain

    def products(self, vectors: PyTree) -> PyTree:
        products = self.operator.products(vectors)
        return jax.tree.map(lambda leaf: (self.scale * leaf).astype(leaf.dtype), products)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["terms"], meta_fields=[])
@dataclasses.dataclass(frozen=True, eq=False)
class Total(LinearOperator):
    """The sum of several operators."""

    terms: tuple[LinearOperator, ...]

    @property
    def domain(self) -> PyTree:
        return self.terms[0].domain

    def products(self, vectors: PyTree) -> PyTree:
        first, *rest = (term.products(vectors) for term in self.terms)
        for more in rest:
            first = jax.tree.map(lambda a, b: a + b.astype(a.dtype), first, more)
        return first


def hessian_operator(
    loss_fn: LossFn, *, microbatch_size: int | None = None, tangents_at_once: int | None = None
):
    """The Hessian of a mean loss as an operator; arguments as `hvp_many`.

    Returns:
      A function (params, batch, **options) -> `LinearOperator`; options: weights, num_rows, keys,
      leave_out, as `hvp` takes them.

    Raises: as `hvp`; TypeError for any other option.

    Cost: as `hvp_many` in each `op @ v`.

    >>> matrix = hessian_operator(lambda w, x: jnp.mean((x * w) ** 2))
    >>> 2.0 * matrix(jnp.array(1.0), jnp.array([1.0, 3.0])) @ jnp.array(1.0)
    Array(20., dtype=float32)
    """
    return _maker("hessian_operator", hvp_many, (loss_fn,), microbatch_size, tangents_at_once)


def ggn_operator(
    outputs_fn: Callable[..., Any],
    outputs_loss: Callable[[Any, Batch], Any],
    *,
    microbatch_size: int | None = None,
    tangents_at_once: int | None = None,
):
    """The Gauss-Newton matrix as an operator; arguments as `ggn_vp_many`.

    Returns as `hessian_operator`.

    Cost: as `ggn_vp_many` in each `op @ v`.

    >>> matrix = ggn_operator(lambda w, x: w * x, lambda z, x: jnp.mean(z**2))
    >>> matrix(jnp.array(1.0), jnp.array([1.0, 3.0])) @ jnp.array(1.0)
    Array(10., dtype=float32)
    """
    functions = outputs_fn, outputs_loss
    return _maker("ggn_operator", ggn_vp_many, functions, microbatch_size, tangents_at_once)


def fisher_operator(
    outputs_fn: Callable[..., Any],
    likelihood: Likelihood,
    *,
    num_samples: int | None = None,
    microbatch_size: int | None = None,
    tangents_at_once: int | None = None,
):
    """The Fisher matrix as an operator; arguments as `fisher_vp_many`.

    Make the likelihood once: one made anew is another function, and compiles again.

    Returns as `hessian_operator`; with `num_samples` the option sample_keys is needed too.

    Cost: as `fisher_vp_many` in each `op @ v`.

    >>> from jaxunlearn.kernels import gaussian
    >>> matrix = fisher_operator(lambda w, x: w * x, gaussian())
    >>> matrix(jnp.array(1.0), jnp.array([1.0, 3.0])) @ jnp.array(1.0)
    Array(5., dtype=float32)
    """
    make = _fisher_with(num_samples)
    functions = outputs_fn, likelihood
    return _maker("fisher_operator", make, functions, microbatch_size, tangents_at_once)


def empirical_fisher_operator(
    loss_fn: LossFn, *, microbatch_size: int | None = None, tangents_at_once: int | None = None
):
    """The empirical Fisher matrix as an operator; arguments as `empirical_fisher_vp_many`.

    Returns as `hessian_operator`.

    Cost: as `empirical_fisher_vp_many` in each `op @ v`.

    >>> matrix = empirical_fisher_operator(lambda w, x: jnp.mean(x * w))
    >>> matrix(jnp.array(1.0), jnp.array([1.0, 3.0])) @ jnp.array(1.0)
    Array(5., dtype=float32)
    """
    name = "empirical_fisher_operator"
    return _maker(name, empirical_fisher_vp_many, (loss_fn,), microbatch_size, tangents_at_once)


@functools.lru_cache(maxsize=16)
def _fisher_with(num_samples: int | None):
    """`fisher_vp_many` with so many samples."""
    return functools.partial(fisher_vp_many, num_samples=num_samples)


_OPTIONS = ("weights", "num_rows", "keys", "leave_out")


def _maker(name: str, make, functions, microbatch_size, tangents_at_once):
    """The function from operands to a `Curvature`."""
    known = (*_OPTIONS, "sample_keys") if name == "fisher_operator" else _OPTIONS
    hashable = all(isinstance(function, Hashable) for function in functions)
    build = _cached if hashable else _cached.__wrapped__
    many = build(make, functions, microbatch_size, tangents_at_once)

    def operator(params: Params, batch: Batch, **options: Any) -> LinearOperator:
        if not options.keys() <= set(known):
            unknown = sorted(options.keys() - set(known))
            raise TypeError(
                f"Expected options of {name}(...)(params, batch) out of {known}, got {unknown}."
            )
        check_params(params)
        given = {key: value for key, value in options.items() if value is not None}
        return Curvature(params, batch, given, many)

    return operator


@functools.lru_cache(maxsize=256)
def _cached(make, functions, microbatch_size, tangents_at_once):
    """The same products for the same functions, so that a new operator compiles nothing."""
    return make(*functions, microbatch_size=microbatch_size, tangents_at_once=tangents_at_once)


def _is_stack(domain: PyTree, vectors: PyTree) -> bool:
    """Whether `vectors` are a stack: some leaf has an axis more than in `domain`."""
    pairs = zip(jax.tree.leaves(domain), jax.tree.leaves(vectors))
    return any(jnp.ndim(own) == len(leaf.shape) + 1 for leaf, own in pairs)


@jax.jit
def _product(operator: LinearOperator, vectors: PyTree) -> PyTree:
    """The products, compiled once for each kind of operator and shapes."""
    return operator.products(vectors)
