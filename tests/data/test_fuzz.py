"""10,000 seeded hostile rows: whatever is in a file, good rows are all in or nothing is, and bad ones are named.

Every value has its verdict beside it: what a reader makes of it as text, or BAD. Rows carry a number, `n`, by which the
good ones are found again.
"""

from __future__ import annotations

import csv
import io
import json
import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
import yaml
from pyarrow import parquet

from proper.cli.app import main
from proper.config import Config, DataConfig, TaskConfig, make_config
from proper.data.dataset import prepare
from proper.errors import DataError
from proper.interactions.parsing import read_file, record_reader

from .conftest import count_words

BAD = None
Pool = list[tuple[Any, str | None]]
Verdict = dict[int, str | None]
"""By line number: the user of a good row, or BAD."""


def nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


NAN, INF = float("nan"), float("inf")
TEXTS: Pool = [
    (text, text) for text in ("x", "ü 🦊", "a\x00b", "\u202eشكرا", "'; DROP TABLE rows; --", "{n}", "%s", "y" * 512)
]
IDS: Pool = [
    *TEXTS,
    *((value, str(int(value))) for value in (7, 7.0, 0, -3, 2**63, 10**40, 2.0**53 - 1)),
    *((value, BAD) for value in (2.0**53, -(2.0**60), 1e300, 1.5, INF, -INF, True, [], ["u"], {}, {"a": 1}, "\ud800")),
]
USERS: Pool = [
    *IDS,
    *((value, BAD) for value in (None, NAN, "", " \t", "y" * 513)),
]
ITEMS: Pool = [*IDS, *((value, "") for value in (None, NAN, "", "y" * 3000))]
PROMPTS: Pool = [
    *((value, "") for value in ("", "x", 10**4000, 1e300, INF, True, [], ["a", [1.5]], {"a": [None]}, "w " * 100_000)),
    *((value, BAD) for value in (None, NAN, [None], [NAN], "\ud83d", ["\udc00"], {"\ud800": 1}, nested(700))),
]
TARGETS: Pool = [
    *((value, "") for value in ("x", 3, 3.0, 1e300, -INF, False, ["a"], {"a": None}, "é" * 5000)),
    *((value, BAD) for value in (None, NAN, "", " \n\u3000", [], "\ud800", [None])),
]
RATINGS: Pool = [
    *((value, "") for value in (3, 3.0, "3", " 4.50", "1e2", 2**53 - 1, -2)),
    *((value, BAD) for value in (None, NAN, INF, "inf", "nan", "x", "", True, [3, 4], 10**300, 10**400, "3,5")),
]
TIMES: Pool = [
    *((value, "") for value in (None, 0, -1, 1.7e9, 1.7e12, 1.7e15, 1.7e18, 2**63, "2018", "1700000000000000000")),
    *((value, BAD) for value in ("soon", "", NAN, INF, True, [], {}, 10**400, -(10**30), "9" * 30, "2018-13-01")),
]


@dataclass(frozen=True)
class Written:
    """A file, and what is in it by line."""

    path: Path
    verdicts: Verdict
    kind: str


def ordinary(n: int) -> dict[str, Any]:
    return {
        "n": n,
        "user_id": f"u{n % 5}",
        "input": f"said {n}",
        "output": str(n % 4),
        "timestamp": 1_500_000_000 + n,
        "item_id": n,
    }


def spoil(dice: random.Random, row: dict[str, Any], pools: dict[str, Pool]) -> str | None:
    """Change some of a row's values; return its user, or BAD."""
    user: str | None = row["user_id"]
    good = True
    for name in dice.sample(sorted(pools), dice.randint(0, 2)):
        value, verdict = dice.choice(pools[name])
        row[name] = value
        good = good and verdict is not BAD
        user = verdict if name == "user_id" else user
    return user if good else BAD


def json_lines(dice: random.Random, path: Path, size: int) -> Written:
    kind = dice.choice(["generation", "rating", "classification"])
    pools = {"user_id": USERS, "input": PROMPTS, "output": RATINGS if kind == "rating" else TARGETS}
    pools |= {"timestamp": TIMES, "item_id": ITEMS}
    lines, verdicts = [], Verdict()
    for n in range(1, size + 1):
        row = ordinary(n)
        verdicts[n] = spoil(dice, row, pools) if n > 40 else row["user_id"]
        if dice.random() < 0.1:  # a bad value in a column that is not read is no fault
            row["unused"] = dice.choice(PROMPTS)[0]
        line = json.dumps(row).encode()
        if n > 40 and dice.random() < 0.1:
            line, verdicts[n] = dice.choice(BROKEN_LINES)(line), BAD
        lines.append(line)
    path.write_bytes(b"\n".join(lines))
    return Written(path, verdicts, kind)


BROKEN_LINES: list[Callable[[bytes], bytes]] = [
    lambda line: line[:-1],
    lambda line: b"[" + line + b"]",
    lambda line: line.replace(b"said", b"\xff\xfe", 1) if b"said" in line else b"\xff",
    lambda line: line[:-1] + b', "n": 0}',
    lambda line: line.replace(b'"user_id"', b'"user"', 1),
    lambda line: b"null",
    lambda line: b"9" * 5000,
    lambda line: b"[" * 50_000,
    lambda line: b"{" + line,
]


def comma_separated(dice: random.Random, path: Path, size: int) -> Written:
    def texts(pool: Pool) -> Pool:
        cells = [(value, verdict) for value, verdict in pool if isinstance(value, str) and "\ud800" not in value]
        # An empty cell is null, whatever the column.
        return [(value, verdict) for value, verdict in cells if value and "\ud83d" not in value]

    kind = dice.choice(["generation", "rating"])
    users = [
        *texts(USERS),
        ("7.0", "7"),
        ("7.656119796028794e+16", BAD),
        ("", BAD),
        ("1.5", "1.5"),
        ('a"b,c\nd', 'a"b,c\nd'),
    ]
    pools = {
        "user_id": users,
        "input": [*texts(PROMPTS), ("", BAD)],
        "timestamp": [*texts(TIMES), ("1.7e+18", ""), ("", "")],
    }
    pools |= {
        "output": [*texts(RATINGS if kind == "rating" else TARGETS), ("", BAD)],
        "item_id": [*texts(ITEMS), ("1e+300", BAD)],
    }
    out, verdicts, line = io.BytesIO(), Verdict(), 1
    for n in range(size + 1):
        row = ordinary(n)
        verdict = spoil(dice, row, pools) if n > 40 else row["user_id"]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(row if n == 0 else row.values())
        raw = text.getvalue().encode()
        if n:
            verdicts[line] = verdict
        if n > 40 and dice.random() < 0.1:
            raw, verdicts[line] = dice.choice(BROKEN_CELLS)(raw), BAD
        out.write(raw)
        line += raw.count(b"\n")
    path.write_bytes(out.getvalue())
    return Written(path, verdicts, kind)


BROKEN_CELLS: list[Callable[[bytes], bytes]] = [
    lambda raw: b"1,u\n",
    lambda raw: b"1,u,a,b,2018,c,d\n",
    lambda raw: b'1,"u"u,a,b,2018,c\n',
    lambda raw: b"1,\xff,a,b,2018,c\n",
    lambda raw: b"1,\xed\xa0\x80,a,b,2018,c\n",
]

FAR = 10**12
COLUMNS: dict[str, list[tuple[arrow.DataType, Pool]]] = {
    "user_id": [
        (arrow.string(), [*TEXTS, (None, BAD), ("", BAD)]),
        (arrow.dictionary(arrow.int8(), arrow.string()), [*TEXTS, (None, BAD)]),
        (arrow.int64(), [(2**60 + 1, str(2**60 + 1)), (None, BAD)]),
        (arrow.float64(), [(7.0, "7"), (2.0**53, BAD), (1.5, BAD), (NAN, BAD), (None, BAD), (INF, BAD)]),
        (arrow.float32(), [(7.0, "7"), (2.0**24, BAD), (None, BAD)]),
        (arrow.decimal128(20, 2), [(Decimal("7.00"), "7"), (Decimal("7.50"), BAD)]),
        (arrow.binary(), [(b"u", BAD)]),
        (arrow.bool_(), [(True, BAD)]),
        (arrow.list_(arrow.string()), [(["u"], BAD)]),
    ],
    "input": [
        (arrow.string(), [("x", ""), ("", ""), ("w " * 50_000, ""), (None, BAD)]),
        (arrow.binary(), [(b"x", BAD)]),
        (arrow.list_(arrow.float32()), [([1.5], ""), ([None], BAD), ([], "")]),
        (arrow.struct([("a", arrow.timestamp("s"))]), [({"a": 0}, ""), ({"a": FAR}, BAD)]),
        (arrow.duration("s"), [(1, ""), (2**62, BAD)]),
        (arrow.time64("ns"), [(1000, "")]),
        (arrow.date64(), [(0, ""), (FAR * 1000 // 86_400_000 * 86_400_000, BAD)]),
    ],
    "output": [
        (arrow.string(), [("3", ""), (None, BAD), (" ", BAD)]),
        (arrow.float32(), [(3.3, ""), (NAN, BAD), (None, BAD)]),
        (arrow.decimal128(5, 2), [(Decimal("3.50"), "")]),
        (arrow.int8(), [(-3, ""), (None, BAD)]),
    ],
    "timestamp": [
        *((arrow.timestamp(unit), [(0, ""), (FAR * 1000, BAD), (None, "")]) for unit in ("s", "ms")),
        (arrow.timestamp("us", "Asia/Tokyo"), [(0, ""), (2**62, BAD), (-(2**62), BAD), (None, "")]),
        (arrow.timestamp("ns"), [(0, ""), (2**63 - 1, ""), (-(2**62), "")]),
        (arrow.date32(), [(0, ""), (2**30, BAD), (None, "")]),
        (arrow.uint64(), [(2**64 - 1, ""), (1, "")]),
        (arrow.float64(), [(1.7e18, ""), (NAN, BAD), (INF, BAD), (1e21, BAD)]),
        (arrow.string(), [("2018", ""), ("soon", BAD), ("", BAD)]),
        (arrow.bool_(), [(True, BAD), (None, "")]),
    ],
    "item_id": [
        (arrow.string(), [("i", ""), ("", ""), (None, "")]),
        (arrow.float64(), [(2.0**60, BAD), (1.0, ""), (NAN, "")]),
        (arrow.null(), [(None, "")]),
    ],
}


def columns_of_types(dice: random.Random, path: Path, size: int) -> Written:
    """Write two row groups: one ordinary in one file of its own, one whose columns have types drawn at random."""
    drawn = {name: dice.choice(kinds) for name, kinds in COLUMNS.items()}
    rows, verdicts = [], Verdict()
    for n in range(1, size + 1):
        row: dict[str, Any] = {"n": n}
        user: str | None = ""
        for name, (_, pool) in drawn.items():
            good = [each for each in pool if each[1] is not BAD]
            value, verdict = dice.choice(pool if dice.random() < 0.1 or not good else good)
            row[name] = value
            user = BAD if user is BAD or verdict is BAD else verdict if name == "user_id" else user
        rows.append(row)
        verdicts[n] = user
    arrays = [arrow.array([row["n"] for row in rows])]
    arrays += [arrow.array([row[name] for row in rows], kind) for name, (kind, _) in drawn.items()]
    parquet.write_table(arrow.table(arrays, ["n", *drawn]), path, row_group_size=dice.choice([7, 100, 1000]))
    return Written(path, verdicts, "generation")


WRITERS = (json_lines, comma_separated, columns_of_types)


def hostile_files(folder: Path, seed: int, rows: int, size: int = 250) -> Iterator[Written]:
    """Write files of `size` rows, in turn of each kind, until there are `rows`."""
    dice = random.Random(seed)
    for number in range(rows // size):
        write = WRITERS[number % 3]
        ending = {json_lines: "jsonl", comma_separated: "csv", columns_of_types: "parquet"}[write]
        yield write(dice, folder / f"{number:03}.{ending}", size)


def config_of(written: Written) -> Config:
    return make_config(
        {
            "data": {"path": str(written.path), "prompt": "{n} {input}"},
            "task": {"kind": written.kind},
            "split": {"min_history": 1, "by": "random", "shared_items": "allow"},
        }
    )


def stored(path: Path) -> dict[int, str]:
    """Return the user of every row that is in a database, by the row's number."""
    with sqlite3.connect(path) as connection:
        found = connection.execute(
            "SELECT t.prompt, u.id FROM rows r JOIN texts t ON t.id = r.text JOIN users u ON u.number = r.user"
        ).fetchall()
    connection.close()
    return {int(prompt.split(" ", 1)[0]): user for prompt, user in found}


def check_file(written: Written, out: Path) -> None:
    """Read a file with and without bad rows: all good rows are in, or nothing is."""
    path, bad = written.path, [line for line, verdict in written.verdicts.items() if verdict is BAD]
    good = [user for user in written.verdicts.values() if user is not BAD]
    if bad:
        with pytest.raises(DataError) as caught:
            prepare(config_of(written), out / "data.sqlite", count_words)
        first, lines = f"{path}:{bad[0]}: ", str(caught.value).splitlines()
        assert len(lines) == 1 and lines[0].startswith(first), (lines, first)
        said = f"(and {len(bad) - 1:,} more bad row" if good else f"(no row is good, of {len(bad):,})"
        assert (good and len(bad) == 1) or said in lines[0], (lines, len(bad))
        str(caught.value).encode()
        assert not list(out.iterdir())
    if len({*good}) == len(good):  # no user has a history and a query
        with pytest.raises(DataError):
            prepare(config_of(written), out / "data.sqlite", count_words, skip_bad_rows=True)
        assert not list(out.iterdir())
        return
    prepare(config_of(written), out / "data.sqlite", count_words, skip_bad_rows=True).close()
    # Lines of CSV are not rows; their numbers in order are.
    numbers = {n: user for n, user in enumerate(written.verdicts.values(), 1) if user is not BAD}
    assert stored(out / "data.sqlite") == numbers
    (out / "data.sqlite").unlink()


def check_rows(folder: Path, seed: int, rows: int) -> int:
    out = folder / "out"
    out.mkdir()
    seen = 0
    for written in hostile_files(folder, seed, rows):
        check_file(written, out)
        seen += len(written.verdicts)
        written.path.unlink()
    return seen


def test_hostile_rows_are_all_in_or_nothing_is(tmp_path: Path) -> None:
    assert check_rows(tmp_path, seed=0, rows=10_000) == 10_000


def test_check_says_it_in_one_line_or_goes_on_without(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for written in hostile_files(tmp_path, seed=0, rows=300, size=100):
        settings = config_of(written).model_dump(include={"data": {"path", "prompt"}, "task": {"kind"}, "split": ...})
        config = tmp_path / "config.yaml"
        config.write_text(yaml.safe_dump(settings), encoding="utf-8")
        good = sum(verdict is not BAD for verdict in written.verdicts.values())
        assert main(["check", str(config)]) == 2
        out, err = capsys.readouterr()
        (said,) = (line for line in err.splitlines() if line.startswith("proper: "))
        assert (out, "Traceback" in err) == ("", False)
        assert said.startswith(f"proper: {written.path}:")
        assert main(["check", str(config), "--skip-bad-rows"]) == 0
        assert f"bad rows  {len(written.verdicts) - good} skipped" in capsys.readouterr().out


def test_interactions_of_one_user_are_all_read_or_none(tmp_path: Path) -> None:
    """As `proper users enrol` and `proper.load(...).users` read them."""
    dice, config = random.Random(2), DataConfig(path="rows.jsonl", prompt="{n} {input}")
    for number in range(4):
        written = json_lines(dice, tmp_path / f"{number}.jsonl", 250)
        read = record_reader(config, TaskConfig(kind=written.kind), "u1")
        with pytest.raises(DataError) as caught:
            read_file(written.path, read)
        assert len(str(caught.value).splitlines()) == 1
        assert str(caught.value).startswith(f"{written.path}:2: user_id: is another user's")
        good = [line for line, user in written.verdicts.items() if user == "u1"]
        lines = written.path.read_bytes().split(b"\n")
        written.path.write_bytes(b"\n".join(line if at in good else b"" for at, line in enumerate(lines, 1)))
        assert [int(each.prompt.split()[0]) for each in read_file(written.path, read)] == good
