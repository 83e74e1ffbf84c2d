"""The page of findings: it is what the committed results make, and says what they show and no more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from experiments.page import pages

ROOT = Path(__file__).parents[2]
CONTROLS = (("groups", "population-more"), ("groups", "groups-shared-e"), ("users", "swapped"), ("users", "shuffled"))


def row(method: str, value: float) -> dict[str, Any]:
    ci95 = [value - 0.1, value + 0.1]
    return {
        **{"method": method, "metric": "mae", "value": value, "ci95": ci95, "users": 9, "queries": 90},
        **{"primary": True, "by_seed": [value, value + 0.01]},
    }


def test(method: str, against: str, difference: float, p: float, resolvable: float = 0.05) -> dict[str, Any]:
    return {
        **{"method": method, "against": against, "metric": "mae", "difference": difference, "p_value": p},
        **{"ci95": [difference - 0.02, difference + 0.02], "resolvable": resolvable, "higher_is_better": False},
    }


test.__test__ = False  # type: ignore[attr-defined]


def write(folder: Path, name: str, rows: list[dict[str, Any]], tests: list[dict[str, Any]], **more: Any) -> None:
    (folder / "findings").mkdir(exist_ok=True)
    text = json.dumps({"metrics": rows, "comparisons": tests, **more})
    (folder / "findings" / f"{name}.json").write_text(text, encoding="utf-8")


def section(text: str, number: int) -> str:
    return text.split(f"\n## {number}. ")[1].split("\n## ")[0]


def test_the_committed_page_is_what_the_committed_results_make() -> None:
    made = pages(ROOT / "docs" / "results")
    for path, text in made.items():
        assert (ROOT / "docs" / path).read_text(encoding="utf-8") == text, f"{path}: run python -m experiments page"
    figures = {f"findings/{path.name}" for path in (ROOT / "docs" / "findings").glob("*.svg")}
    assert figures == set(made) - {"findings.md"}


def test_what_was_not_run_is_said_with_its_command(tmp_path: Path) -> None:
    made = pages(tmp_path)
    assert list(made) == ["findings.md"]
    for number in range(11):
        asked = section(made["findings.md"], number)
        assert "Not run yet: " in asked and "```console\n$ " in asked and "**" not in asked


def test_personalization_is_claimed_only_where_every_control_is_beaten(tmp_path: Path) -> None:
    rows = [row(name, 0.7) for name in ("groups", "users", "population-more", "groups-shared-e", "swapped", "shuffled")]
    beaten = [test(*pair, -0.1, 0.001) for pair in CONTROLS]
    write(tmp_path, "controls-movielens", rows, beaten)
    said = section(pages(tmp_path)["findings.md"], 10)
    assert "On movielens-rating every control is beaten" in said
    for place, pair in enumerate(CONTROLS):
        for other in (test(*pair, -0.1, 0.04), test(*pair, 0.1, 0.001), test(*pair, -0.01, 0.8)):
            write(tmp_path, "controls-movielens", rows, [*beaten[:place], other, *beaten[place + 1 :]])
            said = section(pages(tmp_path)["findings.md"], 10)
            # .04 alone of four: Holm leaves the largest p of a family as it is.
            claimed = other["p_value"] == 0.04
            assert ("every control is beaten" in said) == claimed
            assert ("personalization is not claimed" in said) != claimed
        write(tmp_path, "controls-movielens", rows, beaten[:place] + beaten[place + 1 :])
        assert "no claim yet" in section(pages(tmp_path)["findings.md"], 10)
    write(tmp_path, "controls-movielens", rows, [*beaten[:2], *(test(*pair, -0.1, 0.04) for pair in CONTROLS[2:])])
    assert "every control is beaten" not in section(pages(tmp_path)["findings.md"], 10)


def test_a_grid_turns_comparisons_and_corrects_for_their_number(tmp_path: Path) -> None:
    changed = {value: f"groups[groups.experts={value}]" for value in (1, 2, 8)}
    rows = [row("population", 0.9), row("groups", 0.8), *(row(name, 0.85) for name in changed.values())]
    # As runs write them: the default against the others.
    tests = [test("groups", changed[1], -0.05, 0.001), test("groups", changed[2], -0.05, 0.03)]
    write(tmp_path, "experts", rows, [*tests, test("groups", changed[8], 0.01, 0.9)])
    made = pages(tmp_path)
    said = section(made["findings.md"], 3)
    assert "Worse than the default (E = 5): Groups, E = 1. No value beats the default." in said
    assert "+0.050 [+0.030, +0.070] against Groups | .003 | worse |" in said
    assert "| .060 | no difference shown |" in said
    assert "−0.010 [−0.030, +0.010] against Groups | .900 | not resolvable here |" in said
    ElementTree.fromstring(made["findings/q3.svg"])


def test_the_loss_is_a_second_look_and_claims_nothing_by_itself(tmp_path: Path) -> None:
    names = ("groups", "population-more", "groups-shared-e")
    rows = [row(name, 0.7) for name in names]
    losses = [{**row(name, 0.5), "metric": "loss", "primary": False} for name in names]
    tests = [test("groups", other, -0.01, 0.8) for other in names[1:]]
    by_loss = [{**test("groups", other, -0.1, 0.001), "metric": "loss"} for other in names[1:]]
    write(tmp_path, "groups-controls", rows + losses, tests + by_loss)
    said = section(pages(tmp_path)["findings.md"], 10)
    bold = next(line for line in said.splitlines() if line.startswith("**"))
    second = next(line for line in said.splitlines() if line.startswith("By the loss"))
    assert "personalization is not claimed" in bold and "every control is beaten" not in bold
    # Controls of a stage that was not trained are not missing.
    assert "every control is beaten" in second and "was not run" not in second
    write(tmp_path, "groups-controls", rows, tests)
    assert "By the loss" not in section(pages(tmp_path)["findings.md"], 10)


def test_style_is_compared_by_the_mean_match_and_a_result_without_it_has_no_such_list(tmp_path: Path) -> None:
    names = ("users", "groups", "population")
    rows = [row(name, 0.3) for name in names]
    styles = [{**row(name, 0.7), "metric": metric} for name in names for metric in ("style_match", "style_prefix")]
    tests = [test("groups", "population", 0.01, 0.8), test("users", "groups", 0.01, 0.8)]
    by_style = [{**one, "metric": "style_match", "p_value": p} for one, p in zip(tests, (0.01, 0.04), strict=True)]
    prefix = [{**one, "metric": "style_prefix", "p_value": 0.001} for one in tests]
    write(tmp_path, "main-git-subject", rows + styles, tests + by_style + prefix)
    said = section(pages(tmp_path)["findings.md"], 0)
    listed = said.partition("Each difference in style")[2].partition("</details>")[0]
    # Holm over the two steps of this measure alone, as for the main metric; other measures are not listed.
    assert "p = .020" in listed and "p = .040" in listed and listed.count("\n- ") == 2
    write(tmp_path, "main-git-subject", rows, tests)
    assert "Each difference in style" not in section(pages(tmp_path)["findings.md"], 0)


def test_other_metrics_stand_in_a_folded_table(tmp_path: Path) -> None:
    names = ("users", "groups", "population", "user-majority")
    more = [{**row(name, 0.25), "metric": "rmse", "primary": False} for name in names]
    losses = [{**row(name, 0.5), "metric": "loss", "primary": False} for name in names[:3]]
    write(tmp_path, "main-movielens-rating", [row(name, 0.7) for name in names] + more + losses, [])
    said = section(pages(tmp_path)["findings.md"], 0)
    assert "| method | root mean squared error | answer loss |" in said
    assert "| Users | 0.250 | 0.500 |" in said and "| User's majority answer | 0.250 | – |" in said
    write(tmp_path, "main-movielens-rating", [row(name, 0.7) for name in names], [])
    assert "other metrics" not in section(pages(tmp_path)["findings.md"], 0)


def test_whose_prompts_were_cut_is_said_and_nothing_is_divided_by_zero(tmp_path: Path) -> None:
    rows = [row("users", 0.7), row("end-to-end", 0.0)]
    cost = [{"method": "users", "truncated_prompts": 4}, {"method": "end-to-end", "truncated_prompts": 0}]
    write(tmp_path, "progressive-movielens", rows, [test("users", "end-to-end", 0.7, 0.001)], cost=cost)
    said = section(pages(tmp_path)["findings.md"], 2)
    assert "Prompts cut to `compute.max_length`, of 90: Users 4." in said
    assert "+0.700 mean absolute error" in said and "relative" not in said and "nan" not in said


def test_curves_are_drawn_over_the_items_kept(tmp_path: Path) -> None:
    for items in (1, 20):
        names = [f"{name}[history={items}]" for name in ("users", "groups", "oppu")]
        tests = [test(names[0], names[1], -0.1, 0.001), test(names[0], names[2], 0.1, 0.001)]
        write(tmp_path, f"short-{items}", [row(name, 0.7) for name in names], tests)
    made = pages(tmp_path)
    said = section(made["findings.md"], 7)
    assert "1 item: Users beats Groups and loses to OPPU." in said and "Not run yet: 5 items, bottom 100." in said
    figure = ElementTree.fromstring(made["findings/q7.svg"])
    lines = [group[0] for group in figure.iter() if group.get("class") == "line"]
    assert len(lines) == 3 and all(mark.get("d", "").count("L") == 1 for mark in lines)
    tips = [title.text for title in figure.iter() if title.tag.endswith("title")]
    assert "OPPU, 20: 0.700 [0.600, 0.800]" in tips and len(tips) == 2 * 3 * 2


def test_the_main_table_names_every_row_that_the_user_s_model_does_not_beat(tmp_path: Path) -> None:
    values = {"global-majority": 0.7, "population": 0.8, "groups": 0.6, "users": 0.59, "prior": 0.9, "head+prior": 0.5}
    rows = [row(name, value) for name, value in values.items()]
    steps = [test("groups", "population", -0.1, 0.001), test("users", "groups", -0.01, 0.5)]
    others = [test("users", "prior", -0.21, 0.001), test("users", "head+prior", 0.09, 0.001)]
    undecided = test("users", "global-majority", -0.01, 0.9)
    below = test("population", "global-majority", 0.1, 0.001)
    write(tmp_path, "main-movielens-rating", rows, [*steps, *others, undecided, below])
    said = section(pages(tmp_path)["findings.md"], 0)
    assert "the best constant, on 0 of 1 sets." in said and "compared with on 0 of 1 sets." in said
    assert "needs no model on 0 of 1 sets." in said
    lost = "Global majority answer, Linear head and prior (better)"
    assert f"| movielens-rating | −14 % | +25 % | +1.7 % (not significant) | {lost} | – |" in said
    write(tmp_path, "main-movielens-rating", rows, [*steps, *others])
    assert "needs no model on 1 of 1 sets (movielens-rating)." in section(pages(tmp_path)["findings.md"], 0)


def test_the_main_table_counts_a_set_only_if_its_rivals_are_beaten_too(tmp_path: Path) -> None:
    values = {"global-majority": 1.0, "population": 0.9, "groups": 0.8, "users": 0.6, "prior": 0.9, "oppu": 0.61}
    rows = [row(name, value) for name, value in values.items()]
    steps = [test("groups", "population", -0.1, 0.001), test("users", "groups", -0.1, 0.001)]
    won = [test("users", "prior", -0.2, 0.001), test("population", "global-majority", -0.1, 0.001)]
    write(tmp_path, "main-movielens-rating", rows, [*steps, *won])
    before = section(pages(tmp_path)["findings.md"], 0)
    assert "the best constant, on 1 of 1 sets (movielens-rating)" in before
    assert "compared with on 1 of 1 sets (movielens-rating)" in before
    write(tmp_path, "main-movielens-rating", rows, [*steps, *won, test("users", "oppu", -0.01, 0.4)])
    after = section(pages(tmp_path)["findings.md"], 0)
    assert "each significantly and over a population that beats the best constant, on 1 of 1 sets" in after
    assert "compared with on 0 of 1 sets." in after
    assert "| movielens-rating | +10.0 % | +11 % | +25 % | OPPU | – |" in after


def test_each_form_of_users_is_compared_with_every_row(tmp_path: Path) -> None:
    values = {
        "global-majority": 1.0,
        "population": 0.9,
        "groups": 0.8,
        "users": 0.6,
        "head+prior": 0.6,
        "users+head": 0.5,
    }
    rows = [row(name, value) for name, value in values.items()]
    steps = [test("groups", "population", -0.1, 0.001), test("users", "groups", -0.2, 0.001)]
    undecided = test("users", "head+prior", 0.0, 0.9)
    won = [test("users+head", other, -0.1, 0.001) for other in ("users", "head+prior", "global-majority")]
    write(tmp_path, "main-movielens-rating", rows, [*steps, undecided, *won])
    said = section(pages(tmp_path)["findings.md"], 0)
    assert "Users beats every row that it was compared with on 0 of 1 sets." in said
    assert "Users and linear head beats every row that it was compared with on 1 of 1 sets (movielens-rating)." in said
    assert "| Linear head and prior | none |" in said


def test_the_main_table_counts_no_gain_over_a_population_that_does_not_beat_the_best_constant(tmp_path: Path) -> None:
    values = {"global-majority": 0.9, "population": 0.9, "groups": 0.8, "users": 0.6}
    rows = [row(name, value) for name, value in values.items()]
    steps = [test("groups", "population", -0.1, 0.001), test("users", "groups", -0.2, 0.001)]
    undecided = test("population", "global-majority", 0.0, 0.9)
    write(tmp_path, "main-movielens-rating", rows, [*steps, undecided])
    assert "the best constant, on 0 of 1 sets." in section(pages(tmp_path)["findings.md"], 0)


def test_the_main_table_counts_no_gain_below_the_goal(tmp_path: Path) -> None:
    values = {"global-majority": 1.0, "population": 0.9, "groups": 0.87, "users": 0.7}
    steps = [test("groups", "population", -0.03, 0.001), test("users", "groups", -0.17, 0.001)]
    write(tmp_path, "main-movielens-rating", [row(name, value) for name, value in values.items()], steps)
    assert "the best constant, on 0 of 1 sets." in section(pages(tmp_path)["findings.md"], 0)
