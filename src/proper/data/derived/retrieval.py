"""Retrieval-augmented prompts: the k most similar history items (BM25) or a user profile, prepended to each prompt.

Sources are only items of the same user's history that are strictly earlier than the row, for training rows and queries
alike. BM25 is `bm25s` with its defaults (Lucene's form); document frequencies are counted over the user's whole
history, never over queries. The token count comes in as a callable.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import bm25s
import numpy as np

from proper.data.chat import readable
from proper.data.dataset import Dataset, TextExample
from proper.data.derived.views import Count, Rewritten, rewrite

_WORD = re.compile(r"\w+")

ProfileWriter = Callable[[Sequence[TextExample], str], str]
"""Function from earlier items (oldest first) and the kind of task to a text about the user."""


def retrieve(source: Dataset, path: Path, k: int, count: Count, max_length: int) -> None:
    """Write `source` to `path` with the k best earlier items prepended to every prompt, the best one last.

    If items and row exceed `max_length` tokens, items are truncated at their front, then left out, the worst first.
    """

    def contexts(row: TextExample, earlier: Sequence[TextExample], scores: Sequence[float]) -> list[TextExample]:
        order = sorted(range(len(earlier)), key=lambda at: (scores[at], earlier[at].id))
        return [earlier[at] for at in order[-k:]]

    rewrite(source, path, f"retrieved {k}", _rows(source, contexts, count, max_length))


def add_profiles(
    source: Dataset, path: Path, kind: str, count: Count, max_length: int, writer: ProfileWriter | None = None
) -> None:
    """Write `source` to `path` with a profile, made from the user's earlier items, prepended to every prompt."""
    write = writer or template_profile

    def rewritten() -> Iterator[Rewritten]:
        for user in source.users():
            for row, earlier in _with_earlier(source, user.id):
                if not earlier:
                    continue
                text = write(earlier, kind)
                kept, tokens = _fit(text, row, count, max_length)
                prompt = f"{kept}\n{row.prompt}" if kept else row.prompt
                yield Rewritten(row.id, prompt, tokens, tuple(item.id for item in earlier), cut=kept != text)

    rewrite(source, path, "profiles", rewritten())


def template_profile(earlier: Sequence[TextExample], kind: str) -> str:
    """Return a one-line profile of a user's answers: label frequencies, mean rating, or frequent words."""
    counts = Counter(item.target for item in earlier)
    if kind == "rating":
        return f"Profile: {len(earlier)} ratings, mean {fmean(float(item.target) for item in earlier):.1f}, " + _most(
            counts, 2
        )
    if kind == "classification":
        return "Profile: " + _most(counts, 4)
    words = Counter(word for item in earlier for word in set(_words(item.target)) if len(word) > 3)
    length = fmean(len(_words(item.target)) for item in earlier)
    return f"Profile: about {length:.0f} words, often {', '.join(word for word, _ in words.most_common(8))}."


def _most(counts: Counter[str], limit: int) -> str:
    total = sum(counts.values())
    return "often " + ", ".join(f"{name} ({count / total:.0%})" for name, count in counts.most_common(limit)) + "."


def _rows(
    source: Dataset,
    choose: Callable[[TextExample, Sequence[TextExample], Sequence[float]], list[TextExample]],
    count: Count,
    max_length: int,
) -> Iterator[Rewritten]:
    for user in source.users():
        history = source.history(user.id)
        score = _scorer(history)
        index = {item.id: at for at, item in enumerate(history)}
        for row, earlier in _with_earlier(source, user.id, history):
            if earlier:
                scores = score(row.prompt)
                chosen = choose(row, earlier, [scores[index[item.id]] for item in earlier])
                yield _in_front(row, chosen, count, max_length)


def _in_front(row: TextExample, chosen: Sequence[TextExample], count: Count, max_length: int) -> Rewritten:
    """Prepend items to a row's prompt, the best one nearest to it, as far as they fit."""
    prompt, tokens, sources, cut = row.prompt, min(row.tokens, max_length), [], False
    for item in reversed(chosen):
        text = f"{readable(item.prompt)} {item.target}\n"
        extended = TextExample(row.id, row.user, prompt, row.target, row.item, row.time, tokens)
        kept, size = _fit(text, extended, count, max_length)
        cut = cut or kept != text
        # A truncated item is useful only if it keeps more than its answer.
        if len(_words(kept)) <= len(_words(item.target)):
            break
        prompt, tokens = f"{kept}\n{prompt}", size
        sources.append(item.id)
    return Rewritten(row.id, prompt, max(tokens, row.tokens), tuple(sources), cut)


def _fit(text: str, row: TextExample, count: Count, max_length: int) -> tuple[str, int]:
    """Return the longest suffix of `text`, by words, that fits in front of a row, and the token count of both."""
    tokens = count(f"{text}\n{row.prompt}", row.target)
    if tokens <= max_length:
        return text, tokens
    words = text.split(" ")
    low, high = 0, len(words)  # number of words kept: `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = count(" ".join(words[-middle:]) + "\n" + row.prompt, row.target) <= max_length
        low, high = (middle, high) if fits else (low, middle)
    kept = " ".join(words[-low:]) if low else ""
    return kept, count(f"{kept}\n{row.prompt}", row.target) if kept else count(row.prompt, row.target)


def _scorer(history: Sequence[TextExample]) -> Callable[[str], Sequence[float]]:
    """Return a function from a query text to the BM25 scores of a user's items."""
    documents = [_words(f"{item.prompt} {item.target}") for item in history]
    if not any(documents):
        return lambda _: [0.0] * len(history)
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    known = set(index.vocab_dict)

    def score(text: str) -> Sequence[float]:
        words = [word for word in _words(text) if word in known]
        if not words:
            return [0.0] * len(history)
        found: list[float] = np.asarray(index.get_scores(words)).tolist()
        return found

    return score


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _with_earlier(
    source: Dataset, user: str, history: Sequence[TextExample] | None = None
) -> Iterator[tuple[TextExample, list[TextExample]]]:
    """Yield a user's history rows and queries, each with the history items strictly earlier than it."""
    items = source.history(user) if history is None else history
    queries = list(source.queries(user))
    # As in the split: if one row of a user has no time, the order of the user's rows is not chronological.
    timed = all(row.time is not None for row in (*items, *queries))
    for at, row in enumerate(items):
        yield row, [item for item in items if _before(item, row)] if timed else list(items[:at])
    for query in queries:
        yield query, [item for item in items if _before(item, query)] if timed else list(items)


def _before(item: TextExample, row: TextExample) -> bool:
    assert item.time is not None and row.time is not None
    return item.time < row.time
