"""PyTorch and its libraries on the same models: Opacus, BackPACK, torch.func, curvlinops.

Each builder takes a `Twin` and returns a function without arguments whose result is a list of
tensors in the order of `parameters()`. Sums are sums of clipped gradients, not means.
"""

import dataclasses
import functools
import os
import warnings
from typing import Any

import jax
import numpy as np
from _harness import seconds

from _kernels.models import images_to_torch, to_torch
from _kernels.peers_jax import bound


@dataclasses.dataclass
class Twin:
    """A module with our parameters, and our batch."""

    module: Any
    images: Any
    labels: Any
    clip: float

    @property
    def parameters(self):
        """In the order of our parameters."""
        return list(self.module.parameters())


@functools.cache
def _torch():
    """PyTorch, on the threads that JAX uses."""
    if jax.default_backend() != "cpu":
        raise ImportError("PyTorch peers run on the CPU only", name="torch on this device")
    import torch

    # Hooks on inputs that need no gradient, and the like: nothing that changes a result.
    warnings.filterwarnings("ignore", module="torch|opacus|backpack|curvlinops")
    warnings.filterwarnings("ignore", message="Full backward hook")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch


def twin(model, params, batch, clip) -> Twin:
    """The same function of the same numbers. A new module each: Opacus and BackPACK leave hooks."""
    torch = _torch()
    module = model.torch_module(torch)
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), to_torch(params), strict=True):
            parameter.copy_(torch.tensor(np.ascontiguousarray(value)))
    images = torch.tensor(images_to_torch(batch[0]))
    return Twin(module, images, torch.tensor(np.asarray(batch[1]).astype(np.int64)), clip)


def numpy_of(result) -> list[np.ndarray]:
    """Tensors as arrays; (P, k) columns and the like stay as they are."""
    return [tensor.detach().numpy() for tensor in result]


def plain_gradient(t: Twin):
    """Forward, backward, mean."""
    torch = _torch()

    def run():
        t.module.zero_grad()
        torch.nn.functional.cross_entropy(t.module(t.images), t.labels).backward()
        return [p.grad for p in t.parameters]

    return run


def _scaled_sums(gradients, clip):
    """Clip and sum materialised gradients (B, *shape) as Opacus does."""
    torch = _torch()
    squares = torch.stack([g.reshape(len(g), -1).norm(2, dim=-1) for g in gradients], dim=1)
    factor = (clip / (squares.norm(2, dim=1) + 1e-6)).clamp(max=1.0)
    return [torch.einsum("i,i...", factor, g) for g in gradients]


def opacus_hooks(t: Twin, *, mode="hooks"):
    """Opacus' GradSampleModule, by hooks or by functorch, then its clip and sum."""
    torch = _torch()
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(t.module, loss_reduction="sum", force_functorch=mode == "functorch")

    def run():
        wrapped.zero_grad()
        torch.nn.functional.cross_entropy(wrapped(t.images), t.labels, reduction="sum").backward()
        sums = _scaled_sums([p.grad_sample for p in t.parameters], t.clip)
        for p in t.parameters:
            p.grad_sample = None
        return sums

    return run


def _ghost(t: Twin):
    """Opacus' module, optimizer and loss for ghost clipping."""
    torch = _torch()
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        t.module, max_grad_norm=t.clip, use_ghost_clipping=True, loss_reduction="sum"
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=0.1),
        noise_multiplier=0.0, max_grad_norm=t.clip, expected_batch_size=len(t.labels),
        loss_reduction="sum",
    )  # fmt: skip
    criterion = torch.nn.CrossEntropyLoss(reduction="sum")
    return wrapped, DPLossFastGradientClipping(wrapped, optimizer, criterion, loss_reduction="sum")


def opacus_ghost(t: Twin):
    """Norms from activations and cotangents, then a second weighted backward."""
    wrapped, loss = _ghost(t)

    def run():
        wrapped.zero_grad()
        loss(wrapped(t.images), t.labels).backward()
        return [p.grad for p in t.parameters]

    return run


def opacus_ghost_norms(t: Twin):
    """The first of the two passes."""
    torch = _torch()
    wrapped, _ = _ghost(t)

    def run():
        wrapped.zero_grad()
        torch.nn.functional.cross_entropy(wrapped(t.images), t.labels, reduction="sum").backward()
        return [wrapped.get_norm_sample()]

    return run


def _backpack(t: Twin):
    """BackPACK's extended module and loss; it knows modules in sequence only."""
    torch = _torch()
    import backpack

    if not isinstance(t.module, torch.nn.Sequential):
        raise NotImplementedError("BackPACK takes sequences of known layers")
    module = backpack.extend(t.module)
    return backpack, module, backpack.extend(torch.nn.CrossEntropyLoss(reduction="sum"))


def backpack_norms(t: Twin):
    """BackPACK's BatchL2Grad."""
    torch = _torch()
    backpack, module, loss = _backpack(t)
    extension = backpack.extensions.BatchL2Grad()

    def run():
        module.zero_grad()
        with backpack.backpack(extension):
            loss(module(t.images), t.labels).backward()
        return [torch.stack([p.batch_l2 for p in t.parameters]).sum(0).sqrt()]

    return run


def backpack_clip(t: Twin):
    """BatchL2Grad, then a second backward of the weighted losses: no gradient is materialised."""
    torch = _torch()
    backpack, module, loss = _backpack(t)
    extension = backpack.extensions.BatchL2Grad()

    def run():
        module.zero_grad()
        logits = module(t.images)
        with backpack.backpack(extension):
            loss(logits, t.labels).backward(retain_graph=True)
        norms = torch.stack([p.batch_l2 for p in t.parameters]).sum(0).sqrt()
        factor = (t.clip / norms).clamp(max=1.0)
        losses = torch.nn.functional.cross_entropy(logits, t.labels, reduction="none")
        return torch.autograd.grad(factor @ losses, t.parameters)

    return run


def _functional(t: Twin):
    """(parameters, images, labels) -> mean loss, and the parameters, detached, as a tuple."""
    torch = _torch()
    names = [name for name, _ in t.module.named_parameters()]
    values = tuple(p.detach() for p in t.parameters)

    def loss(parameters, images, labels):
        by_name = dict(zip(names, parameters, strict=True))
        logits = torch.func.functional_call(t.module, by_name, (images,))
        return torch.nn.functional.cross_entropy(logits, labels)

    return loss, values


def torch_func_clip(t: Twin):
    """vmap(grad) of torch.func, then Opacus' clip and sum."""
    torch = _torch()
    loss, values = _functional(t)

    def row_loss(parameters, image, label):
        return loss(parameters, image[None], label[None])

    gradients = torch.func.vmap(torch.func.grad(row_loss), in_dims=(None, 0, 0))
    return lambda: _scaled_sums(gradients(values, t.images, t.labels), t.clip)


def tensors(arrays) -> list[Any]:
    """NumPy arrays as tensors."""
    torch = _torch()
    return [torch.tensor(np.ascontiguousarray(array)) for array in arrays]


# Products: `vectors` is a list of tensors with a leading axis.


def torch_func_products(t: Twin, vectors, *, chunk_size=None):
    """vmap(jvp(grad)), forward over reverse."""
    torch = _torch()
    loss, values = _functional(t)
    gradient = torch.func.grad(lambda parameters: loss(parameters, t.images, t.labels))

    def product(*vector):
        return torch.func.jvp(gradient, (values,), (vector,))[1]

    if len(vectors[0]) == 1:
        return lambda: [h[None] for h in product(*(v[0] for v in vectors))]
    return lambda: torch.func.vmap(product, chunk_size=chunk_size)(*vectors)


def best_torch_func_products(t: Twin, vectors):
    """The same, all at once or eight at a time, whichever is faster here."""
    if len(vectors[0]) == 1:
        return torch_func_products(t, vectors)
    ways = {size: torch_func_products(t, vectors, chunk_size=size) for size in (None, 8)}
    times = {size: seconds(way) for size, way in ways.items()}
    best = min(times, key=times.__getitem__)
    return bound(ways[best], setting=f"chunks of {best or len(vectors[0])}")


def double_backward_products(t: Twin, vectors):
    """One graph of the gradient, and a backward through it for every vector."""
    torch = _torch()
    count = len(vectors[0])

    def run():
        loss = torch.nn.functional.cross_entropy(t.module(t.images), t.labels)
        gradient = torch.autograd.grad(loss, t.parameters, create_graph=True)
        rows = [
            torch.autograd.grad(
                gradient, t.parameters, [v[k] for v in vectors], retain_graph=k + 1 < count
            )
            for k in range(count)
        ]
        return [torch.stack(leaf) for leaf in zip(*rows, strict=True)]

    return run


def curvlinops_products(t: Twin, vectors):
    """curvlinops' HessianLinearOperator on a matrix in list format."""
    torch = _torch()
    from curvlinops import HessianLinearOperator

    parameters = [p for p in t.parameters if p.requires_grad]
    operator = HessianLinearOperator(
        t.module, torch.nn.CrossEntropyLoss(), parameters, [(t.images, t.labels)],
        check_deterministic=False,
    )  # fmt: skip
    columns = [v.movedim(0, -1).contiguous() for v in vectors]
    return lambda: [h.movedim(-1, 0) for h in operator @ columns]
