"""What the whole suite shares: reproducible hypothesis draws, double precision, real data."""

import os
import pathlib

import hypothesis
import jax
import pytest

# Derandomised, so that a red run is red again; no deadline, since a first example compiles. The
# fixtures here do not depend on the example, so sharing one between examples is no danger.
hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    max_examples=25,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("suite")


@pytest.fixture
def x64():
    """The test runs in double precision."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def data_root() -> pathlib.Path:
    """The folder that JAXUNLEARN_DATA names; the test is skipped without one."""
    root = os.environ.get("JAXUNLEARN_DATA")
    if not root:
        pytest.skip("needs JAXUNLEARN_DATA, the folder with the data sets")
    if not pathlib.Path(root).is_dir():
        pytest.skip(f"JAXUNLEARN_DATA={root} is not a folder")
    return pathlib.Path(root)


@pytest.fixture(scope="module", autouse=True)
def programs_are_let_go():
    """Thousands of compiled programs in one process exhaust its memory maps, and it crashes."""
    yield
    jax.clear_caches()
