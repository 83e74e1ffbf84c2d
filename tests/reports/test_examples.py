"""Which queries are shown: wins and losses of both steps, the clearest first, always the same ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proper.reports.examples import choose_examples, score

STAGES = ("population", "groups", "users")


def write(folder: Path, kind_rows: list[tuple[str, str, tuple[str, ...]]], stages: tuple[str, ...] = STAGES) -> None:
    """One line a query and stage from (user, target, what each stage said)."""
    (folder / "predictions").mkdir(exist_ok=True)
    for place, method in enumerate(stages):
        rows = [
            {"id": n, "user": user, "prompt": f"p{n}", "target": target, "prediction": said[place], "tier": "users"}
            for n, (user, target, said) in enumerate(kind_rows)
        ]
        (folder / "predictions" / f"{method}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.mark.parametrize(
    ("kind", "target", "said", "expected"),
    [
        ("classification", "a", " a\n", 1.0),
        ("classification", "a", "A", 0.0),
        ("rating", "4", "2.5", -1.5),
        ("rating", "4", "four", -9.0),
        ("rating", "4", "nan", -9.0),
        ("generation", "The cat sat", "the CAT ran", 2 / 3),
        ("generation", "", "", 0.0),
    ],
)
def test_score(kind: str, target: str, said: str, expected: float) -> None:
    assert score(kind, target, said) == pytest.approx(expected)


def test_wins_and_losses_take_turns(tmp_path: Path) -> None:
    rows = [(f"u{n}", "a", ("b", "b", "a")) for n in range(20)]
    rows += [("x", "a", ("a", "a", "b")), ("y", "a", ("b", "a", "a")), ("z", "a", ("a", "b", "b"))]
    write(tmp_path, rows)
    chosen = choose_examples(tmp_path, "classification", 6)
    assert chosen is not None
    whys = [example.why for example in chosen]
    assert set(whys[:4]) == {f"The {who} model {how}" for who in ("user", "group") for how in ("wins", "loses")}
    assert len({example.user for example in chosen}) == 6
    loses = next(example for example in chosen if example.user == "x")
    assert [(answer.text, answer.verdict) for answer in loses.answers] == [
        ("a", "right"),
        ("a", "right"),
        ("b", "wrong"),
    ]


def test_the_clearest_comes_first(tmp_path: Path) -> None:
    write(tmp_path, [(f"u{n}", "5", ("1", "1", str(n))) for n in range(1, 6)])
    chosen = choose_examples(tmp_path, "rating", 3)
    assert chosen is not None
    assert [example.answers[-1].text for example in chosen] == ["5", "4", "3"]
    assert chosen[1].answers[-1].verdict == "off by 1"


def test_one_user_fills_up_where_there_is_nobody_else(tmp_path: Path) -> None:
    write(tmp_path, [("only", "a", ("b", "b", "a"))] * 5)
    chosen = choose_examples(tmp_path, "classification", 4)
    assert chosen is not None and len(chosen) == 4


def test_equal_answers_are_not_examples(tmp_path: Path) -> None:
    write(tmp_path, [("u", "a", ("a", "a", "a")), ("v", "a", ("b", "b", "b"))])
    assert choose_examples(tmp_path, "classification", 4) == []


def test_other_wrong_answers_are_shown_last(tmp_path: Path) -> None:
    write(tmp_path, [("u", "a", ("b", "c", "d")), ("v", "a", ("b", "b", "a"))])
    chosen = choose_examples(tmp_path, "classification", 4)
    assert chosen is not None
    assert [example.why for example in chosen] == ["The user model wins", "Different text, same score"]


def test_two_stages_are_enough_and_one_is_not(tmp_path: Path) -> None:
    write(tmp_path, [("u", "a", ("b", "a"))], ("population", "groups"))
    chosen = choose_examples(tmp_path, "classification", 4)
    assert chosen is not None and [example.why for example in chosen] == ["The group model wins"]
    (tmp_path / "predictions" / "groups.jsonl").unlink()
    assert choose_examples(tmp_path, "classification", 4) is None


def test_a_query_that_one_stage_lacks_is_left_out_and_later_seeds_are_ignored(tmp_path: Path) -> None:
    write(tmp_path, [("u", "a", ("b", "b", "a")), ("v", "a", ("b", "b", "a"))])
    path = tmp_path / "predictions" / "groups.jsonl"
    first = path.read_text().splitlines()[0]
    path.write_text(first + "\n" + first.replace('"prediction": "b"', '"prediction": "later seed"') + "\n")
    chosen = choose_examples(tmp_path, "classification", 4)
    assert chosen is not None and [example.user for example in chosen] == ["u"]
    assert chosen[0].answers[1].text == "b"
