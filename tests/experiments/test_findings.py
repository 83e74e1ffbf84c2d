"""The page of findings: it is what the committed results make, and says what they show and no more."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow
import pytest
from pyarrow import parquet

from experiments import data, jobs, queue
from experiments.page import pages
from experiments.questions import QUESTIONS
from experiments.sources import FURTHER

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


def article(user: str, item: str) -> dict[str, Any]:
    same = {"headline": "H", "description": "D", "label": "L"}
    return {"user_id": user, "timestamp": "2020-01-01", "item_id": item, **same}


def parquet_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


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


def test_every_job_has_a_result_on_the_page_or_prepares_one() -> None:
    by_name = {job.name: job for job in jobs.read_queue()}
    read = {source.file for question in QUESTIONS for source in question.sources if "/" in source.file}
    read -= {f"findings/{file}.json" for further in FURTHER.values() for _, file in further}
    assert {f"findings/{job.result.name}" for job in by_name.values() if not job.prepares} == read
    assert [question.number for question in QUESTIONS] == list(range(11))
    for job in by_name.values():
        assert job.minutes <= (120 if job.questions == (0,) else 20) and job.questions, job.name
        assert all(not by_name[name].prepares for name in job.prepares)
        assert job.settings().evaluation.seeds == list(job.seeds)
    assert sum(job.minutes for job in by_name.values()) <= 19 * 60


def test_a_job_is_done_while_settings_data_and_code_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    by_name = {job.name: job for job in jobs.read_queue()}
    job, before = by_name["experts"], by_name["stages-movielens-groups"]
    assert jobs.state(job, by_name) == jobs.state(before, by_name) == "to do"
    settings = jobs.settings_of(job.settings())
    held = {"key": jobs.key_of(job), "key_without_code": jobs.key_of(job, code=False), "settings": settings}
    job.result.write_text(json.dumps(held), encoding="utf-8")
    assert jobs.state(job, by_name) == "done"
    job.result.write_text(json.dumps({**held, "key": "made by other code"}), encoding="utf-8")
    assert jobs.state(job, by_name) == "stale" and jobs.state(job, by_name, keep=True) == "done"
    other = replace(job, seeds=(1,))
    assert jobs.state(other, by_name, keep=True) == "stale"


def test_a_setting_that_is_newer_than_a_result_is_the_same_at_its_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "RESULTS", tmp_path)
    by_name = {job.name: job for job in jobs.read_queue()}
    job = by_name["experts"]
    keys = {"key": jobs.key_of(job), "key_without_code": jobs.key_of(job, code=False)}

    def state_of(settings: dict[str, Any] | None, job: jobs.Job = job) -> str:
        job.result.write_text(json.dumps({**keys, "settings": settings}), encoding="utf-8")
        return jobs.state(job, by_name)

    settings = jobs.settings_of(job.settings())
    groups = {name: value for name, value in settings["groups"].items() if name != "dropout"}
    older = {**settings, "groups": groups}
    assert state_of(settings) == state_of(older) == "done"
    changed = replace(job, changes=(*job.changes, "groups.dropout=0.3"))
    assert changed.folder != job.folder == replace(job, changes=(*job.changes, "groups.dropout=0.05")).folder
    assert state_of(older, changed) == "stale"
    assert state_of({**settings, "groups": {**groups, "dropout": 0.3}}) == "stale", "its default was another one"
    assert state_of({**settings, "groups": {**groups, "gone": 1}}) == "stale", "a setting that no longer exists"
    assert state_of(None) == "stale"


def test_two_tasks_are_two_rows_an_article(tmp_path: Path) -> None:
    news = parquet_of(tmp_path / "news.parquet", [article("ann", "a")])
    path = data.make_data("huffpost-two-tasks", [news], tmp_path / "data")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["input"].splitlines()[-1], row["output"]) for row in rows] == [("Category:", "L"), ("Headline:", "H")]
    assert "L" not in rows[1]["input"].split() and {row["item_id"] for row in rows} == {"a"}
    with pytest.raises(ValueError, match="no data is made by the name 'two'"):
        data.make_data("two", [news], tmp_path / "data")


def test_papers_and_articles_are_made_one_file_in_which_only_huffpost_s_authors_wrote_much(tmp_path: Path) -> None:
    papers = [
        {"user_id": "ann", "timestamp": f"2020-{month:02}", "item_id": f"p{month}", "abstract": "A", "title": "T"}
        for month in range(1, 13)
        for _ in range(2)
    ]
    sources = [
        parquet_of(tmp_path / "papers.parquet", papers),
        parquet_of(tmp_path / "news.parquet", [article("ann", f"a{number}") for number in range(20)]),
    ]
    path = data.make_data("acl-and-headlines", sources, tmp_path / "data")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    of = {user: [row for row in rows if row["user_id"] == user] for user in ("acl-ann", "huffpost-ann")}
    assert len(of["acl-ann"]) + len(of["huffpost-ann"]) == len(rows) == data.PAPERS + 20
    assert {row["item_id"] for row in of["acl-ann"]} == {f"p{month}" for month in range(7, 13)}
    assert {(row["input"].splitlines()[-1], row["output"]) for row in of["acl-ann"]} == {("Title:", "T")}
    assert {(row["input"].splitlines()[-1], row["output"]) for row in of["huffpost-ann"]} == {("Headline:", "H")}


def test_a_job_leaves_what_the_page_needs_and_is_then_done(
    backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for user in ("ann", "bob", "eve"):
            for at in range(16):
                asked, answer = (
                    ("Colour", "red" if user == "ann" else "blue") if at % 2 else ("Name", f"{user} {at % 3}")
                )
                same = {"user_id": user, "timestamp": at // 2, "item_id": f"{user}{at // 2}"}
                file.write(json.dumps({**same, "input": f"thing {at // 2}\n{asked}:", "output": answer}) + "\n")
        file.write(json.dumps({"user_id": "ann", "timestamp": 9, "item_id": "x", "input": "?", "output": ""}) + "\n")
    settings = {
        "data": {"path": rows.name},  # from where it is run, as in configs/
        "task": {"max_new_tokens": 3},
        "backbone": str(backbone_folder),
        "compute": {"dtype": "fp32", "max_length": 64, "device": "cpu"},
        "split": {"min_history": 3, "queries": 0.3},
        "population": {"epochs": 1},
        "groups": {"epochs": 1, "user_embedding": 16},
        "evaluation": {"resamples": 100},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for module in (jobs, queue):
        monkeypatch.setattr(module, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(jobs, "RESULTS", tmp_path / "results")
    changed = "groups[groups.experts=2]"
    job = jobs.Job(
        **{
            "name": "tried",
            "run": "tiny",
            "config": str(tmp_path / "config.yaml"),
            "sources": (str(rows),),
            "made": None,
        },
        **{
            "seeds": (0, 1),
            "minutes": 1,
            "methods": ("user-majority", "population", "groups", changed),
            "stages": ("population", "groups"),
        },
        **{"questions": (3,), "against": ("population",), "slice": "bottom-100", "routing": True},
        tasks=(("Colour", "classification"), ("Name", "generation")),
        skip_bad_rows=True,
    )
    queue.run_job(job)
    found = json.loads(job.result.read_text(encoding="utf-8"))
    assert jobs.state(job, {"tried": job}) == "done"
    # Once a seed, and not once more for the routing figures.
    assert (tmp_path / "runs" / "tried.log").read_text(encoding="utf-8").count("trains groups") == 2
    assert {row["metric"] for row in found["metrics"]} >= {"rouge1", "rougeL", "loss", "style_prefix"}
    pairs = [(row["method"], row["against"]) for row in found["comparisons"] if row["metric"] == "rouge1"]
    assert sorted(pairs) == sorted(
        [("groups", "population"), ("groups", changed), (changed, "population")]
        + [("groups", "user-majority"), ("user-majority", "population")]
        + [("groups", "lead"), ("population", "lead")]
    )
    assert list(found["routing_of"]) == ["groups", changed]
    assert [found["routing_of"][name]["experts"] for name in found["routing_of"]] == [5, 2]
    of_slice = [(row["metric"], row["method"]) for row in found["slice"]["metrics"]]
    trained = [method for method in job.methods if method != "user-majority"]
    assert of_slice == [
        *(("rouge1", method) for method in (*job.methods, "lead")),
        *(("loss", method) for method in trained),
    ]
    queries = [found["tasks"][asked]["metrics"][0]["queries"] for asked in ("Colour", "Name")]
    assert sum(queries) == found["task"]["queries"] and min(queries) > 0
    assert found["tasks"]["Colour"]["metrics"][0]["metric"] == "accuracy"
    assert str(tmp_path) not in json.dumps({**found, "run": {**found["run"], "backbone": ""}, "config": ""})


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
