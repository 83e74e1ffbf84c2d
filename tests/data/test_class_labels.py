"""Labels in Hugging Face data sets, which are stored as numbers: prompts and answers have their names."""

from __future__ import annotations

from pathlib import Path

import datasets
import pyarrow as arrow

from proper.config import DataConfig
from proper.data.interactions import BadRows, read_interactions

KIND = datasets.ClassLabel(names=["no", "yes", "maybe"])


def read(path: Path, prompt: str) -> tuple[list[tuple[str, str]], list[str]]:
    bad = BadRows()
    found = [(each.prompt, each.target) for each in read_interactions(DataConfig(path=str(path), prompt=prompt), bad)]
    return found, [message.removeprefix(f"{path}:") for message in bad.first]


def test_labels_in_lists_and_structs_have_their_names(tmp_path: Path) -> None:
    rows = [
        {"user_id": "u", "output": 1, "tags": [0, 2], "more": {"kind": 1, "n": 1}, "all": [{"kind": 2}]},
        {"user_id": "u", "output": 0, "tags": [], "more": {"kind": 0, "n": 2}, "all": []},
        {"user_id": "u", "output": 2, "tags": [-1], "more": {"kind": 0, "n": 2}, "all": []},
    ]
    features = datasets.Features(
        user_id=datasets.Value("string"),
        output=KIND,
        tags=datasets.Sequence(KIND),
        more={"kind": KIND, "n": datasets.Value("int64")},
        all=[{"kind": KIND}],
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "rows")
    assert read(tmp_path / "rows", "{tags}; {more}; {all}") == (
        [
            ('no, maybe; {"kind": "yes", "n": 1}; {"kind": "maybe"}', "yes"),
            ('; {"kind": "no", "n": 2}; ', "no"),
        ],
        ["3: tags: null"],
    )


def test_a_number_beyond_the_labels_is_a_bad_row(tmp_path: Path) -> None:
    features = datasets.Features(user_id=datasets.Value("string"), input=datasets.Value("string"), output=KIND)
    table = arrow.table({"user_id": ["u"] * 3, "input": ["a", "b", "c"], "output": [0, 3, -2]})
    dataset = datasets.Dataset(table, info=datasets.DatasetInfo(features=features))
    dataset.save_to_disk(tmp_path / "rows")
    assert read(tmp_path / "rows", "{input}") == (
        [("a", "no")],
        ["2: output: label 3, of 3 labels from 0", "3: output: label -2, of 3 labels from 0"],
    )
