"""A user's next prompt reuses keys and values of the last one, no other user's does; what is dropped stays dropped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proper.adapters.records import Head
from proper.adapters.store import UserRecord
from proper.inference import PersonalizedModel, load
from proper.inference.engine import Engine
from proper.inference.forward import columns_left, prefill
from proper.inference.kv_cache import RowCache
from proper.inference.prefix_cache import MIN_TOKENS, CachedPrefix, PrefixCache, PrefixKey, States
from proper.inference.requests import EngineLimits
from proper.inference.sampling import Sampling
from proper.run_folder import Tier
from tests import decoding
from tests.inference.submission import Listener, finish_settled, submit

TIERS = (Tier.USERS, Tier.GROUPS, Tier.POPULATION)
USERS = ("u0", "u1", "u2", "group", "stranger", None)
OPENINGS = ((*range(100, 120),), (*range(100, 118), 7, 8))
"""Two prompts that begin with the same 18 tokens."""
TURNS = ((30, 31), (30, 32, 33), (40,))


class Alone:
    """The oracle: transformers' `generate` on one row."""

    def __init__(self, folder: Path) -> None:
        self.models = {tier: load(folder, tier) for tier in TIERS}
        self._known: dict[tuple[tuple[int, ...], str | None, int, Tier], list[int]] = {}

    def __call__(self, prompt: Sequence[int], user: str | None, length: int = 4, tier: Tier = Tier.USERS) -> list[int]:
        key, model = (tuple(prompt), user, length, tier), self.models[tier]
        if key not in self._known:
            rows, sampling = model.rows([user]), Sampling(length)
            (self._known[key],) = decoding.theirs(model.model, [prompt], rows, sampling, model.encoder.end)
        return self._known[key]


@pytest.fixture(scope="module")
def alone(tiny_run: Path) -> Iterator[Alone]:
    oracle = Alone(tiny_run)
    yield oracle
    for model in oracle.models.values():
        model.close()


def ask(engine: Engine, prompt: Sequence[int], user: str | None, length: int = 4, tier: Tier = Tier.USERS) -> Listener:
    return submit(engine, prompt, user, length, tier=tier)[0]


def answer(engine: Engine, prompt: Sequence[int], user: str | None, tier: Tier = Tier.USERS) -> tuple[list[int], int]:
    """The answer, and how many of the prompt's tokens were there already."""
    before, heard = engine.stats().reused_tokens, ask(engine, prompt, user, tier=tier)
    finish_settled(engine)
    return heard.tokens, engine.stats().reused_tokens - before


conversations = st.lists(
    st.tuples(st.sampled_from(USERS), st.sampled_from(TIERS), st.integers(0, 1), st.lists(st.integers(0, 2))),
    min_size=1,
    max_size=5,
)


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=conversations, budget=st.sampled_from([0, 7000, 1 << 20]), rows=st.integers(1, 4), pause=st.integers(0, 6))
def test_chats_are_answered_as_without(
    shared: PersonalizedModel,
    alone: Alone,
    asked: list[tuple[str | None, Tier, int, list[int]]],
    budget: int,
    rows: int,
    pause: int,
) -> None:
    """Everybody's chats begin alike, and go on from what was answered; turns of all of them run together."""
    engine = Engine(shared, EngineLimits(rows, slots=2, prefix_bytes=budget))
    chats = [(user, tier, [*OPENINGS[opening]], turns[:2]) for user, tier, opening, turns in asked]
    for turn in range(3):
        running = []
        for user, tier, said, turns in chats:
            if turn <= len(turns):
                running.append((ask(engine, said, user, tier=tier), user, tier, said))
            for _ in range(pause):
                engine.step()
        finish_settled(engine)
        assert engine.stats().prefix_bytes <= budget
        for heard, user, tier, said in running:
            assert heard.tokens == alone(said, user, tier=tier)
            said += heard.tokens
        for _, _, said, turns in chats:
            if turn < len(turns):
                said += TURNS[turns[turn]]
    engine.close()


def test_the_next_turn_computes_only_what_is_new(shared: PersonalizedModel, alone: Alone) -> None:
    engine, said = Engine(shared), [*OPENINGS[0]]
    heard, reused = answer(engine, said, "u0")
    assert reused == 0
    said += [*heard, 30, 31]
    heard, reused = answer(engine, said, "u0")
    # The last token of an answer was never an input.
    assert heard == alone(said, "u0") and reused == len(said) - 3
    assert answer(engine, said, "u0") == (heard, 0), "the same prompt is computed as it was the first time"
    stats = engine.stats()
    assert stats.reused_tokens < stats.prompt_tokens and stats.prefix_bytes == 256 * (len(said) + 3), "one entry"
    engine.close()
    off = Engine(shared, EngineLimits(prefix_bytes=0))
    assert [answer(off, said, "u0")[1] for _ in range(2)] == [0, 0] and off.stats().prefix_bytes == 0
    off.close()


def test_one_prompt_of_two_people(shared: PersonalizedModel, alone: Alone) -> None:
    """One after the other and at once: each gets what they get alone, and reuses their own only."""
    prompt = OPENINGS[0]
    engine = Engine(shared)
    for user in USERS:
        assert answer(engine, prompt, user) == (alone(prompt, user), 0)
    longer = (*prompt, 30, 31)
    for user in USERS:
        kept = user in ("u0", "u1", "u2", "group")
        assert answer(engine, longer, user) == (alone(longer, user), len(prompt) if kept else 0)
    heard = {user: ask(engine, prompt, user) for user in USERS}
    finish_settled(engine)
    engine.close()
    assert {user: one.tokens for user, one in heard.items()} == {user: alone(prompt, user) for user in USERS}


def test_nobody_is_touched_by_what_another_left(copied: PersonalizedModel, alone: Alone) -> None:
    """One user's keys and values are poisoned: the user's own next answer shows it, no other user's does."""
    assert copied.store is not None
    embedding = copied.store.head("group")
    assert embedding is not None
    copied.store.put([UserRecord("twin", "groups", embedding.embedding)])
    engine, prompt = Engine(copied), OPENINGS[0]
    who: list[tuple[str | None, Tier]] = [
        *(("u0", tier) for tier in TIERS),
        ("u1", "users"),
        ("u1", "groups"),
        ("group", "groups"),
        ("twin", "groups"),
        (None, "users"),
    ]
    clean = {one: answer(engine, prompt, *one)[0] for one in who}
    assert clean["group", "groups"] == clean["twin", "groups"], "even their keys and values are equal"
    for owner in (("u0", "users"), ("group", "groups")):
        for (origin, _), states in engine._prefixes._kept.items():
            if origin.user == owner[0] and origin.adapter == (owner[1] == "users"):
                for keys, values in states:
                    keys.fill_(3.0)
                    values.fill_(-5.0)
        longer = (*prompt, 30, 31)
        assert answer(engine, longer, *owner)[0] != alone(longer, owner[0], tier=owner[1]), "it is used"
        engine.forget("", owner[0])
        for one in who:
            if one != owner:
                assert answer(engine, prompt, *one)[0] == clean[one], one
    engine.close()


def test_another_version_has_prefixes_of_its_own(copied: PersonalizedModel, alone: Alone) -> None:
    assert copied.store is not None
    engine, prompt = Engine(copied), OPENINGS[0]
    assert answer(engine, prompt, "u0") == (alone(prompt, "u0"), 0)
    held = engine.stats().prefix_bytes
    other = copied.store.get("u1")
    assert other is not None and held > 0
    copied.store.put([replace(other, user="u0")])
    longer = (*prompt, 30, 31)
    assert answer(engine, longer, "u0") == (alone(longer, "u1"), 0)
    held += 2 * 256
    assert engine.stats().prefix_bytes == held, "the old one's are gone"
    late = ask(engine, prompt, "u0", length=8)
    while not late.tokens:
        engine.step()
    copied.store.rollback("u0")
    finish_settled(engine)
    assert late.tokens == alone(prompt, "u1", length=8), "it runs on the old version"
    assert engine.stats().prefix_bytes == held, "and leaves nothing"
    assert answer(engine, longer, "u0") == (alone(longer, "u0"), 0)
    assert engine.stats().prefix_bytes == held
    engine.close()


def test_those_who_are_deleted_leave_nothing(copied: PersonalizedModel) -> None:
    assert copied.store is not None
    engine, prompt = Engine(copied, EngineLimits(rows=1)), OPENINGS[0]
    answer(engine, prompt, "u1")
    others = engine.stats().prefix_bytes
    answer(engine, prompt, "u0")
    answer(engine, OPENINGS[1], "u0", tier="groups")
    assert engine.stats().prefix_bytes > others
    running = ask(engine, prompt, "u0", length=8)
    while not running.tokens:
        engine.step()
    waiting = ask(engine, prompt, "u0", tier="groups")
    engine.step()
    copied.store.delete("u0")
    engine.forget("", "u0")
    engine.step()
    assert engine.stats().prefix_bytes == others and not running.done
    finish_settled(engine)
    assert waiting.done and engine.stats().prefix_bytes == others
    engine.close()


@pytest.mark.parametrize("window", ["even", "odd"])
def test_logits_are_those_of_the_whole_prompt(shared: PersonalizedModel, window: str) -> None:
    """Rows of mixed users, with prefixes of all lengths: also longer than what their pass leaves out."""
    generator = torch.Generator().manual_seed(3)
    lengths = (31, 20, 27, 8, 31) if window == "odd" else (24, 24)
    prompts = [torch.randint(3, 8000, (length,), generator=generator).tolist() for length in lengths]
    users = ["u0", "u1", "group", None, "u0"][: len(lengths)]
    model, rows = shared.model, shared.rows(users)
    with torch.no_grad():
        whole = RowCache(5, 40)
        expected = prefill(model, whole, prompts, rows)
        shares = [min(len(prompt) - 1, 12 + 4 * at) for at, prompt in enumerate(prompts)]
        prefixes = [
            CachedPrefix(tuple(prompt[:share]), tuple((k[:, :share].clone(), v[:, :share].clone()) for k, v in states))
            for prompt, share, states in zip(prompts, shares, map(whole.states, range(len(prompts))), strict=True)
        ]
        cache = RowCache(5, 40)
        found = prefill(model, cache, prompts, rows, prefixes)
    assert columns_left(prompts, prefixes) < max(lengths)
    assert float((found - expected).abs().max()) < 1e-4
    for at in range(len(prompts)):
        for ours, theirs in zip(cache.states(at), whole.states(at), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def origin(number: int, version: int = 1) -> PrefixKey:
    head = Head(version, "users", torch.full((3,), float(number % 2)), bytes([version]))
    return PrefixKey.of("", f"u{number // 2}", head, adapter=bool(number % 2))


def states(who: PrefixKey, tokens: Sequence[int]) -> States:
    """Numbers that say whose they are and for which tokens."""
    mark = float(hash(who) % 1000)
    keys = torch.tensor(tokens, dtype=torch.float32)[None, :, None].expand(1, -1, 2) + mark
    return ((keys, -keys),)


texts = st.tuples(st.integers(0, 40), st.integers(0, 2)).map(lambda it: (*range(it[0]), *([99] * it[1])))
actions = st.lists(st.tuples(st.sampled_from(["keep", "find", "forget"]), st.integers(0, 5), texts), max_size=40)


@given(done=actions, budget=st.sampled_from([0, 800, 2000, 1 << 20]))
def test_what_is_found_is_ones_own_and_begins_the_prompt(
    done: list[tuple[str, int, tuple[int, ...]]], budget: int
) -> None:
    prefixes, kept = PrefixCache(budget), dict[PrefixKey, list[tuple[int, ...]]]()
    for action, number, tokens in done:
        who = origin(number)
        if action == "keep":
            prefixes.keep(who, tokens, states(who, tokens))
            kept.setdefault(who, []).append(tokens)
        elif action == "forget":
            prefixes.forget("", who.user)
            kept = {other: texts for other, texts in kept.items() if other.user != who.user}
        elif tokens and (found := prefixes.find(who, tokens)) is not None:
            size = len(found.tokens)
            assert MIN_TOKENS <= size < len(tokens) and found.tokens == tokens[:size] and 2 * size >= len(tokens)
            for ours, expected in zip(found.states, states(who, tokens[:size]), strict=True):
                assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])
            assert any(other[:size] == tokens[:size] for other in kept[who])
        elif tokens and budget == 1 << 20:
            best = max((shared_by(other, tokens) for other in kept.get(who, []) if len(other) >= MIN_TOKENS), default=0)
            assert min(best, len(tokens) - 1) < max(MIN_TOKENS, len(tokens) / 2)
        assert prefixes.bytes <= budget
        assert prefixes.bytes == sum(k.nbytes + v.nbytes for pairs in prefixes._kept.values() for k, v in pairs)
        assert prefixes.owners() == {(owner.tenant, owner.user) for owner, _ in prefixes._kept}
        assert {entry for own in prefixes._of_user.values() for entry in own} == set(prefixes._kept)


def shared_by(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length


def test_the_least_recently_used_makes_room() -> None:
    prefixes = PrefixCache(3 * 20 * 16)
    who, tokens = [origin(number) for number in range(0, 8, 2)], tuple(range(20))
    for one in who[:3]:
        prefixes.keep(one, tokens, states(one, tokens))
    assert prefixes.find(who[0], (*tokens, 5)) is not None
    prefixes.keep(who[3], tokens, states(who[3], tokens))
    assert [prefixes.find(one, (*tokens, 5)) is not None for one in who] == [True, False, True, True]
    prefixes.keep(who[1], tuple(range(61)), states(who[1], range(61)))
    assert len(prefixes) == 3, "what is larger than all is not worth the others"


def test_embeddings_versions_and_tiers_are_told_apart() -> None:
    head = Head(1, "users", torch.tensor([1.0, 2.0]), b"a")
    heads = [head, replace(head, version=2), replace(head, checksum=b"b"), replace(head, embedding=torch.zeros(2))]
    origins = {PrefixKey.of(tenant, user, one, adapter=on) for tenant in ("", "t") for user in "ab" for one in heads
               for on in (False, True)}  # fmt: skip
    assert len(origins) == 32
