"""The jobs of the findings: when one is done, the data that is made for some, and what a job leaves for the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow
import pytest
from pyarrow import parquet

from experiments import data, jobs, queue
from experiments.questions import QUESTIONS
from experiments.sources import FURTHER

if TYPE_CHECKING:
    from tests.experiments.conftest import MakeJob


def article(user: str, item: str) -> dict[str, Any]:
    same = {"headline": "H", "description": "D", "label": "L"}
    return {"user_id": user, "timestamp": "2020-01-01", "item_id": item, **same}


def parquet_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


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
    assert sum(job.minutes for job in by_name.values()) <= 20 * 60


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


def rows_of_two_tasks() -> Iterator[dict[str, Any]]:
    """Yield rows of three users, who are asked for a colour and a name in turn, and a row that is skipped."""
    for user in ("ann", "bob", "eve"):
        for at in range(16):
            asked, answer = ("Colour", "red" if user == "ann" else "blue") if at % 2 else ("Name", f"{user} {at % 3}")
            same = {"user_id": user, "timestamp": at // 2, "item_id": f"{user}{at // 2}"}
            yield {**same, "input": f"thing {at // 2}\n{asked}:", "output": answer}
    yield {"user_id": "ann", "timestamp": 9, "item_id": "x", "input": "?", "output": ""}


def test_a_job_leaves_what_the_page_needs_and_is_then_done(make_job: MakeJob, tmp_path: Path) -> None:
    changed = "groups[groups.experts=2]"
    job = make_job(
        rows_of_two_tasks(),
        {
            "task": {"max_new_tokens": 3},
            "groups": {"epochs": 1, "user_embedding": 16},
            "evaluation": {"resamples": 100},
        },
        name="tried",
        seeds=(0, 1),
        methods=("user-majority", "population", "groups", changed),
        stages=("population", "groups"),
        questions=(3,),
        against=("population",),
        slice="bottom-100",
        routing=True,
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
