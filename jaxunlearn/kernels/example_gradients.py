"""The gradients of the rows of a batch, and what can be asked of them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from jaxunlearn.kernels import _operations, projection, units
from jaxunlearn.kernels._rules import Explanation, LeafPath
from jaxunlearn.kernels.factors import Factor
from jaxunlearn.types import Params

LayerOf = Callable[[str], str]
"""From a leaf's name as `explain()` prints it to the name of the layer it belongs to."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("losses", "is_finite", "num_non_finite", "factors", "is_padding", "aux"),
    ],
    meta_fields=["paths", "dtypes", "treedef", "specs"],
)
@dataclasses.dataclass(frozen=True)
class PerExampleGradients:
    """The gradients g_1 .. g_B of a batch, factored. A pytree: it may leave a `jit`.

    losses: (B,); zero where a row does not contribute.
    is_finite: (B,), whether a row's inputs, loss and gradient are; true for padding. A row that is
      not contributes zero to everything below. Finite means that the sum over tokens of
      |left| |right|, which the norm cannot exceed, is below the largest number of the dtype.
    num_non_finite: int32, how many rows are not.
    is_padding: (B,), rows that were declared to be none; they contribute zero too. None where
      nothing was declared.
    aux: what else the loss returned for each row, (B, ...) leaves, where `has_aux`; else None.

    Sums and products accumulate in float32 or wider, at the highest precision of the device.

    >>> import jax.numpy as jnp
    >>> from jaxunlearn import kernels
    >>> loss = lambda w, batch: jnp.mean(batch @ w)
    >>> grads = kernels.per_example(loss)(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.0, 1.0]]))
    >>> grads.norms()
    Array([5., 1.], dtype=float32)
    >>> grads.sum()
    Array([3., 5.], dtype=float32)
    """

    losses: Float[Array, " b"]
    is_finite: Bool[Array, " b"]
    num_non_finite: Int[Array, ""]
    factors: tuple[Factor, ...]
    paths: tuple[LeafPath, ...] = dataclasses.field(repr=False)
    dtypes: tuple[Any, ...] = dataclasses.field(repr=False)
    treedef: Any = dataclasses.field(repr=False)
    specs: tuple[Any, ...] = dataclasses.field(repr=False)
    is_padding: Bool[Array, " b"] | None = None
    aux: PyTree = None

    @property
    def contributes(self) -> Bool[Array, " b"]:
        """(B,), which rows count: finite and not padding."""
        return self.is_finite if self.is_padding is None else self.is_finite & ~self.is_padding

    def norms(self) -> Float[Array, " b"]:
        """Each ||g_i||_2 over all parameters, (B,).

        Cost: for a factored leaf with one token, the norms of its factors, O(B (m + n)); with T
        tokens, T x T Grams, O(B T^2 (m + n)), or the product, whichever is cheaper; the product as
        well where the tokens of a row cancel.
        """
        return _operations.norms_and_uppers(self, _operations.one_group(self))[0][0]

    def norm_bounds(self) -> Float[Array, " b"]:
        """What rounding can have hidden, (B,): ||g_i|| <= norms + norm_bounds.

        Here g_i is what exact arithmetic makes of the activations and cotangents that
        backpropagation left, rounded as it did. A leaf that is kept as it came (paths "vector" and
        "materialised") is taken as backpropagation added it up.

        Clipping asks for less. A leaf of path "product" adds its rounded product to a sum, so its
        contribution is bounded by the norm of that, which is measured: what the product hides of
        g_i widens these bounds and no clip weight.

        Cost: that of `norms`, and the norms of the factors that were multiplied out.
        """
        (norm,), (upper,) = _operations.norms_and_uppers(self, _operations.one_group(self))
        return upper - norm + _operations.hidden(self)

    def leaf_norms(self) -> PyTree:
        """Each ||g_i||_2 of each parameter: a pytree like the parameters, every leaf (B,).

        Cost: that of `norms`.

        >>> import jax.numpy as jnp
        >>> from jaxunlearn import kernels
        >>> loss = lambda p, x: jnp.mean(x @ p["w"] + 2 * p["b"])
        >>> params, batch = {"w": jnp.zeros(2), "b": 0.0}, jnp.array([[3.0, 4.0]])
        >>> grads = kernels.per_example(loss)(params, batch)
        >>> grads.leaf_norms()
        {'b': Array([2.], dtype=float32), 'w': Array([5.], dtype=float32)}
        """
        alone = tuple(range(len(self.factors)))
        norms, _ = _operations.norms_and_uppers(self, alone)
        return jax.tree.unflatten(self.treedef, norms[: len(alone)])

    def layer_norms(self, *, layer_of: LayerOf | None = None) -> dict[str, Float[Array, " b"]]:
        """Each ||g_i||_2 over the parameters of each layer, (B,), by the layer's name.

        Args:
          layer_of: names the layer of a leaf, from the leaf's name as `explain()` prints it. None:
            the leaf's name without its last key, so that a weight and its bias are one layer.

        Cost: that of `norms`.

        >>> import jax.numpy as jnp
        >>> from jaxunlearn import kernels
        >>> loss = lambda p, x: jnp.mean(x @ p["dense"]["w"] + 12 * p["dense"]["b"])
        >>> params = {"dense": {"w": jnp.zeros(2), "b": 0.0}}
        >>> kernels.per_example(loss)(params, jnp.array([[3.0, 4.0]])).layer_norms()
        {"params['dense']": Array([13.], dtype=float32)}
        """
        groups, layers = _operations.layers_of(self, layer_of)
        norms, _ = _operations.norms_and_uppers(self, groups)
        return dict(zip(layers, norms))

    def sum(self, weights: Float[Array, " b"] | None = None, *, dtype: Any = None) -> Params:
        """sum_i w_i g_i, shaped like the parameters, rounded to `dtype` or theirs at the end.

        The weight of a row that does not contribute is not read.

        Cost: one matmul per factored weight with w folded into its smaller factor, the flops of the
        weight gradients of one batch; no second backward pass.
        """
        if weights is not None and jnp.shape(weights) != self.losses.shape:
            raise ValueError(
                f"Expected weights of shape {self.losses.shape}, got {jnp.shape(weights)}."
            )
        each = None if weights is None else (jnp.asarray(weights),)
        return _operations.weighted_sum(self, each, _operations.one_group(self), _dtype(dtype))

    def clip_weights(self, l2_clip_norm: float | Float[Array, ""]) -> Float[Array, " b"]:
        """min(1, C / ||g_i||), each norm taken with its rounding bound, (B,).

        `sum(clip_weights(C) * w)` is a weighted clipped sum; one where a row does not contribute.

        Cost: that of `norms`.
        """
        (upper,), (limits,) = _operations.bounds(self, _operations.one_group(self))
        clip = _operations.lowered("l2_clip_norm", l2_clip_norm, upper.dtype)
        return _operations.clip_scales(upper, clip, limits=limits)

    def clipped_sum(self, l2_clip_norm: float | Float[Array, ""], *, dtype: Any = None) -> Params:
        """sum_i g_i min(1, C / ||g_i||), each norm taken with its rounding bound.

        The float64 norm of every contribution is at most C, rounding included; adding the
        contributions up, and the cast to `dtype` or the parameters' own, round as any sum does.
        What underflows on the way is allowed for: where that may come to C (left factors beyond
        about 1e37 C in float32, say) a contribution is zero.

        Args:
          l2_clip_norm: C >= 0, infinity included; 0 gives zero. May be traced: one below zero then
            counts as 0, and NaN makes the sum NaN.

        Cost: `norms` and `sum`.

        Raises:
          ValueError: a clip norm that is not one number, or known not to be >= 0.
        """
        scales = _operations.clip_scales
        return self._scaled_sum(_operations.one_group(self), [(l2_clip_norm,)], scales, dtype)

    def layer_clipped_sum(
        self, l2_clip_norm: PyTree, *, layer_of: LayerOf | None = None, dtype: Any = None
    ) -> Params:
        """sum_i of g_i with every layer l clipped on its own: g_il min(1, C_l / ||g_il||).

        The float64 norm of every contribution is at most sqrt(sum_l C_l^2), rounding included.

        Args:
          l2_clip_norm: one number C for k layers, each then with C / sqrt(k), C together; or a
            dict with each layer's own C_l, by the names of `layer_norms`; or a pytree that the
            parameters' structure begins with, the leaves below each of its numbers then one layer.
          layer_of: as in `layer_norms`; not read for a pytree of numbers.

        Cost: that of `clipped_sum`.

        References: McMahan et al. 2018, "Learning differentially private recurrent language
          models", section 3.1 (per-layer clipping with C_l = C / sqrt(k)).

        >>> import jax.numpy as jnp
        >>> from jaxunlearn import kernels
        >>> loss = lambda p, x: jnp.mean(x @ p["w"] + 2 * p["b"])
        >>> params, batch = {"w": jnp.zeros(2), "b": 0.0}, jnp.array([[3.0, 4.0]])
        >>> grads = kernels.per_example(loss)(params, batch)
        >>> grads.layer_clipped_sum({"w": 10.0, "b": 1.0})["w"]
        Array([3., 4.], dtype=float32)
        """
        groups, norms = _operations.layer_clip_norms(self, l2_clip_norm, layer_of)
        operands = [(norm,) for norm in norms]
        return self._scaled_sum(groups, operands, _operations.clip_scales, dtype)

    def automatic_sum(
        self,
        l2_clip_norm: float | Float[Array, ""] = 1.0,
        *,
        gamma: float = 0.01,
        dtype: Any = None,
    ) -> Params:
        """sum_i g_i C / (||g_i|| + gamma): automatic clipping, with nothing to tune but C.

        The float64 norm of every contribution is at most C, rounding included.

        Args:
          gamma: >= 0; small gradients stay small. With 0 it is C times `normalized_sum`. It may be
            traced, as C may: below zero they count as 0, and NaN makes the sum NaN.

        Cost: that of `clipped_sum`.

        References: Bu et al. 2023, "Automatic clipping", equation (4) (AUTO-S); gamma = 0 is their
          AUTO-V. Deviation: the norm is taken with its rounding bound.

        >>> import jax.numpy as jnp
        >>> from jaxunlearn import kernels
        >>> grads = kernels.per_example(lambda w, x: jnp.mean(x * w))(0.0, jnp.array([3.0, 7.0]))
        >>> print(round(float(grads.automatic_sum(1.0, gamma=1.0)), 3))  # 3 / 4 + 7 / 8
        1.625
        """
        operands = [(l2_clip_norm, gamma)]
        scales = _operations.automatic_scales
        return self._scaled_sum(_operations.one_group(self), operands, scales, dtype)

    def normalized_sum(self, *, dtype: Any = None) -> Params:
        """sum_i g_i / ||g_i||; a gradient of norm zero contributes zero.

        The float64 norm of every contribution is at most 1, rounding included.

        Cost: that of `clipped_sum`.
        """
        return self.automatic_sum(1.0, gamma=0.0, dtype=dtype)

    def _scaled_sum(self, groups, operands, scales, dtype) -> Params:
        """A sum scaled layer by layer, with every clip norm, and gamma, rounded towards zero."""
        wide = jnp.promote_types(jnp.float32, self.losses.dtype)
        for own in self.dtypes:
            wide = jnp.promote_types(wide, own)
        names = ("l2_clip_norm", "gamma")
        operands = tuple(
            tuple(_operations.lowered(name, x, wide) for name, x in zip(names, own))
            for own in operands
        )
        return _operations.scaled_sum(self, groups, operands, scales, _dtype(dtype))

    def dot(self, vector: Params) -> Float[Array, " b"]:
        """<g_i, vector> for a vector shaped like the parameters, (B,): directional derivatives.

        Cost: the flops of one forward pass through the factored weights.
        """
        leaves, treedef = jax.tree.flatten(vector)
        shapes = [jnp.shape(leaf) for leaf in leaves]
        if treedef != self.treedef or shapes != [path.shape for path in self.paths]:
            raise ValueError(
                "Expected a vector with the structure and shapes of the parameters, "
                f"{self.treedef} with {[path.shape for path in self.paths]}, "
                f"got {treedef} with {shapes}."
            )
        return _operations.dots(self, leaves)

    def gram(self, other: "PerExampleGradients | None" = None) -> Float[Array, "b c"]:
        """<g_i, h_j> with the gradients of another batch, (B, C), or with themselves, (B, B).

        Blocks of the empirical Fisher's Gram matrix; of the tangent kernel, where the "loss" is an
        output of the model. Both must be of the same parameters.

        Cost: for a factored leaf with one token, O(B C (m + n)); with T, the product a few rows at
        a time, O((B + C) T m n + B C m n).

        >>> import jax.numpy as jnp
        >>> from jaxunlearn import kernels
        >>> rows = kernels.per_example(lambda w, x: jnp.mean(x @ w))
        >>> train = rows(jnp.zeros(2), jnp.eye(2))
        >>> train.gram(rows(jnp.zeros(2), jnp.array([[3.0, 4.0]])))
        Array([[3.],
               [4.]], dtype=float32)
        """
        if other is not None and _shapes(self) != _shapes(other):
            raise ValueError(
                "Expected gradients of the same parameters, "
                f"{self.treedef} with {[path.shape for path in self.paths]}, "
                f"got {other.treedef} with {[path.shape for path in other.paths]}."
            )
        return _operations.gram(self, other)

    def project(
        self,
        key: Key[Array, ""],
        num_directions: int,
        *,
        distribution: str = "rademacher",
        structure: str = "full",
    ) -> Float[Array, "b k"]:
        """<g_i, r_j> / sqrt(k) for k random directions r_j, (B, k): sketches of the gradients.

        The inner product of two sketches is that of the two gradients in expectation. For one
        gradient, the square of the sketch's norm has a relative standard deviation of at most
        sqrt(2 / k). The same key gives the same directions for any batch, also when the rows come
        by other paths, and any device.

        Args:
          num_directions: k >= 1.
          distribution: of the entries of r_j: "rademacher", 1 or -1, or "gaussian".
          structure: "full"; or "kronecker": u v^T for each leaf with two axes or more, v over its
            last axis. Expectations stay; the standard deviation is at most sqrt(8 / k), twice as
            large, since (u' G v)^2 has up to 9 ||G||^4 for a second moment in place of 3, and its
            tails are heavier. For the same accuracy take 4 k directions.

        Cost: k `dot`s' flops, for several tokens B m n (T / c + k) with c directions at a time. A
        factored weight with "kronecker": B T (m + n) k.
        Memory: a few directions, at least one, of one leaf at a time; never k times the parameters.

        References: Johnson and Lindenstrauss 1984; Achlioptas 2003, theorem 1.1 (signs); Park et
          al. 2023, "TRAK", section 3.2 (sketches of per-example gradients).

        >>> import jax, jax.numpy as jnp
        >>> from jaxunlearn import kernels
        >>> grads = kernels.per_example(lambda w, x: jnp.mean(x * w))(0.0, jnp.array([3.0, 4.0]))
        >>> sketch = grads.project(jax.random.key(0), 4)
        >>> jnp.sum(sketch**2, axis=1)  # a scalar parameter: every sign squared is one
        Array([ 9., 16.], dtype=float32)
        """
        projection.check(key, num_directions, distribution, structure)
        return projection.project(self, key, num_directions, distribution, structure)

    def by_unit(
        self,
        units_of_rows: Int[Array, " b"],
        *,
        num_units: int,
        max_rows_per_unit: int | None = None,
    ) -> "PerExampleGradients":
        """The gradients of units, each the sum of its rows' gradients: h_u = sum_{i in u} g_i.

        What comes back is of num_units rows, so that `by_unit(users, num_units=n).clipped_sum(C)`
        clips per user. The tokens of a unit's rows stand side by side: norms have rounding bounds
        as they have for tokens, however much the rows of a unit cancel.

        Args:
          units_of_rows: in 0..num_units-1, or -1 for a row of no unit.
          num_units: static. A unit without rows has gradient zero.
          max_rows_per_unit: static; None: the power of two that bounds the counts, or B in a trace.
            A traced unit with more rows is not finite: it contributes zero and is counted.

        Returns:
          `losses` are sums over the unit's rows; `is_finite` and `num_non_finite` speak of units. A
          row that is not finite contributes zero to its unit. `aux` is dropped.

        Cost: factors of num_units * max_rows_per_unit rows; (num_units, *shape) for a leaf whose
        factors would be larger. A leaf of another form is materialised, (B, *shape).

        Raises:
          ValueError: a unit outside -1..num_units-1, or with too many rows (where not traced).

        >>> import jax.numpy as jnp
        >>> from jaxunlearn import kernels
        >>> x = jnp.array([3.0, 4.0, 5.0])
        >>> grads = kernels.per_example(lambda w, x: jnp.mean(x * w))(0.0, x)
        >>> grads.by_unit(jnp.array([0, 0, 2]), num_units=3).norms()
        Array([7., 0., 5.], dtype=float32)
        """
        index = units.check(units_of_rows, self.losses.shape[0], num_units, max_rows_per_unit)
        return units.merge(self, jnp.asarray(units_of_rows), num_units, index)

    def materialize(self) -> PyTree:
        """The gradients, every leaf (B, *shape).

        Cost: the flops of the weight gradients of one batch; memory B times that of the parameters.
        """
        return _operations.materialize(self)

    def explain(self) -> Explanation:
        """Which leaf took which path, and why. Static: it also works on traced gradients.

        Cost: nothing on the device.
        """
        return Explanation(self.paths)


def _shapes(grads: PerExampleGradients):
    """What two batches must share for their gradients to be compared."""
    return grads.treedef, [path.shape for path in grads.paths]


def _dtype(dtype):
    """A dtype that can be the key of a compilation cache, or None."""
    return None if dtype is None else jnp.dtype(dtype)
