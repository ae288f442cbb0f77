"""Solvers on eight devices, under jit and inside shard_map, against the same on one."""

import json

import pytest

from tests.kernels.test_devices import output_of, start

ROUNDS = 1e-5  # float32, a few iterations with their sums in another order


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["automatic", "explicit", "manual"])
def test_every_solver_gives_what_it_gives_on_one_device(mesh):
    found = json.loads(output_of(start("_sharded_solves.py", mesh, devices=8)))
    assert len(found) == (13 if mesh == "manual" else 15)
    # Vectors of near eigenvalues turn into one another; what is made of them must not move.
    gaps = {name: f["gap"] for name, f in found.items() if name != "nystrom vectors"}
    assert not {name: gap for name, gap in gaps.items() if not gap < ROUNDS}
    for name, figures in found.items():
        # The partitioner may place what came out of a dense matrix as it likes.
        free = mesh == "automatic" and name == "cholesky"
        sharded = mesh != "manual" and not free
        assert free or all(("fsdp" in spec) == sharded for spec in figures["specs"]), name
