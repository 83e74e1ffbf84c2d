"""docs/how-to/scale.md shows the committed simulation's table and picture, and its configs are valid."""

from __future__ import annotations

from pathlib import Path

from proper.files import read_json
from proper.simulation.simulate import load_simulation
from scripts import scale

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_committed_table_and_picture() -> None:
    runs = read_json(scale.RESULT)["runs"]
    assert scale.table(runs) in (ROOT / "docs/how-to/scale.md").read_text(encoding="utf-8")
    assert scale.PICTURE.read_text(encoding="utf-8") == scale.picture(runs), "run python scripts/scale.py draw"


def test_the_result_is_of_the_committed_configs_and_meets_their_targets() -> None:
    runs = read_json(scale.RESULT)["runs"]
    assert {path.stem for path in scale.CONFIGS.glob("*.yaml")} == runs.keys() == scale.NAMES.keys()
    for name, results in runs.items():
        config, _ = load_simulation(scale.CONFIGS / f"{name}.yaml")
        for users, result in zip(scale.USERS, results, strict=True):
            assert result["setting"] == config.model_copy(update={"users": users}).model_dump(mode="json")
            assert result["with_affinity"]["peak_first_token_p95"] <= config.targets.first_token_p95
            assert result["refits"]["missed"] <= config.targets.missed_refits
