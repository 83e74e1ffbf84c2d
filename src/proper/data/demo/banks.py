"""Phrase banks: topics, templates and interchangeable phrases, read from the YAML files beside this module.

A text is drawn from its topic alone, so that no text reveals its author.
"""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import product
from typing import Any

import yaml

from proper.data.demo.users import DemoTask


@dataclass(frozen=True, slots=True)
class PhraseTemplate:
    """One sentence with `{slots}`; `content` is the part of the answer beside the choice, possibly empty."""

    text: str
    content: str = ""


@dataclass(frozen=True, slots=True)
class Topic:
    """Templates, and for each slot the phrases that fit it; every combination is good English."""

    name: str
    slots: Mapping[str, tuple[str, ...]]
    templates: tuple[PhraseTemplate, ...]


@dataclass(frozen=True, slots=True)
class Bank:
    """All phrases of a task.

    Attributes:
        prompt: template of a run's prompt over the column `input`.
        choices: options that users choose from for a topic: labels, ratings or openings.
        closings: sign-offs, of which each user has one; empty if answers are labels.
        topics: two more than choices, see `settings.TOPICS`.
    """

    prompt: str
    choices: tuple[str, ...]
    closings: tuple[str, ...]
    topics: tuple[Topic, ...]


def load_bank(task: DemoTask) -> Bank:
    """Read the phrase bank of a task."""
    file = resources.files(__package__).joinpath(f"{task}.yaml")
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    shared = raw.get("shared", {})
    frames = raw.get("frames", ())
    named = bool(raw.get("named", False))
    topics = tuple(_topic(name, part, shared, frames, named) for name, part in raw["topics"].items())
    return Bank(raw["prompt"], tuple(map(str, raw["choices"])), tuple(raw.get("closings", ())), topics)


def draw(topic: Topic, rng: random.Random) -> tuple[str, str]:
    """Draw one (input, content) pair of a topic; both are filled with the same phrases."""
    template = rng.choice(topic.templates)
    names = sorted({name for _, name, _, _ in string.Formatter().parse(template.text + template.content) if name})
    phrases = {name: rng.choice(topic.slots[name]) for name in names}
    return sentence(template.text.format(**phrases)), template.content.format(**phrases)


def sentence(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def _topic(
    name: str, part: Mapping[str, Any], shared: Mapping[str, list[str]], frames: Sequence[str], named: bool
) -> Topic:
    slots = {slot: tuple(phrases) for slot, phrases in {**shared, **part["slots"]}.items()}
    if frames:
        pairs = product(part["templates"], frames)
        templates = [PhraseTemplate(frame.replace("{content}", content), content) for content, frame in pairs]
    else:
        templates = [PhraseTemplate(text, name if named else "") for text in part["templates"]]
    return Topic(name, slots, tuple(templates))
