"""Claim: `import jaxunlearn` adds at most 0.1 s to `import jax, optax`.

python benchmarks/claims/import_is_light.py    exits 1 where this does not hold.
"""

import os
import statistics
import subprocess
import sys

MAX_SECONDS, REPEATS = 0.1, 9
# JAX's own import leaves a full garbage collection due; it is run before, not billed to the next.
PROGRAM = """
import gc, time
import jax, optax
gc.collect()
begun = time.perf_counter()
import jaxunlearn
print(time.perf_counter() - begun)
"""


def main() -> int:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    run = lambda: float(subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment))
    run()
    seconds = [run() for _ in range(REPEATS)]
    median = statistics.median(seconds)
    print(f"median {median:.3f} s of {REPEATS} runs, {min(seconds):.3f} to {max(seconds):.3f}")
    return 0 if median <= MAX_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
