"""When to update users who change: never, always, periodically, or when they have drifted; on generated users.

    python -m experiments.drift --out DIR [--users 8] [--periods 6] [--items 4] [--seed 0] [--result FILE]

Users of a demo run get new interactions in periods; a quarter of them each stay as they are, change abruptly, change
slowly, or change and go back (`proper.data.demo.changes`). In each period, every policy first answers the period's
interactions with the version in service, which has not seen them: their loss is the quality. Then it logs them, and
updates the users that it chooses. `kept` is the loss on interactions before any change under the last version: what
was forgotten. Intervals are bootstraps over users. The cost is the processor seconds of all updates and of measuring
drift. Users do not depend on one another: `TOGETHER` of them are simulated at a time, and the outcome is
kept in DIR, so that the same call goes on after a kill, and a call with more users has only these left.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import proper
from proper.api import Model
from proper.config import make_config
from proper.data.demo.changes import CHANGES, LaterItem, later_items
from proper.data.demo.generate import demo_run, write_demo
from proper.data.demo.users import DemoSettings
from proper.data.histories import TextExample
from proper.data.rows import parse_template
from proper.enrolment.comparison import per_item, state_of
from proper.enrolment.fit_user import own_bank
from proper.files import read_json, write_json
from proper.interactions.log import LogEntry
from proper.pipeline import run as run_pipeline
from proper.run_folder import RunFolder, Stage

EVERY = 3
"""Periods between two updates of the periodic policy."""
RESAMPLES = 2000
KEPT_ITEMS = 6
"""Interactions of a user's history on which forgetting is measured, the newest."""
TOGETHER = 2
"""Users who are simulated together, in one copy of the run."""


@dataclass
class Outcome:
    """Outcome of a policy: losses by user and period, losses on old items, updates and their processor seconds."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    kept: dict[str, float] = field(default_factory=dict)
    tried: int = 0
    promoted: int = 0
    seconds: float = 0.0

    def add(self, other: Outcome) -> None:
        """Add the outcome of the same policy for other users."""
        self.losses |= other.losses
        self.kept |= other.kept
        self.tried += other.tried
        self.promoted += other.promoted
        self.seconds += other.seconds


Value = TypeVar("Value")
Choose = Callable[[Model, int], list[str]]
"""Function from the model and the number of a period to the users to update after it."""


def never(model: Model, period: int) -> list[str]:
    """Update no user."""
    return []


def always(model: Model, period: int) -> list[str]:
    """Update all users who have new interactions."""
    return list(model.users)


def periodic(model: Model, period: int) -> list[str]:
    """Update all users after every `EVERY` periods."""
    return list(model.users) if (period + 1) % EVERY == 0 else []


def drifted(model: Model, period: int) -> list[str]:
    """Update the users whose drift makes an update due."""
    return [drift.user for drift in model.users.drift() if drift.due]


POLICIES: dict[str, Choose] = {"never": never, "always": always, "periodic": periodic, "drift": drifted}


def prepare(folder: Path, settings: DemoSettings) -> Path:
    """Train the stages of a demo run with these settings in `folder`, unless it is there; return the folder."""
    run = RunFolder(folder)
    config = make_config(demo_run(run.demo_rows.resolve(), settings), "demo")
    if not run.demo_rows.exists():
        write_demo(run.demo_data, settings)
    return run_pipeline(config, folder, stages=[str(stage) for stage in Stage])


def simulate(run: Path, folder: Path, choose: Choose, items: Sequence[LaterItem]) -> Outcome:
    """Simulate one policy over all periods, on a copy of the run."""
    shutil.copytree(run, folder)
    outcome, model = Outcome(), proper.load(folder)
    try:
        prompt = parse_template(model.config.data.prompt, "data.prompt")
        users = sorted({item.user for item in items} & set(model.users))
        old = {user: (_history(model, user))[-KEPT_ITEMS:] for user in users}
        for period in range(max(item.period for item in items) + 1):
            for user in users:
                came = [each for each in items if (each.user, each.period) == (user, period)]
                texts = [(prompt.fill({"input": each.text}), each.answer) for each in came]
                outcome.losses.setdefault(user, []).append(fmean(losses(model, user, texts)))
                at = 1e10 + 100 * period  # after the demo's own times
                entries = [LogEntry(*text, at + number, f"{period}-{number}") for number, text in enumerate(texts)]
                model.users.log.append("", user, entries)
            started = time.process_time()
            for user in sorted(set(choose(model, period)) & set(users)):
                model.users.log.request_fit("", user)
                while model.users.worker.fit_next("", user, even_if_not_due=True):
                    pass
                outcome.tried += 1
                outcome.promoted += model.users.log.updates.of("", user)[0].version is not None
            outcome.seconds += time.process_time() - started
        outcome.kept = {user: fmean(losses(model, user, old[user])) for user in users}
    finally:
        model.close()
    return outcome


def _once(run: Path, folder: Path, choose: Choose, items: Sequence[LaterItem]) -> Outcome:
    """Return the outcome of a policy, measured unless an earlier call has done so."""
    done = folder.with_suffix(".json")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_json(done, asdict(simulate(run, folder, choose, items)))
        shutil.rmtree(folder)
    return Outcome(**read_json(done))


def losses(model: Model, user: str, texts: Sequence[tuple[str, str]]) -> list[float]:
    """Return the loss per answer token of a user's texts under the version in service."""
    record, own = model.users.store.get(user), model.personalized
    assert record is not None
    examples = [TextExample(0, user, prompt, target, None, None, 0) for prompt, target in texts]
    with own_bank(own):
        return per_item(own, state_of(own, record), [own.encoder.encode(example) for example in examples])


def _history(model: Model, user: str) -> list[tuple[str, str]]:
    """Return the texts of a user's history before the first period: the run's data, and what was logged since."""
    dataset = model.users.worker.fitter().dataset
    run = [] if dataset is None else [(item.prompt, item.target) for item in dataset.history(user)]
    return run + [(item.prompt, item.target) for item in model.users.log.interactions("", user)]


def interval(values: Sequence[Value], statistic: Callable[[Sequence[Value]], float]) -> list[float]:
    """Return the 95 % bootstrap interval over users of a statistic."""
    draw = random.Random(0)
    means = sorted(statistic(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return [means[round(0.025 * (RESAMPLES - 1))], means[round(0.975 * (RESAMPLES - 1))]]


def summary(outcomes: dict[str, Outcome], change_of: dict[str, str]) -> dict[str, Any]:
    """Return the figures of all policies.

    `gain` is the decrease of the mean loss over periods and users against never updating; `share` and `cost` are the
    gain, the seconds and the number of updates relative to always updating.
    """
    users = sorted(change_of)
    means = {name: {user: fmean(each.losses[user]) for user in users} for name, each in outcomes.items()}
    base, most = means["never"], outcomes["always"]
    best = fmean(base[user] - means["always"][user] for user in users)
    found = {}
    for name, each in outcomes.items():
        gains = [base[user] - means[name][user] for user in users]
        pairs = [(base[user] - means[name][user], base[user] - means["always"][user]) for user in users]
        by_change = {
            change: fmean(base[user] - means[name][user] for user in users if change_of[user] == change)
            for change in CHANGES
            if change in change_of.values()
        }
        found[name] = {
            "loss": fmean(means[name].values()),
            "loss_by_period": [fmean(period) for period in zip(*(each.losses[user] for user in users), strict=True)],
            "gain": fmean(gains),
            "gain_interval": interval(gains, fmean),
            "gain_by_change": by_change,
            "share_of_gain": fmean(gains) / best if best else None,
            "share_interval": interval(pairs, _share),
            "kept_loss": fmean(each.kept.values()),
            "kept_interval": interval([*each.kept.values()], fmean),
            "updates": each.tried,
            "promoted": each.promoted,
            "seconds": each.seconds,
            "share_of_updates": each.tried / most.tried if most.tried else None,
            "share_of_seconds": each.seconds / most.seconds if most.seconds else None,
        }
    return {"users": len(users), "policies": found}


def _share(pairs: Sequence[tuple[float, float]]) -> float:
    whole = sum(always for _, always in pairs)
    return sum(own for own, _ in pairs) / whole if whole else 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment and print, and with --result write, its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the copies of the run")
    parser.add_argument("--run", type=Path, help="a demo run of the same people and seed; else one is trained")
    parser.add_argument("--people", type=int, default=24)
    parser.add_argument("--periods", type=int, default=6)
    parser.add_argument("--items", type=int, default=4, help="interactions of a user in a period")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=8, help="so many of these users, of all kinds of change")
    parser.add_argument("--result", type=Path, help="JSON file to write")
    asked = parser.parse_args(arguments)
    settings = DemoSettings(users=asked.people, seed=asked.seed)
    run = asked.run or prepare(asked.out / "run", settings)
    items = list(later_items(settings, asked.periods, asked.items))
    change_of = dict(sorted({item.user: str(item.change) for item in items}.items())[: asked.users])
    items = [item for item in items if item.user in change_of]
    outcomes = {name: Outcome() for name in POLICIES}
    for at in range(0, len(change_of), TOGETHER):
        some = list(change_of)[at : at + TOGETHER]
        for name, choose in POLICIES.items():
            outcomes[name].add(_once(run, asked.out / f"{name}-{at}", choose, [i for i in items if i.user in some]))
    known = {user: change for user, change in change_of.items() if user in outcomes["never"].losses}
    setting: dict[str, Any] = {key: getattr(asked, key) for key in ("people", "periods", "items", "seed")}
    setting["changes"] = dict(sorted(Counter(known.values()).items()))
    told = {"settings": setting, **summary(outcomes, known)}
    for name, figures in told["policies"].items():
        low, high = figures["gain_interval"]
        print(
            f"{name:9} loss {figures['loss']:.4f}  gain {figures['gain']:+.4f} [{low:+.4f}, {high:+.4f}]  "
            f"old items {figures['kept_loss']:.4f}  updates {figures['updates']} ({figures['promoted']} promoted)  "
            f"{figures['seconds']:.1f} s"
        )
    if asked.result is not None:
        write_json(asked.result, told)
    return 0


if __name__ == "__main__":
    sys.exit(main())
