"""Every file of a run folder is known to the registry, and nothing of a deleted person is left in any of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from unittest.mock import ANY

import pytest

from proper import pipeline
from proper.adapters.store import AdapterStore
from proper.config import make_config
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.errors import InputError
from proper.interactions.deletion import Removal, remove
from proper.interactions.log import InteractionLog, LogEntry
from proper.run_folder import kind_of

MARK = "zyzzyva"


def test_all_of_a_user_goes_from_a_whole_run(tmp_path: Path) -> None:
    run, user = made_run(tmp_path)
    pipeline.evaluate(run, ["groups", "users", "shuffled", "rag"])
    pipeline.report(run)
    pipeline.report_users(run, [each["user"] for each in json.loads((run / "users.json").read_text())["users"]])
    pipeline.report_comparison(run, run)
    unlisted = [path for path in files(run) if kind_of(path.relative_to(run)) is None]
    assert not unlisted, "a new kind of file has to be listed in run_folder.py"
    with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
        log.append("", user, [LogEntry(f"{MARK} {number}", "since then") for number in range(30)])
        before = {path for path in files(run) if MARK.encode() in path.read_bytes()}
        assert {"data.sqlite", "users.jsonl", "users.sqlite", "interactions.jsonl", "report.html"} <= {
            path.name for path in before
        }
        assert any(path.parent.parent.name == "1" for path in before), "further seeds too"
        hits = {path for path in files(run) if MARK.encode() in path.read_bytes()}
        kinds = {path: kind_of(path.relative_to(run)) for path in hits}
        assert set(kinds.values()) == {"personal", "store"}, kinds
        names = {path.name.split("-")[0] for path in hits}
        assert {"report", "shuffled", "rag"} <= names, "user pages and variants' data"
        assert remove(store, log, user) == Removal(True, ANY)
        assert remove(store, log, user) == Removal(False, ANY)
        assert store.head(user) is None and log.count("", user) == 0
        assert len(list(store.users())) > 1
    assert not marked(run)
    (run / "predictions" / "shuffled.json").unlink()
    pipeline.evaluate(run, ["groups", "users", "shuffled", "rag"])
    assert not marked(run), "an evaluation writes nothing back"
    (run / "data.sqlite").unlink()
    pipeline.run(run / "config.yaml", run)
    assert not marked(run) - {run / "data" / "interactions.jsonl"}, "nor does data that is prepared again"


def marked(run: Path) -> set[Path]:
    return {path for path in files(run) if MARK.encode() in path.read_bytes() or MARK in str(path.relative_to(run))}


def made_run(tmp_path: Path) -> tuple[Path, str]:
    """A run with two seeds, evaluated, and one of its targets, in whose texts is a mark."""
    settings = DemoSettings(users=4, groups=2, items=(6, 7))
    run = tmp_path / "run"
    data = write_demo(run / "data", settings)
    first, user = json.loads(data.read_text(encoding="utf-8").partition("\n")[0])["user_id"], f"{MARK}-who"
    for path in (run / "data").iterdir():
        text = path.read_text(encoding="utf-8").replace(f'"{first}', f'"{user}')
        path.write_text(text, encoding="utf-8")
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row["user_id"] == user:
            row["input"] = f"{MARK} {row['input']}"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    raw = demo_config(data, settings)
    raw["split"] |= {"target_users": 4, "min_history": 2}
    short = {"max_tokens": 300, "epochs": 1}
    raw |= {"population": short, "groups": short | {"experts": 2, "rank": 3}, "compute": {"max_length": 64}}
    raw |= {"users": {"epochs": 1, "rank": 2}, "evaluation": {"methods": ["groups", "users"], "seeds": [0, 1]}}
    return pipeline.run(make_config(raw), run), user


def files(run: Path) -> Iterator[Path]:
    return (path for path in run.rglob("*") if path.is_file())


def test_while_a_stage_is_trained_its_users_stay(tmp_path: Path) -> None:
    run, user = tmp_path / "run", "ann"
    from proper.data.database import create

    data = create(_made(run / "data.sqlite"))
    data.execute("INSERT INTO users (number, id) VALUES (1, 'ann')")
    data.execute("INSERT INTO texts (id, prompt, target) VALUES (1, 'x', 'y')")
    data.execute("INSERT INTO rows (id, text, user, tokens, digest, prompt_key) VALUES (1, 1, 1, 2, x'00', 0)")
    data.close()
    (run / "users" / "work").mkdir(parents=True)
    with closing(AdapterStore(run / "users")) as store, closing(InteractionLog(run / "users")) as log:
        with pytest.raises(InputError, match="a stage is being trained and holds user 'ann'"):
            remove(store, log, user)
        log.append("", "bo", [LogEntry("x", "y")])
        assert remove(store, log, "bo").found


def _made(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    return path
