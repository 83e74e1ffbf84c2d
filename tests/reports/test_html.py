"""The whole page: what each section says, that it is closed to the network, and that hostile text stays text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proper.errors import RunFolderError
from proper.reports import write_report

Render = Callable[[], Any]
Change = Callable[[Callable[[dict[str, Any]], None]], None]
OPTIONAL = ["metrics.jsonl", "routing.json", "users.json", "predictions"]
SECTIONS = ["stages", "scores", "gains", "examples", "routing", "curves", "signatures", "truth", "tiers", "cost", "run"]


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_every_section_is_there_and_complete(render: Render) -> None:
    page = render()
    assert not page.open, "unclosed tags"
    for section in SECTIONS:
        assert "Not available" not in page.text[section], section


def test_headline_tells_a_clear_gain_from_one_that_is_not(render: Render) -> None:
    header = render().text["header"]
    assert "Groups: a measurable gain; users: no measurable gain." in header
    assert "Accuracy rose from 0.512 to 0.583 (difference +0.071" in header
    assert "[+0.030, +0.110], p < .001, Holm-adjusted" in header
    assert "No measurable gain: accuracy rose from 0.583 to 0.641" in header
    assert "p = .062" in header
    assert "0.512 → 0.583 → 0.641" in header


def test_the_first_chart_shows_stages_with_intervals_and_no_other_method(render: Render) -> None:
    page = render()
    assert "accuracy (higher is better)" in page.text["stages"]
    for value in ("0.210", "0.512", "0.583", "0.641", "+13.9 %", "(+9.9 %)"):
        assert value in page.text["stages"]
    assert "Groups\naccuracy 0.583\n95 % [0.543, 0.623]" in page.tips["stages"]
    assert "OPPU" not in page.text["stages"]


def test_methods_that_are_no_stages_are_no_steps_of_the_headline(render: Render, change: Callable[..., None]) -> None:
    change(lambda results: results.update(metrics=[r for r in results["metrics"] if r["method"] in ("base", "oppu")]))
    assert not re.search(r"[\d.]+ → [\d.]+", render().text["header"])


def test_one_seed_is_counted_as_one(render: Render, change: Callable[..., None]) -> None:
    change(lambda results: [row.update(seeds=1) for row in results["metrics"]])
    assert "All over 60 users, 300 queries, 1 seed." in render().text["scores"]


def test_tables_hold_every_score_and_comparison(render: Render) -> None:
    page = render()
    text = page.text["scores"]
    for said in ("OPPU0.590–", "[0.472, 0.552]", "Groups − Population", "+0.058", "not significant", "better"):
        assert said in text
    assert "All over 60 users, 300 queries, 2 seeds." in text
    assert "paired permutation over users" in text
    text = page.text["history"]
    assert "10 to 19" in text and "0.432 [0.400, 0.800]" in text


def test_each_user_has_a_bar_and_a_dot_for_each_step(render: Render) -> None:
    page = render()
    # 60 users in the user step, 59 with a known gain in the group step; a bar's group and a dot each.
    assert len(page.tips["gains"]) == 2 * 60 + 2 * 59
    assert any(tip.startswith("user u59\ngain ") and "history 311 items" in tip for tip in page.tips["gains"])
    assert "12 users are served without an adapter" in page.text["gains"]
    assert "shortest histories (10 to 30 items)" in page.text["gains"]


def test_gain_counts_equal_the_file(render: Render, folder: Path) -> None:
    gains = [row["gain_users"] for row in json.loads((folder / "users.json").read_text())["users"]]
    up, down = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    text = render().text["gains"]
    assert f"Of 60 users, {up} gained, {down} lost and {60 - up - down} stayed the same." in text


def test_heat_map_and_map_show_everybody(render: Render) -> None:
    page = render()
    columns = [tip for tip in page.tips["routing"] if "expert 4: " in tip]
    assert len(columns) == 60 and page.count("g", class_="cells") == 1
    # One user has no place on the map, which is drawn by expert and by true group.
    placed = [tip for tip in page.tips["routing"] if "true group" in tip]
    assert len(placed) == 2 * 59
    assert "Entropy of users' mean gates 1.21 of 1.61 nats" in page.text["routing"]
    assert "0.432 nats" in page.text["routing"] and "0.712" in page.text["routing"]
    assert "true group 4" in page.text["routing"]


def test_no_second_map_without_true_groups(render: Render, folder: Path) -> None:
    routing = json.loads((folder / "routing.json").read_text())
    for user in routing["users"]:
        user["group"] = None
    (folder / "routing.json").write_text(json.dumps(routing))
    assert "true group" not in render().text["routing"]


def test_curves_of_all_stages_and_the_constraint(render: Render) -> None:
    page = render()
    titles = ["1 · Population", "2 · Groups", "2 · Groups: constraint", "3a · Users", "3b · LoRA-aware router"]
    assert all(title in page.text["curves"] for title in titles)
    assert page.count("g", class_="line") == 2 * len(titles)  # two seeds
    assert any("epoch" in tip and "learning rate" in tip for tip in page.tips["curves"])


def test_phases_of_a_stage_are_drawn_apart(render: Render, folder: Path) -> None:
    rows = [
        {"stage": "users", "seed": 0, "phase": f"users: {phase}", "step": step, "loss": loss}
        for phase, loss in (("trial", 3.0), ("final", 2.0))
        for step in (1, 2, 2)
    ]
    rows.append({"stage": "groups", "seed": 0, "step": 1, "loss": 1.0, "penalty": 0.0095})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    text = render().text["curves"]
    assert "3a · Users, trial" in text and "3a · Users, final" in text
    assert "3.000 in the first tenth, 3.000 in the last, over 2 steps." in text
    assert "constraint loss × weight" in text


def test_a_curve_is_told_from_begin_to_end_of_every_seed(render: Render, folder: Path) -> None:
    rows = [
        {"stage": "population", "seed": seed, "step": step, "loss": (3.0 if step <= 10 else 2.0) + seed}
        for seed in (0, 1)
        for step in range(1, 101)
    ]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    said = "3.500 in the first tenth, 2.500 in the last, over 100 steps of each of 2 seeds."
    assert said in render().text["curves"]


def test_signatures_truth_tiers_cost_and_run(render: Render) -> None:
    text = render().text
    assert "Stage 3 is worse than stage 2 for 9 of 60 users & <i>more</i>." in text["signatures"]
    assert "0.88 of 1 (the groups were found)" in text["truth"]
    assert "Population → Groups52 %" in text["truth"] and "Groups → Users−4 %" in text["truth"]
    assert "Users: 44 (73 %)" in text["tiers"] and "no gain on own history – 14 users" in text["tiers"]
    assert "a million users would need 24.7 GB" in text["cost"] and "12,345" in text["cost"]
    assert "proper-nano" in text["run"] and "median 42" in text["run"] and "1" in text["run"]


def test_no_signatures_found_is_not_the_same_as_not_looked_for(folder: Path, render: Render, change: Change) -> None:
    change(lambda results: results.update(signatures=[]))
    said = "None: expert mixtures do not overlap and no user is worse with their own adapter."
    assert said in render().text["signatures"], "no loss of users was measured"
    change(lambda results: results.update(routing={}))
    assert "None: no user is worse with their own adapter." in render().text["signatures"]
    (folder / "users.json").unlink()
    assert "None; routing and user adapters were not evaluated." in render().text["signatures"]
    change(lambda results: results.pop("signatures"))
    assert "Not available" in render().text["signatures"]


def test_examples_are_escaped_and_turn_with_their_language(render: Render) -> None:
    page = render()
    assert "<script>window.hacked = 1</script>" in page.text["examples"]
    assert "مرحبا" in page.text["examples"] and "🎉" in page.text["examples"]
    assert page.count("div", class_="prompt", dir="auto") == 8
    assert page.count("script") == 1 and page.count("img") == 0
    assert any("user <b>u3</b>" in tip for tip in page.tips["gains"])


def test_nothing_is_loaded_from_anywhere(render: Render, folder: Path) -> None:
    page = render()
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
            assert attributes.get(name, "#").startswith(("#", "data:,")), (tag, attributes)
    html = (folder / "report.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", html, re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert len(html) < 5_000_000


def test_no_nan_none_or_infinity_in_sight(render: Render, folder: Path) -> None:
    page = render()
    values = [v for _, attributes in page.tags for name, v in attributes.items() if name != "content"]
    for value in [*page.text.values(), *values]:
        assert not re.search(r"\b(nan|NaN|inf|Infinity|undefined)\b", value)
        assert "None" not in value.replace("None found", "")


def test_not_a_number_in_the_files_is_a_gap(render: Render, folder: Path) -> None:
    for name in ("results.json", "users.json", "routing.json"):
        path = folder / name
        path.write_text(re.sub(r"0\.583|-?0\.0\d\d(?=[,}\]])", "NaN", path.read_text()))
    test_no_nan_none_or_infinity_in_sight(render, folder)


@pytest.mark.parametrize("name", OPTIONAL)
def test_one_missing_file_is_said_and_the_rest_stands(render: Render, folder: Path, name: str) -> None:
    whole = render().text
    remove(folder / name)
    text = render().text
    silent = {section for section in SECTIONS if "Not available" in text[section]}
    told = {"metrics.jsonl": "curves", "routing.json": "routing", "users.json": "gains", "predictions": "examples"}
    assert silent == {told[name]}
    assert all(text[section] == whole[section] for section in SECTIONS if section not in silent)


def test_results_alone_are_enough(render: Render, folder: Path) -> None:
    for name in OPTIONAL:
        remove(folder / name)
    (folder / "results.json").write_text('{"schema": 1}')
    page = render()
    assert all("Not available" in page.text[section] for section in SECTIONS)
    assert "The stages were not compared" in page.text["header"]


def test_results_that_are_missing_or_broken_are_named(folder: Path) -> None:
    path = folder / "results.json"
    path.write_text('{"schema": 1,\n oops')
    with pytest.raises(RunFolderError, match=r"results\.json:2: not readable as JSON"):
        write_report(folder)
    for damaged in (b"\xff", b"[" * 100_000, b"1" * 5_000):
        path.write_bytes(damaged)
        with pytest.raises(RunFolderError, match=r"results\.json: not readable as JSON"):
            write_report(folder)
    path.unlink()
    with pytest.raises(RunFolderError, match=r"results\.json: no such file; run: proper evaluate .* \(once"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_line_cut_off_at_the_end_is_left_out_and_one_inside_is_named(render: Render, folder: Path) -> None:
    path = folder / "metrics.jsonl"
    whole = render().text["curves"]
    lines = path.read_text()
    path.write_text(lines + '{"stage": "users", "st')
    assert render().text["curves"] == whole
    for damaged in (b'{"stage"', b'{"stage": "\xff"}', b"[" * 100_000, b"1" * 5_000):
        path.write_bytes(damaged + b"\n" + lines.encode())
        with pytest.raises(RunFolderError, match=r"metrics\.jsonl:1: not readable"):
            render()


def test_the_same_files_give_the_same_page(folder: Path) -> None:
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first


def test_the_config_says_how_many_examples(render: Render, folder: Path) -> None:
    (folder / "config.yaml").write_text("evaluation: {examples: 0}\n")
    assert "evaluation.examples to 0" in render().text["examples"], "not that all answers are the same"
    (folder / "config.yaml").write_text("evaluation: {examples: 3}\n")
    assert render().count("article") == 3
