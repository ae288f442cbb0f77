"""The rule for convolutions, as vmap batches their weight gradients: with groups for examples."""

from jaxunlearn.kernels._jaxpr import Node, derive
from jaxunlearn.kernels._rules._trail import Form, Trail, rule
from jaxunlearn.kernels._stable import size_of
from jaxunlearn.kernels.factors import Conv, Geometry


@rule("conv_general_dilated")
def _conv_general_dilated(node: Node, trail: Trail):
    """A convolution of an input with a cotangent, whose few positions are the taps of a kernel.

    The groups are examples times the groups of the weight. What it sums over is, in the weight's
    words, the positions of the cotangent (its window) and the images (its input features).
    """
    params, numbers = node.params, node.params["dimension_numbers"]
    left, right = node.operands
    if trail.batch_axis != numbers.out_spec[1] or len(numbers.out_spec) < 3:
        return None
    held = 1 if trail.held is None else trail.held
    num_examples = node.shape[trail.batch_axis] // held
    groups = max(params["feature_group_count"], params["batch_group_count"])
    if not (left.varies and right.varies) or groups % num_examples:
        return None
    num_groups, by_batch = groups // num_examples, params["batch_group_count"] > 1
    geometry = Geometry(
        taps=tuple(node.shape[axis] for axis in numbers.out_spec[2:]),
        stride=tuple(params["rhs_dilation"]),
        tap_stride=tuple(params["window_strides"]),
        dilation=tuple(params["lhs_dilation"]),
        before=tuple(int(low) for low, _ in params["padding"]),
    )
    images = _images(left, numbers.lhs_spec, (num_examples, num_groups), by_batch)
    out_features, in_features, *window = numbers.rhs_spec
    cotangents = _split(right, (out_features, in_features, *window), (num_examples, num_groups))
    m, n = images.shape[-1], cotangents.shape[-1]
    # (*taps, G, m, n), to the layout of the equation without examples, to the trail's start.
    before = (*geometry.taps, num_groups, m, n)
    flat = (*geometry.taps, m, num_groups * n)
    num_spatial = len(geometry.taps)
    order = (*range(num_spatial), num_spatial + 1, num_spatial, num_spatial + 2)
    steps: tuple = (("transpose", order, ()),) if num_groups > 1 and m > 1 else ()
    if num_groups > 1 and m > 1:
        steps += (("reshape", tuple(before[axis] for axis in order), flat),)
    else:
        steps += (("reshape", before, flat),)
    batch_axis, feature_axis, *spatial = numbers.out_spec
    places = {axis: k for k, axis in enumerate((*spatial, batch_axis, feature_axis))}
    turn = tuple(places[axis] for axis in range(len(places)))
    if turn != tuple(range(len(turn))):
        steps += (("transpose", turn, ()),)
    if trail.held is None:  # the feature axis is gone from the trail
        there = tuple(flat[axis] for axis in turn)
        rest = tuple(size for axis, size in enumerate(there) if axis != feature_axis)
        steps += (("reshape", there, rest),)
    return Form(Conv, (images, trail.scaled(cotangents)), (geometry, (*steps, *trail.steps)))


def _images(left: Node, spec, counts: tuple[int, int], by_batch: bool) -> Node:
    """The input, (B, N, *spatial, G, m)."""
    batch, feature, *spatial = spec
    if by_batch:
        return _split(left, (batch, feature, *spatial), counts)
    num_examples, num_groups = counts
    moved = derive(lambda x: x.transpose(feature, *spatial, batch), left)
    lengths = (num_examples, num_groups, moved.shape[0] // size_of(counts), *moved.shape[1:])
    last = len(lengths) - 1
    order = (0, 2, *range(3, last), 1, last)
    return derive(lambda x: x.reshape(lengths).transpose(order), moved)


def _split(node: Node, axes: tuple[int, ...], counts: tuple[int, int]) -> Node:
    """(B, N, *spatial, G, rest) of an operand whose `axes` are (B G rest, N, *spatial)."""
    moved = derive(lambda x: x.transpose(axes), node)
    lengths = (*counts, moved.shape[0] // size_of(counts), *moved.shape[1:])
    order = (0, 3, *range(4, len(lengths)), 1, 2)
    return derive(lambda x: x.reshape(lengths).transpose(order), moved)
