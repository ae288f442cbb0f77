"""Weights that convolve: one product for every tap of the kernel."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxunlearn.kernels import _stable
from jaxunlearn.kernels._meshes import local_params
from jaxunlearn.kernels._stable import Limits, contract, size_of, unit_roundoff, widened
from jaxunlearn.kernels.factors._protocol import (
    Factor,
    Plan,
    Steps,
    built,
    gram_by_rows,
    pack,
    take_rows,
    tightened,
    unpack,
    weighted,
)

_ELEMENTWISE = 12
"""A product of at most this many numbers per group is no job for a matmul."""

_MAX_WIDTH = 8

_WIDE = 64
"""Channels that fill a matmul of their own."""

_SMALL = 1 << 19
"""What meets the taps goes through a loop from this many numbers on: for memory, at no cost in time
there; a batch of 16 took 1.1 times as long in the loop."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Where a tap k meets position p of the output: at input k tap_stride + p stride - before.

    taps, stride, tap_stride, before: one entry per spatial dimension.  dilation: of the input,
    whose entries are then that far apart with zeros between.
    """

    taps: tuple[int, ...]
    stride: tuple[int, ...]
    tap_stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]

    def padding(self, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> list[tuple[int, int]]:
        """(before, after) that make the windows fit exactly; negative where they crop."""
        sizes = ((n - 1) * d + 1 for n, d in zip(inputs, self.dilation))
        spans = (
            (p - 1) * s + (k - 1) * t + 1
            for p, s, k, t in zip(outputs, self.stride, self.taps, self.tap_stride)
        )
        return [(b, span - n - b) for b, span, n in zip(self.before, spans, sizes)]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["left", "right", "size", "limits"],
    meta_fields=["geometry", "steps"],
)
@dataclasses.dataclass(frozen=True)
class Conv:
    """g_i[k, g] = sum_{n, p} left_i[n, k t + p s - b, g] right_i[n, p, g]^T, moved along `steps`.

    left: (B, N, *inputs, G, m).  right: (B, N, *outputs, G, n).  N counts images that one example
    has (usually 1), G the groups.  The product is (*taps, G, m, n).
    """

    left: Float[Array, "b i *inputs g m"]
    right: Float[Array, "b i *outputs g n"]
    size: Float[Array, " b"]
    geometry: Geometry
    steps: Steps
    limits: Limits

    token_axis = 1

    @classmethod
    def of(cls, left: Array, right: Array, geometry: Geometry, steps: Steps) -> "Conv":
        """Computes `size` = |left| |right| sqrt(number of taps), by Cauchy and Schwarz."""
        return built([cls.plan(left, right, geometry, steps)])[0]

    @classmethod
    def plan(cls, left: Array, right: Array, geometry: Geometry, steps: Steps) -> Plan:
        """`of`, as a plan."""
        (first, e), (second, f) = yield [x.reshape(x.shape[0], -1) for x in (left, right)]
        product = first * second * size_of(geometry.taps) ** 0.5
        size = _stable.scale_by(product, e + f)
        sides = [((first, e), left), ((second, f), right)]
        (own, flushed), (other, _) = sides if _smaller(left, right) else sides[::-1]
        count = size_of(flushed.shape[1:]) * size_of(geometry.taps)
        limits = Limits.of(own, other, count, size.dtype)
        return cls(left, right, size, geometry, steps, limits)

    @property
    def floor(self) -> float:
        taken = _stable.underflow(self.product_floats, self.size.dtype)
        return (2 * self.num_tokens + 1) * taken

    @property
    def floats(self) -> int:
        return size_of(self.left.shape[1:]) + size_of(self.right.shape[1:])

    @property
    def num_tokens(self) -> int:
        """Positions that are summed over, those of all images of an example."""
        return size_of(self.right.shape[1:-2])

    @property
    def product_floats(self) -> int:
        """Numbers in the product."""
        return size_of(self.geometry.taps) * size_of(self.left.shape[-2:]) * self.right.shape[-1]

    @property
    def gram_is_cheaper(self) -> bool:
        """Whether Grams of the positions beat the product, in flops; it serves the norms alone."""
        m, n = size_of(self.geometry.taps) * self.left.shape[-1], self.right.shape[-1]
        return self.num_tokens * (m + n) < m * n

    def scaled(self, exponents: Array) -> "Conv":
        """Times 2^e: (B,) exponents."""
        left, right, top = _balanced(self.left, self.right)
        right = _scaled(right, top + exponents)
        size = _stable.scale_by(self.size, exponents)
        return dataclasses.replace(self, left=left, right=right, size=size)

    def part(self, start: Array, count: int) -> "Conv":
        return take_rows(self, start, count)

    def kept(self, mask: Array) -> "Conv":
        left, right, size = (
            _stable.rows_where(mask, x) for x in (self.left, self.right, self.size)
        )
        return dataclasses.replace(self, left=left, right=right, size=size)

    def norms(self) -> tuple[Array, Array]:
        left, right, top = _balanced(self.left, self.right)
        # As large as `size`, with the exponent taken out.
        scale = size_of(self.geometry.taps) ** 0.5
        unit = dataclasses.replace(
            self, left=left, right=right, size=jnp.full(top.shape, scale, left.dtype)
        )
        norms, upper = unit._unit_norms()
        return _stable.scale_by(norms, top), _stable.scale_by(upper, top)

    def _unit_norms(self) -> tuple[Array, Array]:
        """Norms of factors whose norms do not exceed one."""
        if not self.gram_is_cheaper:
            return self._direct_norms()
        return tightened(*self._gram_norms(), self._direct_norms)

    def _direct_norms(self) -> tuple[Array, Array]:
        """Norms from the product, a few taps at a time."""
        right, roundoff = self._flat_right, unit_roundoff(self.size.dtype)

        def squares(part):
            product = _product(part, right)
            return _stable.sum_squares(product.reshape(product.shape[0], -1))

        total = self._over_taps(squares)
        # The parts' own sums are shorter than one of all numbers; so is the one of the parts.
        depth = _stable.relative_bound(self.product_floats, self.size.dtype)
        depth = 1 + depth + size_of(self.geometry.taps) * roundoff
        upper = jnp.sqrt(total) * depth
        return jnp.sqrt(total), upper + 2 * (self.num_tokens + _stable.SLACK) * roundoff * self.size

    def _gram_norms(self) -> tuple[Array, Array]:
        """sum_pq (patch_p . patch_q)(right_p . right_q), and an upper bound on the norm."""
        right = self._flat_right
        lefts, rights = self._over_taps(_grams), _grams(right)
        partial = lax.optimization_barrier(jnp.sum(lefts * rights, axis=-1))
        square = jnp.maximum(jnp.sum(partial, axis=(1, 2)), 0)
        taps, roundoff = size_of(self.geometry.taps), unit_roundoff(square.dtype)
        roundings = taps + self.left.shape[-1] + right.shape[-1] + 2 * self.num_tokens
        roundings += self.left.shape[-2] + _stable.SLACK
        # sum_p |patch_p| |right_p| <= |patches| |right| <= sqrt(taps), which is `size`.
        upper = jnp.sqrt(square + roundings * roundoff * 1.01 * self.size**2)
        upper = upper + (self.num_tokens + _stable.SLACK) * roundoff * self.size
        return jnp.sqrt(square), upper

    @property
    def _flat_right(self) -> Array:
        """(B, P, G, n), with the images' positions one after the other."""
        shape = self.right.shape
        return self.right.reshape(shape[0], self.num_tokens, *shape[-2:])

    @property
    def _padded(self) -> Array:
        """The left factor with the zeros around and between that the windows meet."""
        padding = self.geometry.padding(self.left.shape[2:-2], self.right.shape[2:-2])
        config = [(0, 0, 0)] * 2
        config += [(lo, hi, d - 1) for (lo, hi), d in zip(padding, self.geometry.dilation)]
        return lax.pad(self.left, jnp.zeros((), self.left.dtype), config + [(0, 0, 0)] * 2)

    def _met(self, start: Sequence[Array | int]) -> Array:
        """What `_width` taps of the last dimension from one on meet, (B, P, G, width m).

        Their matmul is one; the input is repeated as often.
        """
        geometry, outputs = self.geometry, self.right.shape[2:-2]
        ends = ((p - 1) * s + 1 for p, s in zip(outputs, geometry.stride))
        *outer, last = ends
        apart = geometry.tap_stride[-1]
        lengths = (*outer, last + (self._width - 1) * apart)
        padded = self._padded
        window = lax.dynamic_slice(
            padded, (0, 0, *start, 0, 0), (*padded.shape[:2], *lengths, *padded.shape[-2:])
        )
        strides = (1, 1, *geometry.stride, 1, 1)

        def at(k):
            starts, limits = [0] * window.ndim, list(window.shape)
            starts[-3], limits[-3] = k * apart, k * apart + last
            return lax.slice(window, starts, limits, strides)

        parts = [at(k) for k in range(self._width)]
        part = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
        return part.reshape(part.shape[0], self.num_tokens, *part.shape[-2:])

    @property
    def _starts(self) -> np.ndarray:
        """Where `_met` begins: every tap of the outer dimensions, every `_width`th of the last."""
        *outer, last = self.geometry.taps
        taps = itertools.product(range(0, last, self._width), *map(range, outer))
        starts = np.array([(*tap[1:], tap[0]) for tap in taps], np.int32)
        return starts * np.array(self.geometry.tap_stride, np.int32)

    def _over_taps(self, function: Callable[[Array], Array]) -> Array:
        """The sum of `function` over what the taps meet.

        A loop: XLA compiles it once for all taps, and has one of them in memory.
        """
        like = jax.eval_shape(lambda start: function(self._met(start)), self._starts[0])
        zeros = local_params(jnp.zeros(like.shape, like.dtype), (self.left, self.right))
        add = lambda total, start: (total + function(self._met(start)), None)
        return lax.scan(add, zeros, self._starts)[0]

    @property
    def _width(self) -> int:
        """How many taps of the last dimension share a matmul that would be narrow."""
        last = self.geometry.taps[-1]
        widths = range(1, min(last, _MAX_WIDTH) + 1) if self.left.shape[-1] < _WIDE else [1]
        return max(width for width in widths if last % width == 0)

    def _products(self) -> Array:
        """The product in parts of `_width` taps each, (B, parts, G, width m, n), as `_starts`."""
        right, starts = self._flat_right, self._starts
        multiplied = lambda start: _product(self._met(start), right)
        like = jax.eval_shape(multiplied, starts[0])
        shape = (like.shape[0], len(starts), *like.shape[1:])
        zeros = local_params(jnp.zeros(shape, like.dtype), (self.left, self.right))

        def put(products, part):
            place, start = part
            return lax.dynamic_update_index_in_dim(products, multiplied(start), place, 1), None

        met = jax.eval_shape(self._met, starts[0])
        places = np.arange(len(starts), dtype=np.int32)
        return lax.scan(put, zeros, (places, starts), unroll=met.size < _SMALL)[0]

    def _unpacked(self, parts: Array) -> Array:
        """(B, *shape) from what `_products` makes of B examples."""
        *outer, last = self.geometry.taps
        (num_groups, m), n, width = self.left.shape[-2:], self.right.shape[-1], self._width
        split = (last // width, *outer, num_groups, width, m, n)
        product = parts.reshape(-1, *split)
        product = jnp.moveaxis(product, (1, -3), (len(outer) + 1, len(outer) + 2))
        return unpack(product.reshape(-1, *outer, last, num_groups, m, n), self.steps)

    def sum(self, weights: Array | None) -> Array:
        """By the weight gradient of the convolution, as backpropagation does."""
        dtype = self.size.dtype
        left, right = self.left.astype(dtype), self.right.astype(dtype)
        if weights is not None:
            smaller = _smaller(left, right)
            left = weighted(weights, left) if smaller else left
            right = right if smaller else weighted(weights, right)
        geometry, num_spatial = self.geometry, len(self.geometry.taps)
        (num_groups, m), n = left.shape[-2:], right.shape[-1]
        spatial = "".join("DHW"[-num_spatial:])
        images, outputs = (
            x.reshape(-1, *x.shape[2:-2], num_groups * x.shape[-1]) for x in (left, right)
        )

        def convolve(kernel):
            return lax.conv_general_dilated(
                images,
                kernel,
                geometry.stride,
                geometry.padding(left.shape[2:-2], right.shape[2:-2]),
                lhs_dilation=geometry.dilation,
                rhs_dilation=geometry.tap_stride,
                dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
                feature_group_count=num_groups,
                precision=lax.Precision.HIGHEST,
                preferred_element_type=dtype,
            )

        kernel = jax.ShapeDtypeStruct((*geometry.taps, m, num_groups * n), dtype)
        total = jax.linear_transpose(convolve, kernel)(outputs)[0]
        product = jnp.moveaxis(total.reshape(*geometry.taps, m, num_groups, n), -2, -3)
        return unpack(product[None], self.steps)[0]

    def dot(self, vector: Array) -> Array:
        (num_groups, m), n = self.left.shape[-2:], self.right.shape[-1]
        *outer, last = self.geometry.taps
        width, right = self._width, self._flat_right
        split = (size_of(tuple(outer)), last // width, width, num_groups, m, n)
        kernel = pack(vector, self.steps).reshape(split).transpose(1, 0, 3, 2, 4, 5)
        kernel = kernel.reshape(-1, num_groups, width * m, n)
        parts = [
            contract("bpgn,bpgn->b", _times(self._met(start), tap), right)
            for start, tap in zip(self._starts, kernel, strict=True)
        ]
        return functools.reduce(jnp.add, parts)

    def row(self, i: Array) -> Array:
        return self.part(i, 1).materialize()[0]

    def gram(self, other: Factor | None = None) -> Array:
        other = self if other is None else other
        if not isinstance(other, Conv) or other.steps != self.steps:
            return gram_by_rows(self, other)
        if other.geometry.taps != self.geometry.taps:
            return gram_by_rows(self, other)
        mine = self._products()
        others = mine if other is self else other._products()
        return contract("bk,ck->bc", *(x.reshape(x.shape[0], -1) for x in (mine, others)))

    def materialize(self) -> Array:
        return self._unpacked(self._products())


def _smaller(left: Array, right: Array) -> bool:
    """Whether weights go to the left; it is the larger that is as good as free to read."""
    return left.size < right.size


def _product(left: Array, right: Array) -> Array:
    """sum_p left_p right_p^T for every example and group."""
    dtype = widened(left, right)
    if left.shape[-1] * right.shape[-1] <= _ELEMENTWISE and left.shape[-2] > 1:
        left, right = left.astype(dtype), right.astype(dtype)
        return jnp.sum(left[..., :, None] * right[..., None, :], axis=1)
    if left.shape[-2] == 1:
        return contract("bpm,bpn->bmn", left[..., 0, :], right[..., 0, :])[:, None]
    return contract("bpgm,bpgn->bgmn", left, right)


def _grams(x: Array) -> Array:
    """x_p . x_q for every example and group, (B, G, P, P)."""
    if x.shape[-2] == 1:
        return contract("bpm,bqm->bpq", x[..., 0, :], x[..., 0, :])[:, None]
    return contract("bpgm,bqgm->bgpq", x, x)


def _times(left: Array, kernel: Array) -> Array:
    """left_p kernel for every group."""
    if left.shape[-2] == 1:
        return contract("bpm,mn->bpn", left[..., 0, :], kernel[0])[..., None, :]
    if left.shape[-1] * kernel.shape[-1] <= _ELEMENTWISE:
        dtype = widened(left, kernel)
        return jnp.sum(left.astype(dtype)[..., :, None] * kernel.astype(dtype), axis=-2)
    return contract("bpgm,gmn->bpgn", left, kernel)


def _scaled(x: Array, exponents: Array) -> Array:
    """x_i 2^e_i."""
    return _stable.scale_by(x, exponents.reshape(-1, *[1] * (x.ndim - 1)))


def _balanced(left: Array, right: Array) -> tuple[Array, Array, Array]:
    """Both factors scaled by powers of two so that neither norm exceeds one; and the exponent."""
    dtype = widened(left, right)
    left, right = left.astype(dtype), right.astype(dtype)
    (_, e), (_, f) = _stable.all_norm_parts([x.reshape(x.shape[0], -1) for x in (left, right)])
    return _scaled(left, -e), _scaled(right, -f), e + f
