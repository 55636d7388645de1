"""One thread, no hub to wait for, and shapes checked at run time: before esscher is first imported."""

import gc
import os
from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
gc.set_threshold(50_000, 10, 10)  # A twentieth of all time would go into looking for garbage.
pytest.register_assert_rewrite("support")

# Always the same examples, and few; HYPOTHESIS_PROFILE=search for those who look for more.
hypothesis.settings.register_profile(
    "same", deadline=None, derandomize=True, database=None, max_examples=20
)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2_000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

CHECKED = ["functional", "nn", "samplers", "distributions", "critics", "experience", "types"]

if os.environ.get("ESSCHER_TYPECHECK", "1") != "0":
    jaxtyping.install_import_hook([f"esscher.{name}" for name in CHECKED], "checker.checked")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of several processes come first, so that one worker runs them one after the other: two at
    once on two processors would spend their time in waiting for each other.
    """
    for item in items:
        if item.get_closest_marker("processes"):
            item.add_marker(pytest.mark.timeout(900))  # They take long to start on a busy machine.
    items.sort(key=lambda item: item.get_closest_marker("processes") is None)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the run-time checks: torch.compile and torch.export cannot see through them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
