"""Answers of the engine are those of each user alone, whatever comes, goes or waits beside them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import InputError, ProperError
from proper.inference import PersonalizedModel, load
from proper.inference.adapter_manager import DAMAGED
from proper.inference.engine import Engine
from proper.inference.requests import EngineLimits, Event, Request, RequestHandle, Started, Token
from proper.inference.sampling import Sampling
from proper.run_folder import Tier
from tests import decoding
from tests.inference.submission import Listener, finish, submit

TIERS = (Tier.USERS, Tier.GROUPS, Tier.POPULATION)
PROMPTS = (
    "What does this say?",
    "Short",
    "A rather longer text than both of the others: what does it say, and to whom does it say it?",
    "Well?",
)
USERS = (*(f"u{at}" for at in range(8)), "group", "stranger", None)


class Alone:
    """The oracle: transformers' `generate`, one request at a time, on models of its own, one for each tier."""

    def __init__(self, folder: Path) -> None:
        self.models = {tier: load(folder, tier) for tier in TIERS}
        self.model = self.models["users"]
        self._known: dict[tuple[int, str | None, int, Tier], str] = {}

    def __call__(self, prompt: int, user: str | None, length: int, tier: Tier = Tier.USERS) -> str:
        key = prompt, user, length, tier
        if key not in self._known:
            self._known[key] = decoding.alone(self.models[tier], PROMPTS[prompt], user, Sampling(length))
        return self._known[key]

    def gates(self, prompt: int, user: str | None, tier: Tier, tokens: list[int]) -> list[list[float]]:
        """Each token's gates, from the softmax of every module's router over the whole text up to there."""
        model, found = self.models[tier], []
        ids = list(model.encoder.prompt(PROMPTS[prompt], room=6))
        for token in tokens:
            rows = replace(model.rows([user]), users=torch.tensor([0]), mask=torch.ones(1, len(ids), dtype=torch.bool))
            rows.mask[:, :-1] = False  # type: ignore[index]
            with torch.no_grad(), model.model.routing.use(rows):
                model.model.backbone.model(input_ids=torch.tensor([ids]))
            found.append(model.model.routing.stacked().mean(0)[0].tolist())
            ids.append(token)
        return found

    def close(self) -> None:
        for model in self.models.values():
            model.close()


@pytest.fixture(scope="module")
def alone(tiny_run: Path) -> Iterator[Alone]:
    oracle = Alone(tiny_run)
    yield oracle
    oracle.close()


def ask(
    engine: Engine, prompt: int, user: str | None, length: int = 6, **wanted: Any
) -> tuple[Listener, RequestHandle]:
    return submit(engine, engine.model.encoder.prompt(PROMPTS[prompt], room=length), user, length, **wanted)


def text(engine: Engine, heard: Listener) -> str:
    decoded: str = engine.model.encoder.tokenizer.decode(heard.tokens, skip_special_tokens=True)
    return decoded.strip()


visits = st.tuples(
    st.integers(0, 3),  # prompt
    st.sampled_from(USERS),
    st.integers(1, 8),  # length
    st.integers(0, 4),  # steps before it comes
    st.none() | st.integers(0, 6),  # steps after which it is cancelled
    st.sampled_from(TIERS),
    st.booleans(),  # whether gates are wanted
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.lists(visits, min_size=1, max_size=14),
    rows=st.integers(1, 5),
    slots=st.integers(1, 4),
    prefill=st.sampled_from([1, 40, 500]),
    patience=st.integers(0, 3),
)
def test_everybody_is_answered_as_alone(
    shared: PersonalizedModel,
    alone: Alone,
    asked: list[tuple[int, str | None, int, int, int | None, Tier, bool]],
    rows: int,
    slots: int,
    prefill: int,
    patience: int,
) -> None:
    engine = Engine(shared, EngineLimits(rows, slots, prefill, patience))
    running: list[tuple[Listener, RequestHandle, int | None]] = []
    for prompt, user, length, pause, leave, tier, gates in asked:
        for _ in range(pause):
            engine.step()
        running.append((*ask(engine, prompt, user, length, tier=tier, gates=gates), leave))
        for heard, ticket, after in running:
            if after is not None and len(heard.tokens) >= after:
                ticket.cancel()
    finish(engine)
    for (prompt, user, length, _, _, tier, gates), (heard, ticket, _) in zip(asked, running, strict=True):
        whole = alone(prompt, user, length, tier)
        told = [event.gates is not None for event in heard.events if isinstance(event, Token)]
        assert all(told) if gates and tier != "population" else not any(told)
        if ticket.cancelled and heard.end.reason == "cancelled":
            assert whole.startswith(text(engine, heard).rstrip("\N{REPLACEMENT CHARACTER}"))
            continue
        assert text(engine, heard) == whole
        assert heard.started.tier == alone.models[tier].tier(user)
        assert heard.end.reason in ("stop", "length")
    stats = engine.stats()
    assert (stats.running, stats.waiting) == (0, 0)
    assert sum(stats.tokens.values()) == sum(len(heard.tokens) for heard, _, _ in running)
    engine.close()


def test_long_traffic_goes_past_the_end_of_the_buffers(shared: PersonalizedModel, alone: Alone) -> None:
    engine = Engine(shared, EngineLimits(3, 3))
    running = []
    for at in range(60):
        running.append((at, ask(engine, at % 4, USERS[at % 11], 8)[0]))
        engine.step()
    finish(engine)
    assert engine.stats().steps > 130, "the cursor has come round"
    for at, heard in running:
        assert text(engine, heard) == alone(at % 4, USERS[at % 11], 8)
    engine.close()


def test_the_same_prompt_of_two_users_at_once(shared: PersonalizedModel, alone: Alone) -> None:
    engine = Engine(shared)
    heard = {user: ask(engine, 2, user)[0] for user in USERS}
    finish(engine)
    answers = {user: text(engine, one) for user, one in heard.items()}
    assert answers == {user: alone(2, user, 6) for user in USERS}
    assert len(set(answers.values())) == len(USERS) - 1, "only the two unknown ones agree"
    engine.close()


def test_all_tiers_in_one_batch(shared: PersonalizedModel, alone: Alone) -> None:
    engine = Engine(shared, EngineLimits(rows=12, slots=4))
    asked = [(prompt, user, tier) for prompt, user in ((0, "u0"), (2, "u1")) for tier in TIERS]
    heard = [ask(engine, prompt, user, tier=tier)[0] for prompt, user, tier in asked]
    finish(engine)
    assert engine.stats().steps < 12, "they ran together"
    engine.close()
    for (prompt, user, tier), one in zip(asked, heard, strict=True):
        assert text(engine, one) == alone(prompt, user, 6, tier) and one.started.tier == tier


def test_gates_are_the_routers_where_each_token_was_drawn(shared: PersonalizedModel, alone: Alone) -> None:
    engine = Engine(shared, EngineLimits(rows=8, slots=4))
    asked: list[tuple[int, str | None, Tier]] = [(0, "u0", "users"), (2, "u0", "groups"), (1, None, "users")]
    heard = [ask(engine, prompt, user, tier=tier, gates=True)[0] for prompt, user, tier in asked]
    ask(engine, 3, "u1", tier="population", gates=True)
    finish(engine)
    engine.close()
    for (prompt, user, tier), one in zip(asked, heard, strict=True):
        found = [list(event.gates or ()) for event in one.events if isinstance(event, Token)]
        expected = alone.gates(prompt, user, tier, one.tokens)
        assert found and len(found[0]) == 5
        assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)


def test_draws_do_not_depend_on_who_else_is_there(shared: PersonalizedModel, alone: Alone) -> None:
    engine = Engine(shared)
    sampling = {"temperature": 0.9, "top_p": 0.8}
    together = [ask(engine, at % 4, USERS[at % 11], seed=at % 3, **sampling)[0] for at in range(12)]
    finish(engine)
    for at, heard in enumerate(together):
        drawn = Sampling(6, seed=at % 3, **sampling)
        assert text(engine, heard) == decoding.alone(alone.model, PROMPTS[at % 4], USERS[at % 11], drawn)
    engine.close()


def test_cancelling_frees_the_row_before_the_next_step(shared: PersonalizedModel) -> None:
    engine = Engine(shared, EngineLimits(rows=1, slots=1))
    first, ticket = ask(engine, 0, None, 8)
    second, _ = ask(engine, 1, None, 8)
    engine.step()
    assert first.events and not second.events
    ticket.cancel()
    engine.step()
    assert first.end.reason == "cancelled" and second.tokens
    finish(engine)
    engine.close()


def test_nobody_starves_behind_users_who_are_in(shared: PersonalizedModel) -> None:
    engine = Engine(shared, EngineLimits(rows=2, slots=1, patience=3))
    resident, _ = ask(engine, 1, "u0", 3)
    while not resident.events:
        engine.step()
    late, _ = ask(engine, 1, "u1", 3)
    passed = 0
    while not late.events:
        assert passed < 20
        passed += len([ask(engine, 1, "u0", 3)])
        engine.step()
        time.sleep(0.002)
    finish(engine)
    engine.close()


def test_an_update_is_for_those_who_come_after_it(copied: PersonalizedModel, alone: Alone) -> None:
    assert copied.store is not None
    engine = Engine(copied, EngineLimits(rows=4, slots=4))
    before, _ = ask(engine, 2, "u0", 8)
    while not before.tokens:
        engine.step()
    other = copied.store.get("u1")
    assert other is not None
    copied.store.put([replace(other, user="u0")])
    after, _ = ask(engine, 2, "u0", 8)
    finish(engine)
    assert text(engine, before) == alone(2, "u0", 8) and before.started.version == 1
    assert text(engine, after) == alone(2, "u1", 8) and after.started.version == 2
    copied.store.rollback("u0")
    back, _ = ask(engine, 2, "u0", 8)
    finish(engine)
    assert text(engine, back) == alone(2, "u0", 8) and back.started.version == 3
    engine.close()


def test_a_version_that_goes_while_its_request_waits(copied: PersonalizedModel, alone: Alone) -> None:
    """Between acceptance and load the user is updated beyond what the store keeps, or deleted."""
    assert copied.store is not None
    engine = Engine(copied, EngineLimits(rows=1, slots=1))
    busy, _ = ask(engine, 0, "u7", 8)
    while not busy.events:
        engine.step()
    updated, _ = ask(engine, 2, "u0")
    deleted, _ = ask(engine, 2, "u2")
    engine.step()
    other = copied.store.get("u1")
    assert other is not None
    for _ in range(4):
        copied.store.put([replace(other, user="u0")])
    copied.store.delete("u2")
    finish(engine)
    assert text(engine, updated) == alone(2, "u1", 6) and updated.started.version == 5
    assert text(engine, deleted) == alone(2, None, 6) and deleted.started.tier == "none"
    engine.close()


def test_a_damaged_adapter_falls_back_and_says_so(copied: PersonalizedModel, alone: Alone) -> None:
    assert copied.store is not None
    record = copied.store.get("u3")
    assert record is not None
    copied.store.put([UserRecord("plain", "groups", record.embedding)])
    for blob in (copied.store.folder / "blobs").iterdir():
        data = bytearray(blob.read_bytes())
        data[:] = bytes(len(data))
        blob.write_bytes(data)
    engine = Engine(copied)
    damaged, whole = ask(engine, 0, "u3")[0], ask(engine, 0, "plain")[0]
    finish(engine)
    assert damaged.started == Started("groups", 1, DAMAGED)
    assert damaged.tokens == whole.tokens and whole.started.fallback is None
    assert engine.stats().fallbacks == 1 and engine.stats().adapters.damaged == 1
    engine.close()


def test_other_tenants_users_are_others(copied: PersonalizedModel, alone: Alone) -> None:
    assert copied.store is not None
    other = copied.store.get("u1")
    assert other is not None
    theirs = AdapterStore(copied.store.folder, "theirs")
    theirs.put([replace(other, user="u0")])
    theirs.close()
    engine = Engine(copied)
    heard = {}
    ids = engine.model.encoder.prompt(PROMPTS[2], room=6)
    for tenant in ("", "theirs", "nobody's"):
        heard[tenant] = Listener()
        engine.submit(Request(ids, "u0", tenant, sampling=Sampling(6)), heard[tenant])
    finish(engine)
    expected = {"": "u0", "theirs": "u1", "nobody's": None}
    assert {t: text(engine, one) for t, one in heard.items()} == {t: alone(2, u, 6) for t, u in expected.items()}
    engine.close()


def test_forgotten_users_leave_the_bank(copied: PersonalizedModel) -> None:
    engine = Engine(copied, EngineLimits(rows=2, slots=2))
    ask(engine, 0, "u0")
    finish(engine)
    bank = next(iter(copied.model.layers.values())).bank
    assert bank is not None and bank.values.abs().sum() > 0
    engine.forget("", "u0")
    engine.step()
    assert bank.values.abs().sum() == 0 and engine.stats().resident == 0
    engine.close()


def test_users_of_an_unreadable_store_leave_the_bank(copied: PersonalizedModel) -> None:
    engine = Engine(copied, EngineLimits(rows=2, slots=2))
    heard, _ = ask(engine, 0, "u0")
    finish(engine)
    bank = next(iter(copied.model.layers.values())).bank
    assert copied.store is not None and bank is not None and engine.stats().resident == 1
    copied.store.manifest.path.write_bytes(b"not a database" * 1000)
    engine.recheck()
    engine.step()
    assert bank.values.abs().sum() == 0 and engine.stats().resident == 0
    heard, _ = ask(engine, 0, None)
    finish(engine)
    assert heard.end.reason != "error"
    engine.close()


def test_a_sink_that_raises_loses_its_row_only(shared: PersonalizedModel, alone: Alone) -> None:
    engine = Engine(shared)

    def deaf(event: Event) -> None:
        raise OSError("gone")

    ids = engine.model.encoder.prompt(PROMPTS[0], room=6)
    engine.submit(Request(ids, "u0", sampling=Sampling(6)), deaf)
    heard, _ = ask(engine, 0, "u1")
    finish(engine)
    assert text(engine, heard) == alone(0, "u1", 6)
    engine.close()


def test_what_does_not_fit_is_refused(shared: PersonalizedModel) -> None:
    engine = Engine(shared)
    with pytest.raises(InputError, match="64 tokens together, these would have 65"):
        engine.submit(Request((5,) * 60, sampling=Sampling(5)), Listener())
    with pytest.raises(InputError, match="at least one token"):
        engine.submit(Request((), sampling=Sampling(5)), Listener())
    heard = Listener()
    engine.submit(Request((5,) * 60, sampling=Sampling(4)), heard)
    engine.close()
    assert heard.end.reason == "cancelled"
    with pytest.raises(ProperError, match="closed"):
        engine.submit(Request((5,)), Listener())


@pytest.mark.parametrize("stage", ["base", "population", "groups"])
def test_lower_stages(tiny_run: Path, stage: str) -> None:
    oracle, model = load(tiny_run, stage), load(tiny_run, stage)  # type: ignore[arg-type]
    engine = Engine(model)
    users = ("u0", None, "group", "u0")
    heard = [ask(engine, at, user)[0] for at, user in enumerate(users)]
    finish(engine)
    for prompt, user, one in zip(PROMPTS, users, heard, strict=True):
        assert text(engine, one) == decoding.alone(oracle, prompt, user, Sampling(6))
        assert one.started.tier == oracle.tier(user)
    for one in (oracle, model):
        one.close()
    engine.close()


def test_bf16_tokens_are_as_likely_as_those_alone(copied: PersonalizedModel, tiny_run: Path) -> None:
    """Rounding may choose another token, but only one that is nearly as likely: within the noise of bf16 logits."""
    oracle = load(tiny_run)
    for model in (copied, oracle):  # experts and routers stay as they are: fp32
        for name, parameter in model.model.backbone.model.named_parameters():
            if not re.search(r"\.(experts|router|lora_router)\.", name):
                parameter.data = parameter.data.bfloat16()
    engine = Engine(copied, EngineLimits(rows=5, slots=3))
    heard = [(at, ask(engine, at % 4, USERS[at % 11])[0]) for at in range(11)]
    finish(engine)
    engine.close()
    for at, one in heard:
        assert one.end.reason in ("stop", "length")
        prompt = list(oracle.encoder.prompt(PROMPTS[at % 4], room=6))
        for token in one.tokens:
            with torch.no_grad(), oracle.model.routing.use(oracle.rows([USERS[at % 11]])):
                logits = oracle.model.backbone.model(input_ids=torch.tensor([prompt])).logits[0, -1].float()
            assert logits.max() - logits[token] <= 2**-5 * logits.abs().max()
            prompt.append(token)
    oracle.close()
