from __future__ import annotations

import gc
import random
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from proper.config import make_config
from proper.data.dataset import Dataset, prepare
from proper.data.histories import SampledBy, TextExample
from proper.data.summary import summarize
from proper.errors import DataError, RunFolderError

Build = Callable[..., Dataset]
Row = dict[str, Any]
CHOICE = {"kind": "classification"}


def make_rows(lengths: dict[str, int], words: int = 3) -> list[Row]:
    return [
        {
            "user_id": user,
            "input": f"{user} {n}" + " word" * (words - 2),
            "output": f"answer{n % 4}",
            "timestamp": f"20{n % 90 + 10}",
        }
        for user, length in lengths.items()
        for n in range(length)
    ]


def ids(rows: Any) -> list[int]:
    return [row.id for row in rows]


def no_tokens(prompts: Sequence[str], targets: Sequence[str]) -> list[int]:
    return [1] * len(prompts)


def test_rows_come_back_as_they_were(build: Build) -> None:
    row = {"user_id": "u 🦊", "input": "نص\x00 ", "output": "ok", "item_id": "i"}
    rows = [row | {"timestamp": f"20{n}"} for n in range(10, 30)]
    dataset = build(rows, split={"shared_items": "allow"})
    (newest,) = dataset.history("u 🦊", newest=1)
    assert newest == TextExample(
        newest.id, "u 🦊", "نص\x00 ", "ok", "i", datetime(2025, 1, 1, tzinfo=UTC).timestamp(), 2
    )


def test_history_is_oldest_first_and_newest_keeps_the_last(build: Build) -> None:
    rows = make_rows({"a": 20, "b": 12})
    random.Random(0).shuffle(rows)
    dataset = build(rows)
    whole = dataset.history("a")
    assert [row.prompt for row in whole] == [f"a {n} word" for n in range(16)]
    assert dataset.history("a", newest=3) == whole[-3:]
    assert dataset.history("a", newest=100) == whole
    assert dataset.history("nobody") == []
    assert [row.prompt for row in dataset.queries("a")] == [f"a {n} word" for n in range(16, 20)]
    assert list(dataset.queries("nobody")) == []
    assert list(dataset.queries()) == [*dataset.queries("a")]


def test_duplicates_are_kept_once(build: Build) -> None:
    rows = make_rows({"a": 20})
    again = [rows[3], rows[3] | {"item_id": "x"}, rows[4] | {"timestamp": "1999"}]
    dataset = build(rows + again)
    assert summarize(dataset).duplicates == 2
    assert summarize(dataset).rows == 21


def test_labels_are_sorted_and_numbers_by_value(build: Build) -> None:
    rows = make_rows({"a": 20})
    assert build(rows, task=CHOICE).labels == ["answer0", "answer1", "answer2", "answer3"]
    assert build(rows).labels == []
    labels = ["answer3", "answer2", "answer1", "answer0"]
    assert build(rows, task=CHOICE | {"labels": labels}).labels == labels
    stars = [row | {"output": n} for row, n in zip(rows, [10, 9.5, 2] * 7, strict=False)]
    assert build(stars, task={"kind": "rating"}).labels == ["2", "9.5", "10"]


def test_a_single_label_is_refused(build: Build) -> None:
    rows = [row | {"output": "same"} for row in make_rows({"a": 20})]
    with pytest.raises(DataError) as caught:
        build(rows, task=CHOICE)
    assert str(caught.value) == "data.target: every row has the answer 'same'; task.kind classification needs two"


def test_bad_rows_stop_everything_and_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"user_id": "u", "input": "in", "output": "out"}\n' * 3 + "{}\n" * 42)
    config = make_config({"data": {"path": str(path)}})
    out = tmp_path / "out" / "data.sqlite"
    with pytest.raises(DataError) as caught:
        prepare(config, out, no_tokens)
    assert str(caught.value) == (f"{path}:4: user_id: missing (and 41 more bad rows; --skip-bad-rows leaves them out)")
    assert list(out.parent.iterdir()) == []


def test_bad_rows_can_be_skipped_and_are_counted(build: Build) -> None:
    rows = make_rows({"a": 20})
    dataset = build([*rows[:7], {"user_id": None}, *rows[7:], {}], skip_bad_rows=True)
    summary = summarize(dataset)
    assert (summary.rows, summary.bad_rows) == (20, 2)
    assert [message.split(":", 1)[1] for message in summary.first_bad_rows] == [
        "8: user_id: null",
        "22: user_id: missing",
    ]


def test_nothing_but_bad_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 3)
    with pytest.raises(DataError) as caught:
        prepare(make_config({"data": {"path": str(path)}}), tmp_path / "data.sqlite", no_tokens, skip_bad_rows=True)
    assert str(caught.value).startswith(f"{path}: not one good row; the first of 3 bad rows: {path}:1: row: not JSON")
    with pytest.raises(DataError, match=r"rows.jsonl:1: row: not JSON .* \(no row is good, of 3\)$"):
        prepare(make_config({"data": {"path": str(path)}}), tmp_path / "data.sqlite", no_tokens)
    # A user who is left out has good rows too.
    path.write_text('{"user_id": "a", "input": "x", "output": "y"}\n{\n')
    with pytest.raises(DataError, match=r"rows.jsonl:2: row: not JSON .*--skip-bad-rows leaves it out\)$"):
        config = make_config({"data": {"path": str(path)}})
        prepare(config, tmp_path / "data.sqlite", no_tokens, is_left_out=lambda user: user == "a")


def test_the_hash_is_of_contents_and_settings_not_of_order_or_place(tmp_path: Path, build: Build) -> None:
    rows = make_rows({"a": 20, "b": 15})
    first = build(rows)
    assert build(rows[::-1]).sha256 == first.sha256
    assert build(rows[:-1]).sha256 != first.sha256
    assert build([row | {"item_id": "i"} for row in rows], split={"shared_items": "allow"}).sha256 != first.sha256
    assert build(rows, split={"seed": 1}).sha256 != first.sha256
    assert build(rows, population={"rank": 2}).sha256 == first.sha256
    assert len(first.sha256) == 64


KILLED = """
import os, signal, sqlite3, sys
data = sqlite3.connect(sys.argv[1], isolation_level=None)
data.execute("PRAGMA cache_size = 2")
data.execute("BEGIN IMMEDIATE")
data.execute("UPDATE texts SET prompt = 'changed'")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("lost", [False, True])
def test_a_killed_change_is_undone_and_not_rolled_back_into_other_data(
    tmp_path: Path, jsonl: Callable[..., Path], lost: bool
) -> None:
    """A deletion changes the data; the file may also be removed, so as to be prepared again."""
    config = {"data": {"path": str(jsonl(make_rows({"a": 300, "b": 30}))), "prompt": "{input}", "target": "{output}"}}
    out = tmp_path / "data.sqlite"
    prepare(make_config({**config, "task": CHOICE}), out, no_tokens).close()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False)
    assert killed.returncode == -9 and (tmp_path / "data.sqlite-journal").stat().st_size
    if lost:
        out.unlink()
        config["data"]["path"] = str(jsonl(make_rows({"c": 40, "d": 20}, words=9)))
        prepare(make_config({**config, "task": CHOICE}), out, no_tokens).close()
    with Dataset.open(out) as dataset:
        assert dataset.connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert {user.id for user in dataset.users()} == ({"c", "d"} if lost else {"a", "b"})
        assert all(row.prompt.startswith(row.user) for user in dataset.users() for row in dataset.history(user.id))


def test_progress_counts_rows_and_tokens_come_in_chunks(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    sizes: list[int] = []
    seen: list[int] = []

    def count(prompts: Sequence[str], targets: Sequence[str]) -> list[int]:
        sizes.append(sum(map(len, prompts)))
        return [len(prompt) for prompt in prompts]

    rows = make_rows({"a": 2300, "b": 4})
    for row in rows[-4:]:
        row["input"] += "x" * 3_000_000
    config = make_config({"data": {"path": str(jsonl(rows))}})
    with prepare(config, tmp_path / "data.sqlite", count, progress=seen.append) as dataset:
        assert sum(seen) == 2304
        assert max(sizes) < 7_000_000
        assert summarize(dataset).truncated == 4
        assert dataset.history("b")[0].tokens == len(dataset.history("b")[0].prompt)


class TestSample:
    def test_without_a_budget_every_history_row_comes_once(self, build: Build) -> None:
        dataset = build(make_rows({"a": 1500, "b": 20, "c": 5}))
        for who, users in (("all", "abc"), ("targets", "ab"), ("others", "c")):
            sample = dataset.sample(who, None, seed=0)
            expected = [row.id for user in users for row in dataset.history(user)]
            assert sorted(ids(sample.rows(0))) == sorted(expected)
            assert sample.size == len(expected)
            assert sample.tokens == 4 * len(expected)

    def test_order_depends_on_seed_and_epoch_alone(self, build: Build) -> None:
        dataset = build(make_rows({"a": 1500, "b": 20}))
        orders = [
            ids(dataset.sample("all", None, seed).rows(epoch)) for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))
        ]
        assert orders[0] == orders[3]
        assert orders[0] != orders[1] != orders[2] != orders[0]
        assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2]) != orders[0]
        interleaved = dataset.sample("all", None, seed=0)
        one, other = interleaved.rows(0), interleaved.rows(1)
        pairs = list(zip(ids(one), ids(other), strict=True))
        assert ([a for a, _ in pairs], [b for _, b in pairs]) == (orders[0], orders[1])

    def test_a_budget_is_spread_evenly_over_users(self, build: Build) -> None:
        dataset = build(make_rows({"a": 500, "b": 100, "c": 100, "few": 2}))
        sample = dataset.sample("all", 4 * 50 + 3, seed=0)
        assert sample.size == 50
        assert sample.tokens == 200
        assert Counter(row.user for row in sample.rows(0)) == {"a": 16, "b": 16, "c": 16, "few": 2}
        assert ids(sample.rows(0)) != sorted(ids(sample.rows(0)))
        assert set(ids(sample.rows(0))) != set(ids(dataset.sample("all", 203, seed=1).rows(0)))

    def test_a_budget_of_rows_counts_users_in_proportion_to_their_histories(self, build: Build) -> None:
        dataset = build(make_rows({"a": 600, "b": 100, **{f"few{at}": 2 for at in range(50)}}))
        shares: Counter[str] = Counter()
        for seed in range(20):
            sample = dataset.sample("all", 4 * 40, seed, by="rows")
            assert (sample.size, sample.tokens) == (40, 160)
            shares.update(row.user[0] for row in sample.rows(0))
        histories = Counter({"a": 0, "b": 0, "f": 0})
        for user in dataset.users():
            histories[user.id[0]] += user.history
        for user, rows in histories.items():  # four standard deviations of a draw without replacement, at most
            expected = 800 * rows / histories.total()
            assert abs(shares[user] - expected) < 4 * expected**0.5
        by_users = dataset.sample("all", 4 * 40, 0)
        assert Counter(row.user[0] for row in by_users.rows(0))["f"] > 30
        assert set(ids(dataset.sample("all", 160, 0, by="rows").rows(0))) != set(
            ids(dataset.sample("all", 160, 1, by="rows").rows(0))
        )

    @pytest.mark.parametrize("by", ["users", "rows"])
    def test_a_larger_budget_keeps_what_a_smaller_one_has(self, build: Build, by: SampledBy) -> None:
        dataset = build(make_rows({"a": 100, "b": 40}))
        small, large = (set(ids(dataset.sample("all", budget, 0, by).rows(0))) for budget in (40, 120))
        assert small < large

    def test_long_rows_count_as_long_as_the_model_reads(self, build: Build) -> None:
        rows = make_rows({"a": 20}, words=500)
        dataset = build(rows, compute={"max_length": 100})
        assert dataset.sample("all", 300, seed=0).size == 3
        assert dataset.history("a")[0].tokens == 501
        assert summarize(dataset).truncated == 20

    def test_even_the_least_budget_gives_a_row(self, build: Build) -> None:
        sample = build(make_rows({"a": 20})).sample("all", 1, seed=0)
        assert (sample.size, len(list(sample.rows(0)))) == (1, 1)

    def test_nobody_of_a_role_is_an_empty_sample(self, build: Build) -> None:
        sample = build(make_rows({"a": 20})).sample("others", 100, seed=0)
        assert (sample.size, sample.tokens, list(sample.rows(0))) == (0, 0, [])


def test_what_cannot_be_opened_is_said(tmp_path: Path, build: Build) -> None:
    missing = tmp_path / "none.sqlite"
    with pytest.raises(RunFolderError) as caught:
        Dataset.open(missing)
    assert str(caught.value) == f"{missing}: no such file; `proper run` prepares it"
    (tmp_path / "text").write_text("not a database, only a text that is long enough to be looked at\n" * 20)
    with pytest.raises(RunFolderError, match="text: not readable as prepared data: file is not a database$"):
        Dataset.open(tmp_path / "text")
    (tmp_path / "empty").touch()
    with pytest.raises(RunFolderError, match="empty: not readable as prepared data: no such table: meta$"):
        Dataset.open(tmp_path / "empty")
    gc.collect()


def test_preparing_again_replaces_the_file_whole(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    out = tmp_path / "out 100%?#" / "data.sqlite"
    path = jsonl(make_rows({"a": 20}))
    config = make_config({"data": {"path": str(path)}})
    prepare(config, out, no_tokens).close()
    before = out.read_bytes()
    path.write_text("{}")
    with pytest.raises(DataError):
        prepare(config, out, no_tokens)
    assert out.read_bytes() == before
    jsonl(make_rows({"b": 30}))
    with prepare(config, out, no_tokens) as dataset:
        assert [user.id for user in dataset.users()] == ["b"]
    assert [file.name for file in out.parent.iterdir()] == ["data.sqlite"]


PROCESS = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path
    from proper.config import make_config
    from proper.data.dataset import prepare
    from proper.data.summary import summarize
    from proper.errors import ProperError
    path, out, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        dataset = prepare(make_config({"data": {"path": path}}), out, lambda p, t: [len(x) for x in p])
    except ProperError as error:
        print(type(error).__name__, error)
        raise SystemExit(0)
    sample = dataset.sample("all", 10_000_000, 0)
    print(sum(1 for _ in sample.rows(0)), sum(1 for _ in dataset.queries()), summarize(dataset).rows)
    status = Path("/proc/self/status")
    print(*(line.split()[1] for line in status.open() if line.startswith("VmHWM")) if status.exists() else ())
    """
)


def in_process(path: Path, out: Path, limit: int = 0) -> list[str]:
    command = [sys.executable, "-c", PROCESS, str(path), str(out), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    return done.stdout.split("\n")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    """A limit on the size of files stands in for the disk."""
    out = tmp_path / "out" / "data.sqlite"
    message = in_process(jsonl(make_rows({"a": 20_000}, words=100)), out, limit=2_000_000)[0]
    assert message.startswith(f"ProperError {out}: cannot be written: ")
    assert list(out.parent.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_rows(tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    """Ten times the rows are 45 MB more text; fixed caches fill up, and that is all."""
    peaks = []
    for users in (10, 100):
        rows = make_rows({f"u{n}": 250 for n in range(users)}, words=400)
        counts, peak = in_process(jsonl(rows), tmp_path / f"{users}.sqlite")[:2]
        assert counts.split()[2] == str(250 * users)
        peaks.append(int(peak) // 1024)
    assert peaks[1] - peaks[0] < 20, f"{peaks} MB"


def test_the_work_of_ordering_grows_with_the_rows_alone(build: Build) -> None:
    """Counted in the database's own steps, so that a busy machine changes nothing; four times as many is quadratic."""

    def steps(people: int) -> int:
        dataset = build(make_rows({f"u{n}": 100 for n in range(people)}))
        taken = 0

        def count() -> int:
            nonlocal taken
            taken += 1
            return 0

        dataset.connection.set_progress_handler(count, 100)
        sample = dataset.sample("all", None, seed=0)
        assert sum(1 for _ in sample.rows(0)) == sample.size
        return taken

    assert 1.5 < steps(40) / steps(20) < 2.5


def test_when_every_user_was_deleted_nothing_is_left(jsonl, tmp_path: Path) -> None:
    config = make_config({"data": {"path": str(jsonl(make_rows({"a": 20})))}})
    with pytest.raises(DataError, match="rows.jsonl: not one good row; every user was deleted"):
        prepare(config, tmp_path / "data.sqlite", no_tokens, is_left_out=lambda user: user == "a")
