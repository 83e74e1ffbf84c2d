"""The pre-training script on a few generated documents: the model it leaves, going on after a stop, and bad input."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from proper.data.encoder import Encoder
from proper.errors import InputError
from proper.models import load_backbone
from scripts import pretrain_nano

SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain_nano.py"
TINY = "--vocabulary 400 --width 32 --layers 2 --heads 2 --ffn 48 --context 64 --window 32 --batch 4 --steps 20"
TINY += " --warmup 4 --mixture books=0.6 --validate-every 8 --device cpu"

Run = Callable[..., int]


def documents() -> list[dict[str, str]]:
    rng = random.Random(0)
    words = ["the", "harbour", "was", "quiet", "and", "old", "ships", "slept", "under", "snow", "<s>", "</s>", "née"]
    rows = []
    for number in range(200):
        text = " ".join(rng.choices(words, k=rng.randint(5, 60)))
        source = ("books", "news", "blog")[number % 3]
        rows.append({"text": text, "split": "valid" if number % 10 == 0 else "train", "source": source})
    return rows


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("texts") / "texts.parquet", documents())


@pytest.fixture(scope="module")
def run(texts: Path) -> Run:
    def start(out: Path, *more: str, data: Path = texts) -> int:
        return int(pretrain_nano.main([str(data), "--out", str(out), *TINY.split(), *more]))

    return start


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("nano") / "model"
    assert run(out) == 0
    return out


def test_the_folder_is_a_backbone(finished: Path) -> None:
    backbone = load_backbone(str(finished), torch.float32, torch.device("cpu"))
    tokenizer = backbone.tokenizer
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("").input_ids == []
    assert tokenizer.decode(tokenizer("née ☃ snow").input_ids) == "née ☃ snow"
    ids = torch.tensor([Encoder(tokenizer, 32).prompt("the harbour was")])
    assert torch.isfinite(backbone.model(ids).logits).all()
    assert not (finished / "work").exists()
    assert {path.name for path in finished.iterdir()} >= {"config.json", "tokenizer.json", "train.log"}


def test_weights_are_bf16_and_the_config_is_the_flags(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    wanted = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 400}
    assert config.items() >= {**wanted, "dtype": "bfloat16", "max_position_embeddings": 64}.items()
    model = load_backbone(str(finished), torch.bfloat16, torch.device("cpu")).model
    numbers = sum(p.numel() for p in model.parameters())
    assert (finished / "model.safetensors").stat().st_size == pytest.approx(2 * numbers, rel=0.2)


def test_it_learns_something(finished: Path) -> None:
    lines = (finished / "train.log").read_text().splitlines()
    losses = [float(line.split()[1]) for line in lines if line.startswith("valid")]
    final = float(lines[-1].removeprefix("final valid ").split()[0])
    assert len(losses) == 2
    assert final < losses[1] < losses[0] < math.log(400)
    assert lines[-1].endswith(f"{20 * 4 * 32} tokens seen")


def test_a_run_that_paused_ends_in_the_same_weights(run: Run, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    for step in ("0", "7", "8"):
        assert run(out, "--pause-at", step) == 0
        assert not (out / "model.safetensors").exists()
    assert run(out) == 0
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    assert (out / "tokenizer.json").read_bytes() == (finished / "tokenizer.json").read_bytes()
    assert (out / "train.log").read_text() == (finished / "train.log").read_text()


def test_a_run_that_was_killed_goes_on_from_its_checkpoint(
    run: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, draw = tmp_path / "model", pretrain_nano.draw

    def killed(*arguments: Any) -> Any:
        if arguments[-1] == 13:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(pretrain_nano, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        run(out, "--checkpoint-every", "5")
    monkeypatch.setattr(pretrain_nano, "draw", draw)
    assert run(out, "--checkpoint-every", "5") == 0
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_half_written_tokens_are_written_again(run: Run, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert run(out, "--pause-at", "0") == 0
    (out / "work" / "tokens.json").unlink()
    assert run(out) == 0
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()


def test_a_time_limit_ends_the_run(run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "model", "--minutes", "1e-6") == 0
    assert (tmp_path / "model" / "train.log").read_text().endswith(f"{1 * 4 * 32} tokens seen\n")


def test_every_document_has_one_start_and_one_end(run: Run, texts: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--pause-at", "0") == 0
    index = json.loads((tmp_path / "work" / "tokens.json").read_text())
    streams = pretrain_nano._streams(tmp_path / "work", index, "train")
    rows = [row for row in documents() if row["split"] == "train"]
    for source, stream in streams.items():
        mine = [row["text"] for row in rows if row["source"] == source]
        assert (stream == 1).sum() == (stream == 2).sum() == len(mine)
        assert index["train"][source]["characters"] == sum(map(len, mine))
        assert index["train"][source]["tokens"] == len(stream)


def test_another_setting_needs_another_folder(
    run: Run, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "--pause-at", "0") == 0
    assert run(tmp_path, "--rate", "0.5") == 2
    assert "begun with rate 0.003, not 0.5" in capsys.readouterr().err
    assert run(finished) == 2
    assert "finished model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--heads", "3"], "--heads 3"),
        (["--vocabulary", "70000"], "--vocabulary 70000"),
        (["--hold", "1"], "--hold 1"),
        (["--mixture", "books"], "SOURCE=SHARE"),
        (["--mixture", "film=0.5"], "the sources are blog, books, news"),
        (["--mixture", "books=1.5"], "not 1 in all"),
        (["--window", "100000"], "fewer tokens than one window: blog, books, news"),
    ],
)
def test_impossible_settings(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert run(tmp_path, *more) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_bad_files(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no.parquet").write_text("text")
    lacking = write(tmp_path / "lacking.parquet", [{"text": "a", "split": "train"}])
    odd = write(tmp_path / "odd.parquet", [{"text": "a", "split": "test", "source": "b"}])
    for data, says in [
        (tmp_path / "none.parquet", "none.parquet: not readable"),
        (tmp_path / "no.parquet", "no.parquet: not readable"),
        (lacking, "no column source"),
        (odd, "split is 'test'"),
    ]:
        assert run(tmp_path / data.stem, data=data) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def streams(**sizes: int) -> dict[str, Any]:
    return {source: np.full(size, at, dtype=np.uint16) for at, (source, size) in enumerate(sizes.items())}


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50), st.floats(0, 1))
def test_shares_are_one_in_all_and_the_rest_is_by_size(a: int, b: int, c: int, share: float) -> None:
    found = pretrain_nano.shares(f"a={share}", streams(a=a, b=b, c=c))
    assert found["a"] == share
    assert sum(found.values()) == pytest.approx(1)
    assert found["b"] * c == pytest.approx(found["c"] * b)


def test_shares_that_leave_nothing_over_need_no_rest() -> None:
    assert pretrain_nano.shares("a=0.25,b=0.75", streams(a=1, b=1)) == {"a": 0.25, "b": 0.75}
    with pytest.raises(InputError):
        pretrain_nano.shares("a=0.25,b=0.5", streams(a=1, b=1))


def test_batches_follow_from_seed_and_step_and_keep_the_mixture() -> None:
    recipe = pretrain_nano.Recipe(window=8, batch=2000)
    sources = streams(a=900, b=90)
    chances = pretrain_nano.shares("a=0.6", sources)
    first = pretrain_nano.draw(sources, chances, recipe, 3)
    assert first.shape == (2000, 9)
    assert torch.equal(first, pretrain_nano.draw(sources, chances, recipe, 3))
    assert not torch.equal(first, pretrain_nano.draw(sources, chances, recipe, 4))
    assert (first[:, 0] == 0).float().mean() == pytest.approx(0.6, abs=0.04)
