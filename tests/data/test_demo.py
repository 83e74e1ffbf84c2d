"""The demo data has the structure it claims: planted, findable over a history, and silent in a single text."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import normalized_mutual_info_score
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from proper.config import make_config
from proper.data.demo import DemoSettings, demo_config, write_demo
from proper.data.demo.banks import Bank, Topic, load_bank
from proper.data.demo.generate import rouge1
from proper.data.demo.users import CHOICES, SHARED, TOPICS, make_world
from proper.errors import InputError

TASKS = ("classification", "rating", "style")
_ROUGE = RougeScorer(["rouge1"], use_stemmer=False)

# Per task: what an answer scores against the gold one, and the interval of the mean score by what is known of a user.
_SCORES: dict[str, Callable[[str, str], float]] = {
    "classification": lambda answer, gold: float(answer == gold),
    "rating": lambda answer, gold: abs(float(answer) - float(gold)),
    "style": lambda answer, gold: _ROUGE.score(gold, answer)["rouge1"].fmeasure,
}
_TRUE_SCORES = {
    "classification": {"population": (0.17, 0.25), "groups": (0.66, 0.76), "users": (0.96, 1.0)},
    "rating": {"population": (1.1, 1.3), "groups": (0.38, 0.5), "users": (0.0, 0.08)},
    "style": {"population": (0.5, 0.62), "groups": (0.69, 0.8), "users": (0.98, 1.0)},
}


@dataclass(frozen=True)
class Demo:
    """Generated data, read back from its files."""

    rows: list[dict[str, str]]
    truth: dict[str, Any]

    def queries(self) -> list[dict[str, str]]:
        """Return the last fifth of each user's rows."""
        users = defaultdict(list)
        for row in self.rows:
            users[row["user_id"]].append(row)
        return [row for rows in users.values() for row in rows[-max(1, round(len(rows) / 5)) :]]

    def group_of(self, row: dict[str, str]) -> int:
        return int(self.truth["groups"][row["user_id"]])


def read_demo(folder: Path, demo_settings: DemoSettings) -> Demo:
    path = write_demo(folder, demo_settings)
    assert path == folder / "interactions.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Demo(rows, json.loads((folder / "truth.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module", params=TASKS)
def demo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return read_demo(tmp_path_factory.mktemp("demo"), DemoSettings(task=request.param))


def test_rows_have_the_documented_columns_in_order_of_time(demo: Demo) -> None:
    times = defaultdict(list)
    for row in demo.rows:
        assert set(row) == {"user_id", "input", "output", "timestamp", "item_id"}
        assert all(row.values())
        times[row["user_id"]].append(row["timestamp"])
    assert len(times) == 300
    assert all(16 <= len(days) <= 32 and days == sorted(set(days)) for days in times.values())
    assert len({row["item_id"] for row in demo.rows}) == len(demo.rows)


def test_truth_covers_every_user_and_item(demo: Demo) -> None:
    assert demo.truth["n_groups"] == 5
    assert demo.truth["groups"].keys() == {row["user_id"] for row in demo.rows}
    assert Counter(demo.truth["groups"].values()) == dict.fromkeys(range(5), 60)
    assert demo.truth["answers"].keys() == {row["item_id"] for row in demo.rows}


def test_knowledge_of_group_and_user_adds_as_much_as_intended(demo: Demo) -> None:
    task = demo.truth["task"]
    assert demo.truth["metric"] == {"classification": "accuracy", "rating": "mae", "style": "rouge1"}[task]
    for knowledge, (low, high) in _TRUE_SCORES[task].items():
        answers = demo.truth["answers"]
        scores = [_SCORES[task](answers[row["item_id"]][knowledge], row["output"]) for row in demo.queries()]
        assert low <= np.mean(scores) <= high, knowledge


@pytest.mark.parametrize("classifier", [LogisticRegression(max_iter=200, C=0.3), MultinomialNB()], ids=["lr", "nb"])
@pytest.mark.parametrize("columns", [("input",), ("input", "output")], ids=["input", "both"])
def test_one_text_does_not_give_its_authors_group_away(demo: Demo, classifier: Any, columns: tuple[str, ...]) -> None:
    rows = demo.rows[::2]
    texts = [" ".join(row[column] for column in columns) for row in rows]
    groups = [demo.group_of(row) for row in rows]
    # The pattern keeps words of one character: a rating is one.
    model = make_pipeline(CountVectorizer(token_pattern=r"(?u)\b\w+\b"), classifier)
    authors = [row["user_id"] for row in rows]
    accuracy = cross_val_score(model, texts, groups, groups=authors, cv=GroupKFold(3)).mean()
    assert accuracy <= 1 / 5 + 0.10


def test_texts_are_short_distinct_and_made_of_plain_words(demo: Demo) -> None:
    inputs = [row["input"] for row in demo.rows]
    assert len(set(inputs)) >= 0.95 * len(inputs)
    assert np.mean([len(text.split()) for text in inputs]) <= 15
    texts = inputs + ([row["output"] for row in demo.rows] if demo.truth["task"] == "style" else [])
    assert max(len(text.split()) for text in texts) <= 24
    words = {word.strip(".,:?'") for text in texts for word in text.split()}
    assert [word for word in words if not re.fullmatch(r"[A-Za-z]?[a-z]*", word)] == []
    assert [word for word in words if not re.search("[aeiouy]", word, re.IGNORECASE)] == []
    assert all(text[0].isupper() and text[-1] in ".?" for text in inputs)


def test_no_group_makes_one_choice_much_more_often_than_another_group(demo: Demo) -> None:
    choices = load_bank(demo.truth["task"]).choices
    counts = np.zeros((5, len(choices)))
    for row in demo.rows:
        said = row["output"]
        counts[
            demo.group_of(row), next(i for i, c in enumerate(choices) if said.startswith(c) or said.endswith(c))
        ] += 1
    shares = counts / counts.sum(axis=1, keepdims=True)
    # Each group lacks one choice on its shared topics, so the others come up a little more often.
    assert shares.max() < 0.27
    # Whoever sees one choice and bets on the likeliest group is right little more often than by chance.
    assert shares.max(axis=0).sum() / 5 < 0.2 + 0.1


@pytest.mark.parametrize("task", TASKS)
def test_groups_are_found_from_what_users_do_over_time(task: Any) -> None:
    users = make_world(DemoSettings(task=task), closings=10).users
    habits = np.stack([np.eye(CHOICES)[list(user.habit)].ravel() for user in users])
    found = KMeans(5, n_init=5, random_state=0).fit_predict(habits)
    assert normalized_mutual_info_score([user.group for user in users], found) >= 0.95


@given(
    groups=st.integers(1, 5),
    extra=st.integers(0, 30),
    own=st.floats(0, 1, exclude_max=True),
    task=st.sampled_from(TASKS),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=50, deadline=None)
def test_groups_are_rows_of_a_latin_square(groups: int, extra: int, own: float, task: Any, seed: int) -> None:
    demo_settings = DemoSettings(task=task, users=groups + extra, groups=groups, own_traits=own, seed=seed)
    world = make_world(demo_settings, closings=10)
    assert sorted([*world.shared, *world.personal]) == list(range(TOPICS))
    assert len({user.id for user in world.users}) == groups + extra
    rows = {(user.group, *(user.habit[topic] for topic in world.shared)) for user in world.users}
    assert sorted(group for group, *_ in rows) == list(range(groups))
    assert all(len(set(choices)) == SHARED for _, *choices in rows)
    assert all(len(set(choices)) == groups for choices in list(zip(*rows, strict=True))[1:])


def test_further_groups_agree_on_at_most_one_shared_topic() -> None:
    world = make_world(DemoSettings(users=40, groups=20), closings=1)
    rows = {user.group: [user.habit[topic] for topic in world.shared] for user in world.users}
    assert len(rows) == 20
    for one, other in combinations(rows.values(), 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) <= 1


def test_personal_choices_say_nothing_about_the_group() -> None:
    world = make_world(DemoSettings(users=600), closings=10)
    for topic in world.personal:
        counts = Counter((user.group, user.habit[topic]) for user in world.users)
        assert counts == dict.fromkeys(product(range(5), range(CHOICES)), 24)
    assert set(Counter((user.group, user.closing) for user in world.users).values()) == {12}


def test_every_history_has_every_topic_twice_where_items_allow(tmp_path: Path) -> None:
    demo = read_demo(tmp_path, DemoSettings(users=60, items=(25, 32)))
    queries = {row["item_id"] for row in demo.queries()}
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    bank = load_bank("classification")
    for row in demo.rows:
        if row["item_id"] not in queries:
            seen[row["user_id"]][topic_of(row["input"], bank)] += 1
    assert all(len(counts) == TOPICS and min(counts.values()) >= 2 for counts in seen.values())


def topic_of(text: str, bank: Bank) -> str:
    """Return the topic that most of a text's phrases come from."""

    def overlap(topic: Topic) -> int:
        own = (phrase for slot, phrases in topic.slots.items() if slot not in {"when", "soon"} for phrase in phrases)
        return sum(len(phrase) for phrase in own if phrase in text.lower())

    return max(bank.topics, key=overlap).name


def test_without_noise_users_answer_as_the_truth_says(tmp_path: Path) -> None:
    demo = read_demo(tmp_path, DemoSettings(users=20, noise=0.0))
    assert all(demo.truth["answers"][row["item_id"]]["users"] == row["output"] for row in demo.rows)
    noisy = read_demo(tmp_path, DemoSettings(users=100, noise=0.3))
    wrong = [noisy.truth["answers"][row["item_id"]]["users"] != row["output"] for row in noisy.rows]
    assert 0.25 < np.mean(wrong) < 0.35


@pytest.mark.parametrize("task", TASKS)
def test_without_own_traits_the_group_says_all(task: Any, tmp_path: Path) -> None:
    demo = read_demo(tmp_path, DemoSettings(task=task, users=40, own_traits=0.0))
    assert all(answer["groups"] == answer["users"] for answer in demo.truth["answers"].values())


def test_no_constant_rating_beats_the_population_oracle(tmp_path: Path) -> None:
    demo = read_demo(tmp_path, DemoSettings(task="rating"))
    golds = np.array([float(row["output"]) for row in demo.rows])
    oracle = np.array([float(demo.truth["answers"][row["item_id"]]["population"]) for row in demo.rows])
    assert all(np.abs(oracle - golds).mean() <= np.abs(constant - golds).mean() + 0.01 for constant in range(1, 6))


def test_the_style_oracle_would_not_gain_by_leaving_out_or_putting_in_a_part(tmp_path: Path) -> None:
    bank = load_bank("style")
    demo = read_demo(tmp_path, DemoSettings(task="style", users=100))
    rows = demo.rows[::10]
    answers = [demo.truth["answers"][row["item_id"]]["groups"] for row in rows]
    best = np.mean([rouge1(answer, row["output"]) for answer, row in zip(answers, rows, strict=True)])
    for closing in bank.closings:
        others = [answer.removesuffix(f" {closing}") + f" {closing}" for answer in answers]
        assert np.mean([rouge1(other, row["output"]) for other, row in zip(others, rows, strict=True)]) <= best + 0.01


@given(st.text(max_size=40), st.text(max_size=40))
def test_rouge1_equals_googles(answer: str, gold: str) -> None:
    assert rouge1(answer, gold) == pytest.approx(_ROUGE.score(gold, answer)["rouge1"].fmeasure, abs=1e-12)


@pytest.mark.parametrize("task", TASKS)
def test_the_seed_decides_everything(task: Any, tmp_path: Path) -> None:
    def written(name: str, seed: int) -> tuple[bytes, bytes]:
        path = write_demo(tmp_path / name, DemoSettings(task=task, users=15, seed=seed))
        return path.read_bytes(), (path.parent / "truth.json").read_bytes()

    first, again, other = written("first", 3), written("again", 3), written("other", 4)
    assert first == again
    assert first[0] != other[0] and first[1] != other[1]


@pytest.mark.parametrize("task", TASKS)
def test_the_config_is_one_that_a_run_accepts(task: Any, tmp_path: Path) -> None:
    demo_settings = DemoSettings(task=task, users=12)
    path = write_demo(tmp_path, demo_settings)
    config = make_config(demo_config(path, demo_settings))
    assert config.data.path == str(path)
    assert config.split.target_users == 12
    assert config.task.scored == (task == "rating")
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert config.data.prompt.format(**row).startswith(row["input"])
    if task != "style":
        assert row[config.data.target.strip("{}")] in config.task.labels


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"task": "poetry"}, "task"),
        ({"groups": 21}, "groups"),
        ({"groups": 0}, "groups"),
        ({"users": 4}, "users"),
        ({"items": (9, 8)}, "items"),
        ({"items": (1, 8)}, "items"),
        ({"own_traits": -0.1}, "own_traits"),
        ({"own_traits": 1.0}, "own_traits"),
        ({"own_traits": float("nan")}, "own_traits"),
        ({"noise": 1.0}, "noise"),
        ({"noise": -0.1}, "noise"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=f"^demo {name}: [^\n]+$"):
        DemoSettings(**changes)


def test_many_users_or_few_items_are_fine(tmp_path: Path) -> None:
    demo = read_demo(tmp_path, DemoSettings(users=7, groups=3, items=(2, 3)))
    assert len({row["user_id"] for row in demo.rows}) == 7
    assert demo.truth["n_groups"] == 3
