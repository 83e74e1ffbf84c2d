"""The benchmark of serving runs on a small setting and gives what the documented figures are called."""

from __future__ import annotations

from dataclasses import replace

import torch

from proper.benchmarks.serve import QUICK, run


def test_a_small_setting() -> None:
    small = {"hidden": 64, "inner": 96, "layers": 1, "users": 3, "prompt": 6, "answer": 4, "repeats": 1}
    said: list[str] = []
    size = replace(QUICK, **small, rows=2, slots=1, arrivals=5, dtype=torch.float32)  # type: ignore[arg-type]
    result = run(size, "cpu", said.append)
    assert set(result["figures"]) >= {"mixed_over_base", "mixed_over_peft", "cliff_p95_first_token"}
    assert all(value > 0 for value in result["figures"].values())
    assert set(result["tokens_per_second"]) == {"base", "one", "mixed", "plain", "peft", "generate"}
    assert result["setting"]["users"] == 3 and len(said) == 2
