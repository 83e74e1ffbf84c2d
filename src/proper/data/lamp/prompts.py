"""LaMP prompt templates: prompts of questions, and of profile items in the same wording.

Two layouts: the official one, in which questions stay byte for byte as in the files, and OPPU's, which ends each prompt
with a word that asks for the answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from proper.config.lamp_tasks import LAMP_TASKS, LampTask, Layout
from proper.data.rows import BadValue, Template, parse_template

_TAGS = f"tags: [{', '.join(LAMP_TASKS['lamp-2m'].labels)}]"
_CATEGORIES = f"categories: [{', '.join(LAMP_TASKS['lamp-2n'].labels)}]"
_NO_MORE = "without further explanation."
_MOVIE = (
    f"Which tag does this movie relate to among the following tags? Just answer with the tag name {_NO_MORE} {_TAGS}"
)
_NEWS = (
    "Which category does this article relate to among the following categories? "
    f"Just answer with the category name {_NO_MORE} {_CATEGORIES}"
)
_SCORE = f"What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 {_NO_MORE}"
_REFERENCE = (
    "Identify the most relevant reference for the listed publication by the researcher. "
    "Select the reference paper that is most closely related to the researcher's work."
)

# Profile items of the tweet task have no source text: the benchmark's authors train on completing a tweet from its
# first words, OPPU on writing it without any input.
_ITEMS_OF_TWEETS = {"official": "Complete the following tweet: {source}", "oppu": "tweet:"}

_OFFICIAL = {
    "lamp-1": 'For an author who has written the paper with the title "{title}", which reference is related? '
    'Just answer with [1] or [2] without explanation. [1]: "{option1}" [2]: "{option2}"',
    "lamp-2m": _MOVIE + " description: {description}",
    "lamp-2n": _NEWS + " article: {text}",
    "lamp-3": _SCORE + " review: {text}",
    "lamp-4": "Generate a headline for the following article: {text}",
    "lamp-5": "Generate a title for the following abstract of a paper: {abstract}",
    "lamp-6": "Generate a subject for the following email: {text}",
    "lamp-7": "Paraphrase the following tweet without any explanation before or after it: {source}",
}
_OPPU = {
    # OPPU's own template omits both candidates here. No prompt ends in "[", since a model would then answer "1]".
    "lamp-1": _REFERENCE + "\npaper title: {title}\nreference: [1] - {option1} [2] - {option2}\nanswer:",
    "lamp-2m": _MOVIE + "\n description: {description} tag:",
    "lamp-2n": _NEWS + "\n article: {text} category:",
    "lamp-3": _SCORE + " review: {text}\n score:",
    "lamp-4": "Generate a headline for the following article.\n article: {text} headline:",
    "lamp-5": "Generate a title for the following abstract of a paper.\n abstract: {abstract} title:",
    "lamp-6": "Generate a subject for the following email.\n email: {text} subject:",
    "lamp-7": "Paraphrase the following text into tweet without any explanation before or after it.\n"
    " text: {source} tweet:",
}
_LAYOUTS: Mapping[str, Mapping[str, str]] = {"official": _OFFICIAL, "oppu": _OPPU}

# Markers in front of the question's text. The list of tags or categories precedes the marker, and the first match
# counts, so the text itself cannot be mistaken for a marker.
_MARKERS = {
    "lamp-2m": "] description: ",
    "lamp-2n": "] article: ",
    "lamp-3": "review: ",
    "lamp-4": "following article: ",
    "lamp-5": "abstract of a paper: ",
    "lamp-6": "following email: ",
    "lamp-7": "before or after it: ",
}
_CITATION = re.compile(
    r'with the title "(?P<title>.*)", which reference is related\?.*?'
    r'\[1\]: "(?P<option1>.*?)" \[2\]: "(?P<option2>.*)"\s*',
    re.DOTALL,
)


def question_fields(task: LampTask, question: str) -> dict[str, str]:
    """Parse a question: return the text that it asks about, or for LaMP-1 title, option1 and option2.

    Raises:
        BadValue: `question` is not a question of this task.
    """
    if task.name == "lamp-1":
        found = _CITATION.search(question)
        if found is None:
            raise BadValue("input", f"no question of {task.name}: expected a title and two references")
        return found.groupdict()
    _, marker, text = question.partition(_MARKERS[task.name])
    if not marker:
        raise BadValue("input", f"no question of {task.name}: '{_MARKERS[task.name].strip()}' is missing")
    return {task.source: text}


@dataclass(frozen=True, slots=True)
class Wording:
    """The prompts of one task in one layout."""

    layout: Layout
    of_questions: Template
    of_items: Template

    def question(self, fields: Mapping[str, str], verbatim: str) -> str:
        """Return the prompt of a question whose text in the file is `verbatim`."""
        return verbatim if self.layout == "official" else self.of_questions.fill(fields)

    def item(self, fields: Mapping[str, str]) -> str:
        """Return the prompt of a profile item."""
        return self.of_items.fill(fields)


def wording(task: LampTask, layout: Layout) -> Wording:
    """Return the prompts of `task` in `layout`."""
    question = _LAYOUTS[layout][task.name]
    item = _ITEMS_OF_TWEETS[layout] if task.name == "lamp-7" else question
    return Wording(layout, parse_template(question, "data.layout"), parse_template(item, "data.layout"))
