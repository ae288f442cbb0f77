"""Per-example gradients and Hessian products: a model at one batch size, everybody's way."""

import jax
import numpy as np
from _harness import flops, matmul_flops_per_second

from _kernels import bars, ours, peers_jax, peers_torch
from _kernels.cells import Candidate, Cell, measure, one
from _kernels.models import Model, stack_to_torch, to_torch
from jaxunlearn import kernels

SAMPLE_SECONDS = 0.004


# Per-example gradients.


def per_example(model: Model, size: int, *, peers: bool, **options) -> Cell:
    """Clipped sums and norms, everybody's."""
    params, batch = model.params(), model.batch(size)
    norms = np.asarray(jax.jit(peers_jax.vmap_norms(model.loss_fn))(params, batch))
    clip = float(np.median(norms))
    cell = Cell("per_example", model.name, size, bars.PLAIN)
    cell.facts = {"num_params": model.num_params, "l2_clip_norm": clip}
    cell.facts["explain"] = str(kernels.per_example(model.loss_fn)(params, batch).explain())
    references = {
        "gradient": to_torch(jax.jit(jax.grad(model.loss_fn))(params, batch)),
        bars.CLIP: to_torch(jax.jit(peers_jax.vmap_clip_sum(model.loss_fn, clip))(params, batch)),
        bars.NORMS: [norms],
    }
    candidates = _per_example_jax(model, params, batch, clip)
    candidates += _per_example_peers(model, params, batch, clip) if peers else []
    cell.facts |= _flops(model, params, batch)
    return measure(cell, candidates, references, sample_seconds=SAMPLE_SECONDS, **options)


def _flops(model: Model, params, batch) -> dict:
    """The floor under the floor: the plain gradient's flops at the rate of a matrix product."""
    counted = flops(jax.grad(model.loss_fn), params, batch)
    if counted is None:
        return {}
    rate = matmul_flops_per_second()
    return {"plain_flops": counted, "plain_flops_seconds": counted / rate, "matmul_flops": rate}


def _per_example_jax(model: Model, params, batch, clip) -> list[Candidate]:
    """The floor, ours, and what needs nothing but JAX and Optax."""
    loss_fn = model.loss_fn

    def jitted(name, kernel, function, arrays=to_torch, ours=False):
        build = lambda: peers_jax.bound(jax.jit(function), params, batch)
        return Candidate(name, kernel, build, arrays, ours=ours)

    return [
        jitted(bars.PLAIN, "gradient", jax.grad(loss_fn)),
        jitted("jaxunlearn", bars.CLIP, ours.clipped_sum(loss_fn, clip), ours=True),
        jitted("jaxunlearn norms", bars.NORMS, ours.norms(loss_fn), one, ours=True),
        jitted("vmap(grad)", bars.CLIP, peers_jax.vmap_clip_sum(loss_fn, clip)),
        jitted("vmap(grad) norms", bars.NORMS, peers_jax.vmap_norms(loss_fn), one),
        jitted("Optax", bars.CLIP, peers_jax.optax_clip_sum(loss_fn, clip)),
    ]


def _per_example_peers(model: Model, params, batch, clip) -> list[Candidate]:
    """What has to be installed."""
    best = lambda: peers_jax.best_jax_privacy(model.loss_fn, clip, params, batch)

    def in_torch(name, kernel, build, **options):
        make = lambda: build(peers_torch.twin(model, params, batch, clip), **options)
        return Candidate(name, kernel, make, peers_torch.numpy_of, "torch")

    return [
        Candidate("jax_privacy", bars.CLIP, best, to_torch),
        in_torch("torch gradient", "gradient", peers_torch.plain_gradient),
        in_torch("Opacus hooks", bars.CLIP, peers_torch.opacus_hooks),
        in_torch("Opacus functorch", bars.CLIP, peers_torch.opacus_hooks, mode="functorch"),
        in_torch("Opacus ghost", bars.CLIP, peers_torch.opacus_ghost),
        in_torch("Opacus ghost norms", bars.NORMS, peers_torch.opacus_ghost_norms),
        in_torch("BackPACK", bars.CLIP, peers_torch.backpack_clip),
        in_torch("BackPACK norms", bars.NORMS, peers_torch.backpack_norms),
        in_torch("torch.func", bars.CLIP, peers_torch.torch_func_clip),
    ]


# Hessian products.


def products(model: Model, size: int, *, peers: bool, **options) -> Cell:
    """One product and 64, everybody's."""
    params, batch = model.params(), model.batch(size)
    cell = Cell("products", model.name, size, bars.PLAIN)
    cell.facts = {"num_params": model.num_params} | _flops(model, params, batch)
    keys = iter(jax.random.split(jax.random.key(3), 2 * len(model.shapes)))
    vectors = jax.tree.map(
        lambda p: jax.random.normal(next(keys), (bars.NUM_TANGENTS, *p.shape)), params
    )
    stacks = {bars.HVP: jax.tree.map(lambda v: v[:1], vectors), bars.MANY: vectors}
    slow = jax.jit(peers_jax.mapped_products(model.loss_fn))
    references = {name: stack_to_torch(slow(params, batch, v)) for name, v in stacks.items()}
    references["gradient"] = to_torch(jax.jit(jax.grad(model.loss_fn))(params, batch))
    plain = lambda: peers_jax.bound(jax.jit(jax.grad(model.loss_fn)), params, batch)
    candidates = [Candidate(bars.PLAIN, "gradient", plain, to_torch)]
    for kernel, stack in stacks.items():
        candidates += _products_jax(model, params, batch, kernel, stack)
        candidates += _products_torch(model, params, batch, kernel, stack) if peers else []
    return measure(cell, candidates, references, sample_seconds=SAMPLE_SECONDS, **options)


def _products_jax(model: Model, params, batch, kernel, stack) -> list[Candidate]:
    """Ours, and the forms that JAX users write."""
    loss_fn = model.loss_fn
    single = kernel == bars.HVP
    suffix = ", 1" if single else ""

    def jitted(name, function, ours=False):
        build = lambda: peers_jax.bound(jax.jit(function), params, batch, stack)
        return Candidate(name + suffix, kernel, build, stack_to_torch, ours=ours)

    mine = ours.product(loss_fn) if single else ours.products(loss_fn)
    found = [jitted("jaxunlearn", mine, ours=True)]
    found.append(jitted("vmap(jvp(grad))", peers_jax.vmapped_products(loss_fn)))
    if not single:
        found.append(jitted("lax.map(jvp(grad))", peers_jax.mapped_products(loss_fn)))
    found.append(jitted("vmap(grad of dot)", peers_jax.reverse_products(loss_fn)))
    return found


def _products_torch(model: Model, params, batch, kernel, stack) -> list[Candidate]:
    """torch.func, double backward, curvlinops."""
    suffix = ", 1" if kernel == bars.HVP else ""

    def in_torch(name, build):
        def make():
            twin = peers_torch.twin(model, params, batch, clip=1.0)
            return build(twin, peers_torch.tensors(stack_to_torch(stack)))

        return Candidate(name + suffix, kernel, make, peers_torch.numpy_of, "torch")

    found = [
        in_torch("torch.func", peers_torch.best_torch_func_products),
        in_torch("torch double backward", peers_torch.double_backward_products),
        in_torch("curvlinops", peers_torch.curvlinops_products),
    ]
    if kernel == bars.MANY:
        plain = lambda: peers_torch.plain_gradient(peers_torch.twin(model, params, batch, 1.0))
        numpy_of = peers_torch.numpy_of
        found.append(Candidate("torch gradient", "gradient", plain, numpy_of, "torch"))
    return found
