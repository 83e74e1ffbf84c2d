"""Small files in exactly the formats of LaMP and of OPPU's release, made up for all seven public tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from proper.config.lamp_tasks import LAMP_TASKS

TASKS = ("lamp-1", "lamp-2m", "lamp-2n", "lamp-3", "lamp-4", "lamp-5", "lamp-7")
_WORDS = ("river", "tram", "apple", "market", "winter", "signal", "garden", "paper", "engine", "music", "harbour")
_TAGS = ", ".join(LAMP_TASKS["lamp-2m"].labels)
_CATEGORIES = ", ".join(LAMP_TASKS["lamp-2n"].labels)

# Written out here once more, as they stand in the files.
ASKED: dict[str, Callable[..., str]] = {
    "lamp-1": lambda item, a, b: (
        f'For an author who has written the paper with the title "{item["title"]}", which reference is related? '
        f'Just answer with [1] or [2] without explanation. [1]: "{a}" [2]: "{b}"'
    ),
    "lamp-2m": lambda item: (
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
        f"explanation. tags: [{_TAGS}] description: {item['description']}"
    ),
    "lamp-2n": lambda item: (
        "Which category does this article relate to among the following categories? Just answer with the category name "
        f"without further explanation. categories: [{_CATEGORIES}] article: {item['text']}"
    ),
    "lamp-3": lambda item: (
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
        f"further explanation. review: {item['text']}"
    ),
    "lamp-4": lambda item: f"Generate a headline for the following article: {item['text']}",
    "lamp-5": lambda item: f"Generate a title for the following abstract of a paper: {item['abstract']}",
    "lamp-7": lambda item: (
        f"Paraphrase the following tweet without any explanation before or after it: {item['text'].upper()}"
    ),
}


class Authors:
    """Made-up users who write one item after another for one task. Users share nothing but words."""

    def __init__(self, task: str, seed: int = 0, citations: bool = False) -> None:
        self.task, self.citations = task, citations
        self.random = random.Random(f"{task} {seed}")

    def text(self, words: int) -> str:
        return " ".join(self.random.choices(_WORDS, k=words)) + f" {self.random.randrange(10**6)}"

    def item(self, user: int, place: int) -> dict[str, Any]:
        """One profile item with the fields of its task; ids start again with every user."""
        labels = LAMP_TASKS[self.task].labels
        label = labels[(user + self.random.randrange(2)) % len(labels)] if labels else ""
        item: dict[str, Any] = {"id": str(place), "date": f"2015-{place // 28 + 1:02}-{place % 28 + 1:02}"}
        match self.task:
            case "lamp-1":
                item |= {"title": self.text(3), "abstract": self.text(6)}
                if self.citations:
                    item["citation"] = self.text(3)
            case "lamp-2m":
                item |= {"description": self.text(8), "tag": label}
            case "lamp-2n":
                item |= {"text": self.text(8), "title": self.text(3), "category": label}
            case "lamp-3":
                item |= {"text": self.text(8), "score": label}
            case "lamp-4":
                item |= {"text": self.text(8), "title": f"Today: {self.text(2)}"}
            case "lamp-5":
                item |= {"title": self.text(3), "abstract": self.text(8)}
            case "lamp-7":
                item |= {"text": self.text(6)}
        return item

    def question(self, user: int, place: int, identity: str) -> tuple[dict[str, Any], str]:
        """A question and its true answer."""
        item = self.item(user, place)
        if self.task == "lamp-1":
            answer = self.random.choice(["[1]", "[2]"])
            return {"id": identity, "input": ASKED["lamp-1"](item, self.text(3), self.text(3))}, answer
        return {"id": identity, "input": ASKED[self.task](item)}, item[LAMP_TASKS[self.task].target]


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_lamp(
    folder: Path, task: str, *, split: str = "user", users: int = 4, items: int = 6, ids: bool = False
) -> Path:
    """Write a task's official files. By user, dev has other users than train and dates are missing; by time, the same.

    `ids` gives questions the `user_id` that some releases have.
    """
    authors = Authors(task)
    official = LAMP_TASKS[task].official
    profiles = {user: [authors.item(user, place) for place in range(items + 1)] for user in range(2 * users)}
    for part in ("train", "dev"):
        questions, golds = [], []
        for number in range(users):
            user = number + users * (split == "user" and part == "dev")
            seen = profiles[user][: items + (part == "dev" and split == "time")]
            question, answer = authors.question(user, items + (part == "dev"), f"{user}{number}{part == 'dev':d}")
            profile = [dict(item) for item in seen]
            if split == "user":
                for item in profile:
                    del item["date"]
            questions.append({**question, "profile": profile, **({"user_id": f"u{user}"} if ids else {})})
            golds.append({"id": question["id"], "output": answer})
        write(folder / f"{part}_questions.json", questions)
        write(folder / f"{part}_outputs.json", {"task": official, "golds": golds[::-1]})
    return folder


def write_oppu(folder: Path, task: str, *, users: int = 3, others: int = 3, items: int = 6, asked: int = 2) -> Path:
    """Write a task's files as OPPU regroups them: whole years as numbers for dates, a gold with every query."""
    authors = Authors(task, citations=True)
    tested = "user_more_100_history.json" if task == "lamp-7" else "user_top_100_history.json"
    for name, first, count in (("user_others.json", 1000, others), (tested, 0, users)):
        entries = []
        for user in range(first, first + count):
            profile = [authors.item(user, place) | {"date": 2000 + place} for place in range(items)]
            queries = []
            for place in range(asked):
                question, answer = authors.question(user, items + place, f"{user}{place}")
                queries.append(question | {"gold": answer})
            entries.append({"user_id": user, "profile": profile, "query": queries})
        write(folder / name, entries)
    return folder
