"""How many tokens run at once, and memory that goes back to the system."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from proper.config import ComputeConfig
from proper.models.backbone import Backbone, load_backbone
from proper.models.memory import MAX_TOKENS, ROOM, token_bytes, tokens_at_once

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nano() -> Backbone:
    return load_backbone("proper-nano", torch.bfloat16, CPU)


def test_tokens_at_once_go_by_the_backbones_size(nano: Backbone) -> None:
    assert tokens_at_once(ComputeConfig(batch_tokens=100), nano.model) == 100
    layers = nano.model.config.num_hidden_layers
    try:
        nano.model.config.num_hidden_layers = 1
        assert tokens_at_once(ComputeConfig(), nano.model) == MAX_TOKENS, "a small backbone has room for more"
        nano.model.config.num_hidden_layers = 5 * layers
        found = tokens_at_once(ComputeConfig(), nano.model)
        assert found == ROOM // token_bytes(nano.model.config, 2, 256) and 256 < found < MAX_TOKENS
        nano.model.config.num_hidden_layers = 10**6
        assert tokens_at_once(ComputeConfig(), nano.model) == 256, "one row always fits"
    finally:
        nano.model.config.num_hidden_layers = layers


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_goes_back() -> None:
    """Pieces too small for a mapping of their own, freed but for one at the end: glibc keeps them without a trim."""
    code = """
from proper.models.memory import give_back_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
pieces = [bytearray(100_000) for _ in range(1000)]
before, last = resident(), pieces[-1]
del pieces
kept = resident()
give_back_memory()
print(before - kept < 30_000_000 and kept - resident() > 50_000_000)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "True"
