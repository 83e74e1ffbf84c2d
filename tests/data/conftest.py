"""Files of interactions made up on the spot, and a way to prepare them that needs no tokenizer."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from proper.config import Config, make_config
from proper.data.dataset import Dataset, prepare
from proper.errors import DataError

Rows = Iterable[Mapping[str, Any]]


def write_jsonl(path: Path, rows: Rows) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def count_words(prompts: Sequence[str], targets: Sequence[str]) -> list[int]:
    return [len(prompt.split()) + len(target.split()) for prompt, target in zip(prompts, targets, strict=True)]


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[[Rows], Path]:
    return lambda rows: write_jsonl(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Callable[..., Dataset]]:
    """Prepare rows with sections of a config given by keyword, `data` among them."""
    made: list[Dataset] = []

    def build_from(rows: Rows, *, skip_bad_rows: bool = False, **sections: Any) -> Dataset:
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        data = {"path": str(path)} | sections.pop("data", {})
        config = make_config({"data": data, **sections})
        made.append(prepare(config, tmp_path / f"data{len(made)}.sqlite", count_words, skip_bad_rows=skip_bad_rows))
        return made[-1]

    yield build_from
    for dataset in made:
        dataset.close()


@pytest.fixture
def prepare_run(tmp_path: Path) -> Callable[[Config], Dataset]:
    """Prepare the data of a config."""
    return lambda config: prepare(config, tmp_path / "data.sqlite", count_words)


@contextmanager
def _prepared(rows: Rows, split: dict[str, Any]) -> Iterator[Dataset | None]:
    with tempfile.TemporaryDirectory() as folder:
        path = write_jsonl(Path(folder) / "rows.jsonl", rows)
        config = make_config({"data": {"path": str(path)}, "split": split})
        try:
            dataset = prepare(config, Path(folder) / "data.sqlite", count_words)
        except DataError as error:
            assert "\n" not in str(error) and str(error).startswith("split.")
            yield None
            return
        with dataset:
            yield dataset


@pytest.fixture(scope="session")
def prepared() -> Callable[[Rows, dict[str, Any]], AbstractContextManager[Dataset | None]]:
    """Prepare rows in a folder of their own, as often as a property test likes; None where no target is left."""
    return _prepared
