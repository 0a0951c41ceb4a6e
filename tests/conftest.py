"""What every test shares: one thread, no screen, fixed seeds."""

import os

# Before anything imports torch or pygame, and inherited by worker processes. One thread, because the order in which
# several add up changes the last bits; torch itself is imported only by the tests that need it.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    CUBLAS_WORKSPACE_CONFIG=":4096:8",
    PYGAME_HIDE_SUPPORT_PROMPT="1",
    SDL_AUDIODRIVER="dummy",
    SDL_VIDEODRIVER="dummy",
)

import random
import sys

import hypothesis
import pytest

hypothesis.settings.register_profile(
    "default",
    database=None,
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("default")

SLOW_TIMEOUT = 1800  # seconds, for a slow test that doesn't name its own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same global generators, whatever ran before it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
