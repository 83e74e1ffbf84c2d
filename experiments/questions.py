"""The ten questions: what is asked, which results answer, and which pairs count.

Knows nothing about numbers: an answer is a rule from `findings_answers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from experiments.answers import Tests, controls, each, grid, short, steps
from proper.evaluation.comparisons import CONTROLS, STEPS


@dataclass(frozen=True)
class Source:
    """A committed result.

    Attributes:
        pairs: (method, against) of its table; the other way round is turned.
        inside: keys that lead to the part of the file that counts.
        items: how many items of a history were kept, for curves.
    """

    name: str
    file: str
    pairs: tuple[tuple[str, str], ...]
    inside: tuple[str, ...] = ()
    items: int = 0


@dataclass(frozen=True)
class Question:
    """One section of the page. `key` are the pairs that are also said in words; all of them where it is empty."""

    number: int
    title: str
    asked: str
    sources: tuple[Source, ...]
    answer: Callable[[Tests], str]
    command: str
    key: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    curve: bool = False


RIVALS = (*STEPS, *CONTROLS, ("users", "user-majority"), ("users", "global-majority"))
PROGRESSIVE = (("users", "end-to-end"),)
MORE_ITEMS = "users[users.max_items=64]"
CATEGORY, HEADLINE = (
    f"users[rows={asked}][population.max_tokens=150000][groups.max_tokens=150000][users.max_items=12]"
    for asked in ("Category", "Headline")
)
TITLE_ONLY, ALL_TITLE = "population[rows=Title]", "groups-shared-e[rows=Title]"
HEADLINE_ONLY, ALL_HEADLINE = "population[rows=Headline]", "groups-shared-e[rows=Headline]"
PICKED = "The best value was picked by one seed on these very queries, so that seed flatters it in the second table."
GROUPS_GRID = "groups[groups.{}={}]"


def _grid(key: str, values: Sequence[object]) -> tuple[tuple[str, str], ...]:
    return (*((GROUPS_GRID.format(key, value), "groups") for value in values), ("groups", "population"))


def _short(items: int) -> Source:
    others = ("groups", "oppu", "per-user-only", "rag", "user-majority")
    pairs = [(f"users[history={items}]", f"{other}[history={items}]") for other in others]
    pairs += [(f"groups[history={items}]", "population"), (f"users[history={items}]", "population")]
    return Source(f"{items} item{'s' if items > 1 else ''}", f"findings/short-{items}.json", tuple(pairs), items=items)


def _command(number: int) -> str:
    return f"recipes/findings.sh --only {number}"


QUESTIONS = (
    Question(
        1,
        "Population, groups, users",
        "Does each stage gain on the one before? The paper states +4.69 % and +5.02 % relative on LaMP with 7 B.",
        (
            Source("huffpost-label", "huffpost-label.json", STEPS),
            Source("movielens-rating", "movielens-rating.json", STEPS),
            Source("acl-title", "acl-title.json", STEPS),
        ),
        steps,
        "for set in huffpost-label movielens-rating acl-title; do proper run configs/$set.yaml --out runs/$set; done",
        STEPS,
        (
            "A gain here is over a stage 1 that saw one pass over a small budget. "
            "Question 10 says how much of it is the users.",
        ),
    ),
    Question(
        2,
        "Progressive against end to end",
        "Are three stages better than experts and adapters trained together from the backbone, on the same rows?",
        (
            Source("huffpost-label", "findings/progressive-huffpost.json", PROGRESSIVE),
            Source("movielens-rating", "findings/progressive-movielens.json", PROGRESSIVE),
            Source("acl-title", "findings/progressive-acl.json", PROGRESSIVE),
            Source(
                "movielens-rating, adapters of 64 items",
                "findings/progressive-more-items.json",
                ((MORE_ITEMS, "users"), (MORE_ITEMS, "end-to-end")),
            ),
        ),
        each(*PROGRESSIVE, (MORE_ITEMS, "users"), (MORE_ITEMS, "end-to-end")),
        _command(2),
        notes=(
            "Against the paper, training all at once is not worse here, and on two sets better. Two reasons "
            "seem likely. With budgets this small three stages warm up and cool down thrice, one goes on learning. And "
            "equal tokens are not equal knowledge of a user: end to end, an adapter also learns from its user's rows "
            "of stages 1 and 2, while a stage-3 adapter sees the newest 12, 24 or 8. So the last table lets it see 64: "
            "on that seed no difference to end to end is shown, nor, though, is one to the adapters of 24.",
        ),
    ),
    Question(
        3,
        "How many experts",
        "E in {1, 2, 5, 8}, stage 2 trained on one population each time; the paper finds 5 best of {2, 5, 8}.",
        (
            Source("movielens", "findings/experts.json", _grid("experts", (1, 2, 8))),
            Source("movielens, the best one", "findings/winners.json", _grid("experts", (8,))),
        ),
        grid("E = 5"),
        _command(3),
        notes=(
            PICKED,
            "The paper's order of 2, 5 and 8 does not show here; that one expert is worse does, in the loss.",
        ),
    ),
    Question(
        4,
        "How large an embedding",
        "D in {32, 64, 128, 256}, stage 2 trained on one population each time.",
        (
            Source("movielens", "findings/embedding.json", _grid("user_embedding", (32, 64, 256))),
            Source("movielens, the best one", "findings/winners.json", _grid("user_embedding", (256,))),
        ),
        grid("D = 128"),
        _command(4),
        notes=(
            PICKED,
            "The default stays: one set and a second look that shows nothing are too little to change it by.",
        ),
    ),
    Question(
        5,
        "The constraint",
        "On users (the default), on experts, as released (it has no gradient), and none.",
        (
            Source(
                "movielens",
                "findings/constraint.json",
                (
                    ("groups-no-constraint", "groups"),
                    ("constraint-experts", "groups"),
                    ("groups[groups.constraint.kind=released]", "groups"),
                    ("groups", "population"),
                ),
            ),
        ),
        grid("users"),
        _command(5),
        notes=(
            "As released, the constraint has no gradient: its figures are those of no constraint, to the digit. On "
            "users it does what it is for, their mixtures differ more (the last column), but answers gain nothing that "
            "shows; on experts it sends everybody through the same mixture.",
        ),
    ),
    Question(
        6,
        "Forms of the LoRA-aware router",
        "Residual (the default), the paper's, and stage 3a alone.",
        (
            Source(
                "movielens-rating",
                "findings/routers-movielens.json",
                (
                    ("users", "users-paper"),
                    ("users", "users-no-router"),
                    ("users", "groups"),
                    ("users-paper", "groups"),
                    ("users-no-router", "groups"),
                ),
            ),
        ),
        each(("users", "users-paper"), ("users", "users-no-router")),
        _command(6),
        notes=(
            "Against the paper, stage 3b adds nothing that shows to 3a. The paper's form puts a router that was "
            "trained on few rows in place of the group's; the residual one adds to the group's.",
        ),
    ),
    Question(
        7,
        "Short histories",
        "60 people with 1, 5 or 20 items kept, stage 1 without them; and the 100 shortest histories of everybody.",
        (
            *(_short(items) for items in (1, 5, 20)),
            Source(
                "bottom 100",
                "findings/bottom-100.json",
                tuple(
                    ("users", other)
                    for other in ("groups", "population", "oppu", "per-user-only", "rag", "user-majority")
                ),
                inside=("slice",),
            ),
        ),
        short,
        _command(7),
        notes=(
            "The group model hardly moves here, unlike in question 1. Likely, but not tested: its budget is spread "
            "over all 610 people, so it sees few rows of anybody, and these 60 have few to show.",
            "Population, OPPU and RAG answer everybody with the same rating, which is why their errors agree to the "
            "digit; their losses differ. A person's mean rating over the same few items is the better answer.",
        ),
        curve=True,
    ),
    Question(
        8,
        "Train on one task, test on another",
        "Authors trained on sections alone write headlines, and the other way round; and what was trained on papers "
        "writes headlines.",
        (
            Source(
                "headlines, HuffPost",
                "findings/two-tasks.json",
                ((CATEGORY, HEADLINE), (CATEGORY, "base")),
                inside=("tasks", "Headline"),
            ),
            Source(
                "sections, HuffPost",
                "findings/two-tasks.json",
                ((HEADLINE, CATEGORY), (HEADLINE, "base")),
                inside=("tasks", "Category"),
            ),
            Source(
                "ACL titles to HuffPost headlines",
                "findings/acl-to-headlines.json",
                (
                    (TITLE_ONLY, "base"),
                    (TITLE_ONLY, HEADLINE_ONLY),
                    (ALL_TITLE, "base"),
                    (ALL_TITLE, TITLE_ONLY),
                    (ALL_TITLE, ALL_HEADLINE),
                ),
            ),
        ),
        each(
            *((CATEGORY, "base"), (CATEGORY, HEADLINE), (HEADLINE, "base"), (HEADLINE, CATEGORY)),
            *((TITLE_ONLY, "base"), (TITLE_ONLY, HEADLINE_ONLY), (ALL_TITLE, TITLE_ONLY)),
        ),
        _command(8),
        notes=(
            "Answers are free text here, so whoever was trained on one task writes its kind of answer under every "
            "prompt; of this transfer the paper's larger backbone may show more.",
            "No author is in both ACL and HuffPost, so of stage 2 only the experts can carry over: everybody has the "
            "one embedding that was trained with them.",
        ),
    ),
    Question(
        9,
        "Two tasks trained together",
        "One run on sections and headlines of the same authors, groups shared, against a run a task of half the size.",
        (
            Source(
                "sections, HuffPost", "findings/two-tasks.json", (("users", CATEGORY),), inside=("tasks", "Category")
            ),
            Source(
                "headlines, HuffPost", "findings/two-tasks.json", (("users", HEADLINE),), inside=("tasks", "Headline")
            ),
        ),
        each(("users", CATEGORY), ("users", HEADLINE)),
        _command(9),
    ),
    Question(
        10,
        "Controls",
        "Is a gain knowledge of the user, or more training? Against one LoRA on stage 2's rows, one embedding for all, "
        "another user's embedding and adapter, and ids shuffled.",
        (
            Source("huffpost-label", "findings/controls-huffpost.json", RIVALS),
            Source("movielens-rating", "findings/controls-movielens.json", RIVALS),
            Source("movielens, 200 users", "findings/groups-controls.json", (*STEPS[:1], *CONTROLS[:2])),
        ),
        controls,
        _command(10),
        (*CONTROLS, *RIVALS[-2:]),
        (
            "A user's usual answer comes from the whole history; an adapter saw the newest 12 items (HuffPost) or 24.",
            "Users were not trained in the run of 200 users, so it is about the groups' step alone.",
        ),
    ),
)
