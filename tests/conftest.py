"""What holds for every test: one thread, one seed, no network."""

import os
import random
import sys

import numpy as np
import pytest
from hypothesis import settings

# Read by torch and huggingface_hub when they are first imported, here and in the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

settings.register_profile("txopt", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("txopt")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
