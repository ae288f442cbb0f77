"""From the equation that made a gradient to the factors it can be kept as."""

from jaxunlearn.kernels._rules._plan import Explanation, LeafPath, factored

__all__ = ["Explanation", "LeafPath", "factored"]
