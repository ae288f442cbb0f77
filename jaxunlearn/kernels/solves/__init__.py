"""Linear solvers: (matvec, rhs) -> `Solution`, which says how far from solved it is."""

from jaxunlearn.kernels.solves.block import block_cg
from jaxunlearn.kernels.solves.common import Solution, Solver
from jaxunlearn.kernels.solves.direct import cholesky, refined, woodbury
from jaxunlearn.kernels.solves.krylov import cg
from jaxunlearn.kernels.solves.minres import minres
from jaxunlearn.kernels.solves.nystrom import NystromApproximation, jacobi, nystrom
from jaxunlearn.kernels.solves.series import lissa, neumann, spectral_radius

__all__ = [
    "NystromApproximation",
    "Solution",
    "Solver",
    "block_cg",
    "cg",
    "cholesky",
    "jacobi",
    "lissa",
    "minres",
    "neumann",
    "nystrom",
    "refined",
    "spectral_radius",
    "woodbury",
]
