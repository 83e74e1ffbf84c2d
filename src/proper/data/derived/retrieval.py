"""Retrieval-augmented prompts: the k most similar history items or a user profile, prepended to each prompt.

Sources are only items of the same user's history that are strictly earlier than the row, for training rows and queries
alike. Items are found by BM25, by embeddings that come in as vectors, or by both. BM25 is `bm25s` with its defaults
(Lucene's form); document frequencies are counted over the user's whole history, never over queries. The token count
comes in as a callable.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import bm25s
import numpy as np
from numpy.typing import NDArray

from proper.data.chat import readable
from proper.data.dataset import Dataset
from proper.data.derived.copies import Count, Rewritten, rewrite
from proper.data.histories import TextExample
from proper.data.words import is_spaceless, search_words

ProfileWriter = Callable[[Sequence[TextExample], str], str]
"""Function from earlier items (oldest first) and the kind of task to a text about the user."""


Floats = NDArray[np.floating[Any]]
Indices = NDArray[np.int64]
Vectors = Mapping[int, NDArray[np.float32]]
"""Embeddings of length 1, `(D,)`, by row id."""

Kind = Literal["bm25", "embedding", "both"]
_MIN_TOKENS = 24
"""Tokens of an item below which fewer items are better than shorter ones."""

_FUSION = 60
"""Constant of reciprocal rank fusion (Cormack et al., 2009)."""


def retrieve(
    source: Dataset,
    path: Path,
    k: int,
    count: Count,
    max_length: int,
    vectors: Vectors | None = None,
    kind: Kind = "bm25",
    only: Set[int] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `source` to `path` with the k best earlier items prepended to every prompt, the best one last.

    Items are ranked by BM25, by the cosine of `vectors`, or by both: the sum of 1 / (60 + rank). A row without a vector
    has BM25 alone. If items and row exceed `max_length` tokens, the items share what the row leaves: longer ones are
    truncated at their front, then left out, the worst first. Only the rows with the ids `only`, if given, get items.
    `advance` is called with the number of rows done.
    """
    fused = vectors if kind != "bm25" else None

    def rewritten() -> Iterator[Rewritten]:
        for user in source.users():
            history = source.history(user.id)
            if only is not None and not user.queries and only.isdisjoint(item.id for item in history):
                continue
            score, known = _scorer(history), _Known.of(history, fused)
            for row, earlier in _with_earlier(source, user.id, history):
                if only is not None and row.id not in only:
                    continue
                if earlier:
                    scores = score(row.prompt)[: len(earlier)]
                    order = _ranking(scores, known.cosines(row.id, len(earlier)), kind)
                    yield _in_front(row, [earlier[at] for at in order[-k:]], count, max_length)
                advance(1)

    rewrite(source, path, f"retrieved {k} {kind}", rewritten(), max_length)


def with_items(row: TextExample, earlier: Sequence[TextExample], k: int, count: Count, max_length: int) -> Rewritten:
    """Return one row with the k best of some earlier items, by BM25, in front of its prompt, as `retrieve` does."""
    order = _ranking(_scorer(earlier)(row.prompt), None, "bm25")
    return _in_front(row, [earlier[at] for at in order[-k:]], count, max_length)


def _ranking(scores: Floats, likeness: tuple[Indices, Floats] | None, kind: Kind) -> list[int]:
    """Return item indices, the best last, ties by age: by BM25 `(N,)`, by cosines of some items, or by both."""
    words = np.argsort(scores, kind="stable")
    if likeness is None:
        return [*map(int, words)]
    at, cosines = likeness
    order = at[np.argsort(cosines, kind="stable")]
    if kind == "both":
        merged = np.zeros(len(scores))
        for ranking in (words, order):
            merged[ranking[::-1]] += 1 / (_FUSION + np.arange(1, len(ranking) + 1))
        order = np.argsort(merged, kind="stable")
    return [*map(int, order)]


@dataclass(frozen=True)
class _Known:
    """The vectors of a user's items: the items' indices in ascending order, and the vectors `(N, D)`."""

    vectors: Vectors
    at: Indices
    stacked: Floats

    @classmethod
    def of(cls, history: Sequence[TextExample], vectors: Vectors | None) -> _Known:
        at = [index for index, item in enumerate(history) if vectors and item.id in vectors]
        stacked = np.stack([vectors[history[index].id] for index in at]) if vectors and at else np.zeros((0, 0))
        return cls(vectors or {}, np.asarray(at, dtype=np.int64), stacked)

    def cosines(self, row: int, earlier: int) -> tuple[Indices, Floats] | None:
        """Return indices and cosines of the first `earlier` items; None if the row or all of them lack a vector."""
        size = int(np.searchsorted(self.at, earlier))
        if row not in self.vectors or not size:
            return None
        return self.at[:size], self.stacked[:size] @ self.vectors[row]


def add_profiles(
    source: Dataset,
    path: Path,
    kind: str,
    count: Count,
    max_length: int,
    writer: ProfileWriter | None = None,
    only: Set[int] | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Write `source` to `path` with a profile, made from the user's earlier items, prepended to every prompt.

    Only the rows with the ids `only`, if given, get one. `advance` is called with the number of rows done.
    """
    write = writer or template_profile

    def rewritten() -> Iterator[Rewritten]:
        for user in source.users():
            for row, earlier in _with_earlier(source, user.id):
                if only is not None and row.id not in only:
                    continue
                if earlier:
                    text = write(earlier, kind)
                    kept, tokens = _fit(text, row, count, max_length)
                    prompt = f"{kept}\n{row.prompt}" if kept else row.prompt
                    yield Rewritten(row.id, prompt, tokens, tuple(item.id for item in earlier), cut=kept != text)
                advance(1)

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
    answers = [_answer_words(item.target) for item in earlier]
    words = Counter(word for _, long in answers for word in long)
    length = fmean(count for count, _ in answers)
    usual = ", ".join(word for word, _ in words.most_common(8))
    return f"Profile: about {length:.0f} words" + (f", often {usual}." if usual else ".")


# An answer is read again for every later item of its user; the cache holds the longest of histories.
@lru_cache(maxsize=1 << 14)
def _answer_words(answer: str) -> tuple[int, tuple[str, ...]]:
    """Return the number of words of an answer, and its different words of more than three letters, in order."""
    words = search_words(answer)
    return len(words), tuple(dict.fromkeys(word for word in words if len(word) > 3))


def _most(counts: Counter[str], limit: int) -> str:
    total = sum(counts.values())
    return "often " + ", ".join(f"{name} ({count / total:.0%})" for name, count in counts.most_common(limit)) + "."


def _in_front(row: TextExample, chosen: Sequence[TextExample], count: Count, max_length: int) -> Rewritten:
    """Prepend items to a row's prompt, the best one nearest to it, each with its share of what the row leaves."""
    room = max_length - min(row.tokens, max_length)
    # Fewer items where each would be cut to a few words.
    chosen = chosen[-max(1, room // _MIN_TOKENS) :]
    texts: list[str] = []
    cut = False
    for left, item in zip(range(len(chosen), 0, -1), reversed(chosen), strict=True):
        text, share = f"{readable(item.prompt)} {item.target}\n", room // left
        kept = _newest_words(text, share / item.tokens)
        cut = cut or kept != text
        # A truncated item is useful only if it keeps more than its answer.
        if len(search_words(kept)) <= len(search_words(item.target)):
            break
        texts.append(kept)
        room -= min(item.tokens, share)
    return _fitted(row, texts, [item.id for item in reversed(chosen)], cut, count, max_length)


def _fitted(
    row: TextExample, texts: list[str], ids: Sequence[int], cut: bool, count: Count, max_length: int
) -> Rewritten:
    """Shorten the last of `texts`, the worst one, until all fit in front of the row's prompt."""
    while texts:
        prompt = "\n".join([*reversed(texts), row.prompt])
        tokens = count(prompt, row.target)
        if tokens <= max_length:
            return Rewritten(row.id, prompt, tokens, tuple(ids[: len(texts)]), cut)
        cut, size = True, len(_cuts(texts[-1]))
        kept = _newest_words(texts[-1], 1 - max(1 / size, (tokens - max_length) / tokens))
        texts[-1:] = [kept] if kept else []
    return Rewritten(row.id, row.prompt, row.tokens, (), cut)


def _newest_words(text: str, share: float) -> str:
    """Return the last words of a text, a share of all of them."""
    cuts = _cuts(text)
    return _from_word(text, cuts, int(len(cuts) * share) if share < 1 else len(cuts))


def _cuts(text: str) -> list[int]:
    """Return where a text may be cut: at its start, behind spaces, and at letters of scripts without spaces."""
    cuts = [0, *(at + 1 for at, letter in enumerate(text) if letter == " ")]
    return cuts if text.isascii() else sorted({*cuts, *(at for at, one in enumerate(text) if is_spaceless(one))})


def _from_word(text: str, cuts: Sequence[int], keep: int) -> str:
    return text[cuts[-keep] :] if keep > 0 else ""


def _fit(text: str, row: TextExample, count: Count, max_length: int) -> tuple[str, int]:
    """Return the longest suffix of `text`, by words, that fits in front of a row, and the token count of both."""
    tokens = count(f"{text}\n{row.prompt}", row.target)
    if tokens <= max_length:
        return text, tokens
    cuts = _cuts(text)
    low, high = 0, len(cuts)  # number of words kept: `low` fits, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = count(_from_word(text, cuts, middle) + "\n" + row.prompt, row.target) <= max_length
        low, high = (middle, high) if fits else (low, middle)
    kept = _from_word(text, cuts, low)
    return kept, count(f"{kept}\n{row.prompt}", row.target) if kept else count(row.prompt, row.target)


def _scorer(history: Sequence[TextExample]) -> Callable[[str], Floats]:
    """Return a function from a query text to the BM25 scores `(N,)` of a user's items."""
    documents = [search_words(f"{item.prompt} {item.target}") for item in history]
    if not any(documents):
        return lambda _: np.zeros(len(history))
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    known = set(index.vocab_dict)

    def score(text: str) -> Floats:
        words = [word for word in search_words(text) if word in known]
        return np.asarray(index.get_scores(words)) if words else np.zeros(len(history))

    return score


def _with_earlier(
    source: Dataset, user: str, history: Sequence[TextExample] | None = None
) -> Iterator[tuple[TextExample, list[TextExample]]]:
    """Yield a user's history rows and queries, each with the history items strictly earlier than it."""
    items = source.history(user) if history is None else history
    queries = list(source.queries(user))
    # As in the split: if one row of a user has no time, the order of the user's rows is not chronological.
    timed = all(row.time is not None for row in (*items, *queries))
    # Items are in the order of their times.
    times = [item.time for item in items if item.time is not None]
    for at, row in enumerate(items):
        yield row, list(items[: bisect_left(times, row.time) if timed and row.time is not None else at])
    for query in queries:
        yield query, list(items[: bisect_left(times, query.time)] if timed and query.time is not None else items)
