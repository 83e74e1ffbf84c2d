"""Run report: one self-contained HTML file that opens offline.

Gathers sentences, tables, figures and examples for the template. No model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from proper.files import write_text
from proper.reports import charts, figures, formats, methods, narrative, svg, tables
from proper.reports.curves import curves, history_curves
from proper.reports.examples import choose_examples, task_kinds
from proper.reports.load import RunFiles, load_run
from proper.reports.reading import mapping, number
from proper.run_folder import STAGE_METHODS, STEPS, Personal, RunFolder


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder, atomically, and return its path.

    Only `results.json` is required; a section whose file or key is missing says so.

    Raises:
        RunFolderError: results.json is missing, or a file is not JSON; the message names file and line.
        ProperError: the report cannot be written.
    """
    run = load_run(folder)
    path = RunFolder(folder).report
    write_text(path, render("report.html.j2", gather(run)))
    return path


def render(template: str, values: Mapping[str, Any]) -> str:
    """Return the rendered page; text is escaped, and a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("proper.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = {"method_name": formats.method_name, "key": charts.key, "palette": svg.PALETTE}
    return environment.get_template(template).render({**shared, **values})


def gather(run: RunFiles) -> dict[str, Any]:
    """Return the template's values, section by section."""
    summary, steps = narrative.headline(run)
    kind = str(run.part("task").get("kind") or "")
    routing, truth, tiers = run.part("routing"), run.part("truth"), run.part("tiers")
    return {
        "title": _title(run, kind),
        "summary": summary,
        "steps": steps,
        "tiles": _tiles(run),
        "main_metrics": _main_metrics(run),
        "methods": methods.methods_table(run),
        "claim": _claims(run),
        "cost_quality": methods.cost_quality(run),
        "metrics": tables.metrics(run),
        "comparisons": tables.comparisons(run),
        "slices": tables.slices(run),
        "history": history_curves(run),
        "ablations": methods.ablations(run),
        "curves": curves(run.curves),
        "heat": figures.heat(run.routed),
        "maps": figures.maps(run.routed),
        "groups": tables.groups(run),
        "task_experts": tables.task_experts(run),
        "routing": narrative.routing_story(routing),
        "gains": _gains(run),
        "wanted_examples": run.examples,
        "examples": choose_examples(run.folder, kind, run.examples, task_kinds(run)),
        "signatures": _sentences(run.results.get("signatures")),
        "no_signatures": _no_signatures(run),
        "cost": tables.cost(run),
        "cost_words": narrative.cost_story(run.rows("cost")),
        "tiers": tables.tiers(tiers) if tiers else None,
        "truth": narrative.truth_story(truth),
        "truth_shares": _shares(truth),
        "truth_table": tables.truth(truth),
        "metadata": tables.metadata(run),
    }


def _title(run: RunFiles, kind: str) -> str:
    task = ", ".join(filter(None, run.tasks)) or run.part("task").get("name") or kind or run.folder.name
    backbone = run.part("run").get("backbone")
    return f"{task} on {Path(str(backbone)).name}" if backbone else str(task)


def _tiles(run: RunFiles) -> list[tuple[str, str]]:
    """Return the key figures of the result: main metric by stage, users and queries."""
    rows = narrative.primary_metrics(run) if run.metrics else []
    tiles = []
    for task in dict.fromkeys(row.task for row in rows):
        values = {row.method: formats.plain(row.value) for row in rows if row.task == task}
        stages = [values[method] for method in STAGE_METHODS[1:] if method in values]
        name = formats.metric_name(next(row.metric for row in rows if row.task == task))
        title = formats.of_task(task if run.first_task else "", name)
        if stages:
            tiles.append((title, " → ".join(stages)))
    for title, key in (("target users", "target_users"), ("held-out queries", "queries")):
        for task, metadata in tables.sizes(run).items():
            if (amount := metadata.get(key)) is not None:
                tiles.append((formats.of_task(task, title), f"{amount:,}" if isinstance(amount, int) else str(amount)))
    return tiles


def _claims(run: RunFiles) -> list[str]:
    """Return whether the controls support a claim of personalization, task by task."""
    found = [(task, methods.claim_story(mapping(part.get("personalization")))) for task, part in run.tasks.items()]
    return [formats.of_task(task, sentence) for task, sentences in found for sentence in sentences]


def _main_metrics(run: RunFiles) -> list[charts.Chart]:
    if not run.metrics:
        return []
    rows = narrative.primary_metrics(run)
    drawn = []
    for task in dict.fromkeys(row.task for row in rows):
        steps = {*STEPS, ("population", "base")}
        changes = {
            row.method: narrative.change_text(row, run)
            for row in run.comparisons
            if row.task == task and (row.method, row.against) in steps and row.metric in {one.metric for one in rows}
        }
        figure = figures.main_metric([row for row in rows if row.task == task], changes)
        drawn += [figure] if figure else []
    return drawn


def _gains(run: RunFiles) -> list[dict[str, Any]]:
    found = []
    for step in ("users", "groups"):
        figure = figures.gains(run.gains, step, run.gain_metric)
        if figure:
            story, table = narrative.gain_story(run.gains, step), tables.who_gained(run.gains, step)
            only = [f"Task {run.first_task}; {Personal.USER_SCORES} has the gains of all."] if run.first_task else []
            found.append({"figure": figure, "story": [*only, *story], "table": table})
    return found


def _no_signatures(run: RunFiles) -> str:
    """Return what the absence of signatures says, of what was measured."""
    scored = any(user.gain_users is not None for user in run.gains)
    found = {
        "expert mixtures do not overlap": number(run.part("routing").get("constraint_cosine")) is not None,
        "no user is worse with their own adapter": scored,
        "query loss is not far above history loss": scored
        and any((row.method, row.metric) == ("users", "loss") for row in run.metrics),
    }
    known = [text for text, measured in found.items() if measured]
    return f"None: {formats.listed(known)}." if known else "None; routing and user adapters were not evaluated."


def _sentences(value: Any) -> list[str] | None:
    return [str(one) for one in value] if isinstance(value, list) else None


def _shares(truth: dict[str, Any]) -> Sequence[tuple[str, str, float]]:
    """Return (step, share as text, share clamped to 0..1) of the gain that the planted truth allows."""
    won = mapping(truth.get("won"))
    steps = (("groups", "Population → Groups"), ("users", "Groups → Users"))
    known = [(name, share) for step, name in steps if (share := number(won.get(step))) is not None]
    return [(name, formats.percent(share, 0), min(1.0, max(0.0, share))) for name, share in known]
