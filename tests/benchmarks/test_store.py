"""The store's benchmark on a small setting: its figures are there and belong to what they say."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from proper.benchmarks.measure import TimedSide, interleaved
from proper.benchmarks.object_storage import object_figures
from proper.benchmarks.store import PAYLOAD, RANK, many_figures, run, shapes
from proper.layers.layout import Layout
from tests.s3_server import S3Server

PROMISED = [
    "load_p50_ms",
    "load_p99_ms",
    "load_p50_over_memcpy",
    "load_p99_over_memcpy",
    "peft_load_p50_ms",
    "lookup_p99_ms",
    "bytes_over_raw",
]


def test_the_adapter_has_the_size_that_it_is_said_to_have() -> None:
    assert round(Layout.of(shapes(), RANK).width * 2 / 1e6, 1) == 11.6


def test_many_users(tmp_path: Path) -> None:
    figures = many_figures(tmp_path, 3000)
    assert figures["users"] == 3000 and 1 < figures["bytes_over_raw"] < 1.1
    # The first half less every second one, and the thousand that were drawn.
    assert 750 * PAYLOAD <= figures["compact_bytes_given_back"] <= 2000 * PAYLOAD


def test_sides_take_turns_and_what_follows_a_rare_one_is_not_counted() -> None:
    calls: list[str] = []
    sides = {
        "a": TimedSide(lambda at: calls.append(f"a{at}")),
        "b": TimedSide(lambda at: calls.append(f"b{at}"), prepare=lambda at: calls.append("-")),
        "c": TimedSide(lambda at: calls.append(f"c{at}"), every=2),
    }
    said: list[str] = []
    seconds = interleaved(sides, repeats=4, log=said.append)
    assert " ".join(calls) == "a0 - b0 a1 - b1 a2 - b2 c2 a3 - b3 a4 - b4 a5 - b5 c5"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 2}
    assert [line.partition(":")[0] for line in said] == [
        "warm-up", "repeat 1 of 4", "repeat 2 of 4", "warm-up", "repeat 3 of 4", "repeat 4 of 4"
    ]  # fmt: skip


@pytest.mark.slow
def test_all_figures_that_scripts_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    result = run(tmp_path, users=2000, repeats=4)
    assert json.loads(json.dumps(result)) == result and len(caplog.messages) == 2
    assert all(result["figures"][name] > 0 for name in PROMISED)
    assert result["figures"]["load_bytes"] == 11_597_824
    assert list(tmp_path.iterdir()) == [], "the temporary folder is gone"
    assert torch.__version__ == result["setting"]["torch"]


def test_object_storage_beside_a_folder(tmp_path: Path, s3: S3Server) -> None:
    bucket = s3.new_bucket(versioned=True)
    figures = object_figures(tmp_path, f"s3://{bucket}/bench", {"h.0.up": (40, 60)}, 2, repeats=3)
    assert figures["load_object_p50_over_folder"] == figures["load_object_p50_ms"] / figures["load_folder_p50_ms"] > 1
    assert all(value > 0 for value in figures.values())
    assert s3.contents(bucket) == {}, "nothing stays in the bucket"
