"""Fixtures and marks shared by all test files."""

import os

import pytest

# As torch is loaded: threads of several test processes that spin while they wait take each other's
# processors.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.default_generator.manual_seed(0)
    # Without a device torch.manual_seed puts this off, and keeps a traceback each time: slow.
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Every torch.empty, called from Python or from C++, hands out NaN instead of leftovers.

    Memory that is read before it is written then shows in the result on every run, not on some.
    """
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
