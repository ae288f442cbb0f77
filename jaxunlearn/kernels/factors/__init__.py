"""Per-example gradients of one parameter, kept as the factors they are made of.

Every class here is a registered pytree with the same twelve members; a new kind of leaf is a new
class with these and a rule in `_rules` that builds it.

    size           (B,)  an upper bound on each norm, finite exactly where the row is usable
    part(start, count)   the same of some rows
    kept(mask)           the same, with zeros in the rows where `mask` is false
    floor                a bound on what underflow takes from a norm, or adds to one of g_i's sum
    limits         (B,)  the same of w_i g_i where w_i is not one, and the largest such w_i
    norms()        (B,), (B,)  each norm, and an upper bound on what it is in exact arithmetic
    sum(weights)         sum_i w_i g_i, shaped like the parameter
    dot(vector)    (B,)  <g_i, vector>
    row(i)               g_i, shaped like the parameter
    gram(other)    (B, C)  <g_i, h_j> with another batch's gradients of the same parameter; or own
    materialize()  (B, *shape)
    floats               numbers kept per example
"""

from jaxunlearn.kernels.factors._conv import Conv, Geometry
from jaxunlearn.kernels.factors._dense import Dense, Placed, Product, Shared
from jaxunlearn.kernels.factors._lookup import Lookup
from jaxunlearn.kernels.factors._masked import cleaned
from jaxunlearn.kernels.factors._outer import Outer, gram_is_cheaper, gram_is_tight
from jaxunlearn.kernels.factors._protocol import (
    LOOSE,
    Factor,
    Plan,
    Steps,
    built,
    gram_by_rows,
    pack,
    unpack,
)
from jaxunlearn.kernels.factors._sum import Sum, multiplied, product_slack

__all__ = [
    "LOOSE",
    "Conv",
    "Dense",
    "Factor",
    "Geometry",
    "Lookup",
    "Outer",
    "Placed",
    "Plan",
    "Product",
    "Shared",
    "Steps",
    "Sum",
    "built",
    "cleaned",
    "gram_by_rows",
    "gram_is_cheaper",
    "gram_is_tight",
    "multiplied",
    "pack",
    "product_slack",
    "unpack",
]
