"""What is wrong with one request ends that request: all others get the answers they would get alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from proper.adapters.store import AdapterStore, UserRecord
from proper.errors import InputError, ProperError, StoreError
from proper.inference import PersonalizedModel, load
from proper.inference.adapter_manager import DAMAGED, DAMAGED_EMBEDDING
from proper.inference.engine import Engine
from proper.inference.generate import generate
from proper.inference.kv_cache import RowCache
from proper.inference.requests import EngineLimits, Finished, Request, Started
from proper.inference.sampling import Sampling
from proper.inference.score import score
from tests.inference.submission import Listener, finish_settled, submit

PROMPTS = (tuple(range(5, 25)), (40, 41), (7,) * 9, tuple(range(60, 93)))
GOOD = ("u0", "u1", "u2", "group", None)
POISON = 99
"""A token on which the broken models of these tests fail."""


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Iterator[PersonalizedModel]:
    made = load(tiny_run)
    yield made
    made.close()


SPOILED = ("nan", "inf", "huge")
"""Users of `spoiled` whose adapters are not finite, or overflow."""


def spoiled_run(run: Path, folder: Path, dtype: str) -> Iterator[PersonalizedModel]:
    """The tiny run with users that no check keeps out: what the engine does then must be right by itself."""
    shutil.copytree(run, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("dtype: fp32", f"dtype: {dtype}"), encoding="utf-8")
    made = load(folder)
    assert made.store is not None
    record = made.store.get("u0")
    assert record is not None and record.adapter is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proper.adapters.records.require_sound", lambda *_: None)
        for user, number in zip(SPOILED, (torch.nan, torch.inf, 1e30), strict=True):
            adapter = {name: torch.full_like(tensor, number) for name, tensor in record.adapter.items()}
            made.store.put([replace(record, user=user, adapter=adapter)])
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_checks_at_load(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a spoiled run only, and only while a test uses it: the other tests are about these very checks."""
    if {"spoiled", "half"} & set(request.fixturenames):
        monkeypatch.setattr("proper.adapters.load.is_sound", lambda *_: True)


@pytest.fixture(scope="module")
def spoiled(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PersonalizedModel]:
    yield from spoiled_run(tiny_run, tmp_path_factory.mktemp("spoiled") / "run", "fp32")


@pytest.fixture(scope="module")
def half(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PersonalizedModel]:
    yield from spoiled_run(tiny_run, tmp_path_factory.mktemp("half") / "run", "bf16")


@pytest.fixture(scope="module")
def alone(model: PersonalizedModel) -> Callable[[int, str | None, int], list[int]]:
    """Each answer from an engine that has one row and has never seen anything else."""
    known: dict[tuple[int, str | None, int], list[int]] = {}

    def answer(prompt: int, user: str | None, length: int) -> list[int]:
        if (prompt, user, length) not in known:
            engine = Engine(model, EngineLimits(1, 1))
            heard, _ = submit(engine, PROMPTS[prompt], user, length)
            finish_settled(engine)
            engine.close()
            known[prompt, user, length] = heard.tokens
        return known[prompt, user, length]

    return answer


Logits = Callable[[int, str | None, tuple[int, ...]], bool]


@pytest.fixture(scope="module")
def logits(half: PersonalizedModel) -> Logits:
    """Whether each token of an answer is among the likeliest, within bf16 noise, by itself and without a cache."""
    known: dict[tuple[int, str | None, tuple[int, ...]], bool] = {}

    def likely(prompt: int, user: str | None, answer: tuple[int, ...]) -> bool:
        if (prompt, user, answer) not in known:
            ids = torch.tensor([PROMPTS[prompt] + answer])
            with torch.no_grad(), half.model.routing.use(half.rows([user])):
                found = half.model.backbone.model(input_ids=ids).logits[0, len(PROMPTS[prompt]) - 1 : -1].float()
            taken = found.gather(1, torch.tensor(answer)[:, None])[:, 0] if answer else found.new_zeros(0)
            known[prompt, user, answer] = bool((found.amax(1) - taken <= 2**-5 * found.abs().amax(1)).all())
        return known[prompt, user, answer]

    return likely


def spoil(engine: Engine, user: str, how: float) -> None:
    """Damage a user's adapter where it lies in memory."""
    cache = engine._adapters.cache
    assert cache is not None
    for key, slot in cache._slots.items():
        if key.user == user:
            cache.bank.values[slot.number] = how


visits = st.tuples(
    st.integers(0, len(PROMPTS) - 1),
    st.sampled_from((*GOOD, *SPOILED, *SPOILED)),
    st.integers(1, 8),  # length
    st.integers(0, 3),  # steps before the next one comes
)
Visit = tuple[int, str | None, int, int]
traffic = given(asked=st.lists(visits, min_size=6, max_size=14), rows=st.integers(2, 4))
few = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])


def beside_spoiled(
    model: PersonalizedModel, asked: list[Visit], rows: int
) -> Iterator[tuple[int, str | None, int, list[int]]]:
    """Yield prompt, user, length and answer of those who are not spoiled, from one engine."""
    engine = Engine(model, EngineLimits(rows, slots=rows + 1))
    told = []
    for at, (prompt, user, length, pause) in enumerate(asked):
        drawn = {"temperature": 1.0} if user in SPOILED and at % 2 else {}
        told.append(submit(engine, PROMPTS[prompt], user, length, **drawn)[0])
        for _ in range(pause):
            engine.settle()
            engine.step()
    finish_settled(engine)
    engine.close()
    for (prompt, user, length, _), heard in zip(asked, told, strict=True):
        if user in SPOILED:
            assert heard.end.error == "ProperError: the logits are not finite"
        else:
            assert heard.end.error is None
            yield prompt, user, length, heard.tokens


@few
@traffic
def test_neighbours_that_are_not_finite_change_no_answer(
    spoiled: PersonalizedModel,
    alone: Callable[[int, str | None, int], list[int]],
    asked: list[Visit],
    rows: int,
) -> None:
    for prompt, user, length, answer in beside_spoiled(spoiled, asked, rows):
        assert answer == alone(prompt, user, length)


@few
@traffic
def test_neighbours_that_are_not_finite_change_no_answer_in_bf16(
    half: PersonalizedModel, logits: Logits, asked: list[Visit], rows: int
) -> None:
    """Rounding may choose another token, but only one that is nearly as likely."""
    for prompt, user, length, answer in beside_spoiled(half, asked, rows):
        assert len(answer) == length or logits(prompt, user, (*answer, half.encoder.end or 0))
        assert logits(prompt, user, tuple(answer))


def test_a_row_that_leaves_leaves_zeros(model: PersonalizedModel) -> None:
    engine = Engine(model, EngineLimits(3, 4, length=24, prefix_bytes=0))
    for at in range(40):
        submit(engine, PROMPTS[at % 3][:15], f"u{at % 8}", 1 + at % 7)
        engine.settle()
        engine.step()
        _assert_clean(engine._batch._cache)
    finish_settled(engine)
    cache = engine._batch._cache
    assert engine.stats().steps > 24 and cache._layers
    assert not any(layer.k.any() or layer.v.any() for layer in cache._layers)
    engine.close()


def _assert_clean(cache: RowCache) -> None:
    """Outside the rows' own columns there is nothing but zeros."""
    held, window = cache._layers, cache.window
    for layer in held:
        for tensor in (layer.k.clone(), layer.v.clone()):
            for row, length in enumerate(window.lengths):
                tensor[row, :, window.cursor - length : window.cursor] = 0
            assert not tensor.any()


def test_an_answer_that_is_not_finite_ends_and_its_adapter_is_loaded_again(model: PersonalizedModel) -> None:
    engine = Engine(model, EngineLimits(3, 4))
    before, _ = submit(engine, PROMPTS[0], "u6")
    finish_settled(engine)
    spoil(engine, "u6", float("nan"))
    bad, _ = submit(engine, PROMPTS[0], "u6", temperature=1.0)
    finish_settled(engine)
    assert not bad.tokens and bad.end == Finished("error", "ProperError: the logits are not finite")
    again, _ = submit(engine, PROMPTS[0], "u6")
    finish_settled(engine)
    assert again.tokens == before.tokens and engine.stats().errors == 1
    engine.close()


def test_what_an_older_version_stored_falls_back(copied: PersonalizedModel) -> None:
    """Adapters and embeddings that are not finite, from before the store refused them, written past it."""
    store = copied.store
    assert store is not None
    record = store.get("u3")
    assert record is not None and record.adapter is not None
    bad_store = AdapterStore(store.folder, "old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proper.adapters.records.require_sound", lambda *_: None)
        nan = {name: torch.full_like(tensor, torch.nan) for name, tensor in record.adapter.items()}
        bad_store.put([replace(record, user="adapter", adapter=nan)])
        bad_store.put([replace(record, user="vector", embedding=torch.full((16,), torch.nan))])
        bad_store.put([replace(record, user="short", embedding=torch.zeros(3))])
    engine = Engine(copied, EngineLimits(8, 8))
    told = {}
    for user in ("adapter", "vector", "short"):
        told[user] = Listener()
        engine.submit(Request(PROMPTS[0], user, "old", sampling=Sampling(4)), told[user])
    stranger, _ = submit(engine, PROMPTS[0], None, 4)
    finish_settled(engine)
    engine.close()
    assert told["adapter"].started == Started("groups", 1, DAMAGED)
    for user in ("vector", "short"):
        assert told[user].started == Started("none", None, DAMAGED_EMBEDDING)
        assert told[user].tokens == stranger.tokens
    bad_store.close()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("proper.adapters.records.require_sound", lambda *_: None)
        store.put([replace(record, user="u1", embedding=torch.full((16,), torch.inf))])
    for call in (lambda: generate(copied, ["Well?"], ["u1"]), lambda: score(copied, ["Well?"], ["u1"], ["a", "b"])):
        with pytest.raises(StoreError, match=r"user 'u1': embedding: numbers that are not finite"):
            call()


def test_scores_that_are_not_numbers_are_no_scores(copied: PersonalizedModel) -> None:
    served = copied.served
    assert served is not None
    fine = score(copied, ["Well?"], ["u0"], ["a", "b"])
    (slot,) = served.slots(["u1"])
    served.bank.values[slot] = torch.nan
    assert torch.equal(score(copied, ["Well?"], ["u0"], ["a", "b"]), fine)
    with pytest.raises(ProperError, match="user 'u1'.*not finite"):
        score(copied, ["Well?", "Well?"], ["u0", "u1"], ["a", "b"])


def breaking(model: PersonalizedModel, when: Callable[[Tensor], bool]) -> Callable[..., Any]:
    """A forward pass that fails on some inputs, once it has run (so that it has written to the cache)."""
    whole: Any = model.model.backbone.model.forward

    def forward(input_ids: Tensor, **more: Any) -> Any:
        done = whole(input_ids=input_ids, **more)
        if when(input_ids):
            raise RuntimeError("broken")
        return done

    return forward


def test_a_pass_that_fails_for_one_row_ends_that_row_alone(
    model: PersonalizedModel,
    alone: Callable[[int, str | None, int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {(at, user): alone(at, user, 6) for at in range(4) for user in GOOD}
    # A token that comes up in the middle of one answer: its row fails while it is decoded.
    token, (lost_at, lost_user) = next(
        (ids[2], key)
        for key, ids in answers.items()
        if len(ids) > 3 and sum(ids[2] in one for one in answers.values()) == 1
    )
    engine = Engine(model, EngineLimits(9, 6, prefix_bytes=0))
    monkeypatch.setattr(
        model.model.backbone.model,
        "forward",
        breaking(model, lambda ids: bool(((ids == token) | (ids == POISON)).any())),
    )
    told = [(key, submit(engine, PROMPTS[key[0]], key[1])[0]) for key in answers]
    poisoned, _ = submit(engine, (5, POISON, 6), "u0")
    finish_settled(engine)
    for key, heard in told:
        if key == (lost_at, lost_user):
            assert heard.end == Finished("error", "RuntimeError: broken") and heard.tokens == answers[key][:3]
        else:
            assert heard.tokens == answers[key] and heard.end.error is None
    assert poisoned.end == Finished("error", "RuntimeError: broken") and not poisoned.tokens
    assert engine.stats().errors == 2
    _assert_clean(engine._batch._cache)
    engine.close()


def test_a_pass_too_large_for_the_memory_is_made_row_by_row(
    model: PersonalizedModel, alone: Callable[[int, str | None, int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [alone(at, user, 6) for at in range(4) for user in GOOD]
    engine = Engine(model, EngineLimits(5, 4))
    monkeypatch.setattr(model.model.backbone.model, "forward", breaking(model, lambda ids: len(ids) > 1))
    told = [submit(engine, PROMPTS[at], user)[0] for at in range(4) for user in GOOD]
    finish_settled(engine)
    assert [heard.tokens for heard in told] == wanted and engine.stats().errors == 0
    engine.close()


def test_a_store_that_cannot_be_read_ends_its_requests_alone(
    copied: PersonalizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(copied, EngineLimits(4, 4))
    heard = Listener()
    # A tenant's store that cannot be opened: too many open files, say.
    monkeypatch.setattr("proper.inference.model.AdapterStore", _refusing)
    engine.submit(Request(PROMPTS[0], "u0", "full", sampling=Sampling(3)), heard)
    good, _ = submit(engine, PROMPTS[0], "u0", 3)
    finish_settled(engine)
    assert heard.end == Finished("error", "OSError: too many open files") and len(good.tokens) == 3
    engine.close()


def _refusing(*_: object) -> AdapterStore:
    raise OSError("too many open files")


def test_sampling_that_no_generator_takes_is_refused_alone(model: PersonalizedModel) -> None:
    engine = Engine(model, EngineLimits(4, 4))
    for name, odd in (("seed", 2**80), ("temperature", torch.inf)):
        with pytest.raises(InputError, match=name):
            submit(engine, PROMPTS[0], None, 3, **{"temperature": 1.0, name: odd})
    hottest, _ = submit(engine, PROMPTS[0], None, 3, temperature=1e308, top_p=0.5, seed=2**63 - 1)
    good, _ = submit(engine, PROMPTS[0], None, 3)
    finish_settled(engine)
    assert len(good.tokens) == 3 and hottest.end.reason in ("length", "error")
    engine.close()


def test_tokens_without_an_embedding_are_refused(model: PersonalizedModel) -> None:
    engine = Engine(model, EngineLimits(2, 2))
    size = model.model.backbone.embeddings
    for odd in (size, -1, 2**40):
        with pytest.raises(InputError, match=f"token {odd}; the model has embeddings for 0 to {size - 1}"):
            submit(engine, (5, odd, 6), "u0")
    heard, _ = submit(engine, (5, size - 1), "u0", 2)
    finish_settled(engine)
    assert heard.end.error is None
    engine.close()


def test_a_backbone_that_does_not_compute_ends_the_engine_and_answers_all(
    copied: PersonalizedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(copied, EngineLimits(2, 2))
    told = [submit(engine, PROMPTS[0], f"u{at}")[0] for at in range(5)]
    engine.settle()
    engine.step()
    monkeypatch.setattr(copied.model.backbone.model, "forward", breaking(copied, lambda _: True))
    with pytest.raises(ProperError, match="the backbone cannot compute any more: RuntimeError: broken"):
        finish_settled(engine)
    engine.close("the engine has stopped")
    assert all(heard.end.reason == "error" for heard in told) and engine.idle


def test_records_that_are_not_sound_are_refused_by_put(copied: PersonalizedModel) -> None:
    store = copied.store
    assert store is not None
    record = store.get("u3")
    assert record is not None and record.adapter is not None
    before = store.head("u3")
    name = next(iter(record.adapter))
    for bad, words in ((torch.nan, "not finite"), (torch.inf, "not finite"), (1e30, "beyond 10000")):
        tensor = record.adapter[name].clone()
        tensor.view(-1)[-1] = bad
        embedding = record.embedding.clone()
        embedding[3] = bad
        for odd, place in (
            (replace(record, adapter={**record.adapter, name: tensor}), name),
            (replace(record, embedding=embedding), "embedding"),
            (UserRecord("new", "groups", embedding), "embedding"),
        ):
            with pytest.raises(StoreError, match=f"user '{odd.user}': {place}: numbers .*{words}"):
                store.put([replace(record, user="beside"), odd])
            assert store.head("beside") is None
    after = store.head("u3")
    assert before is not None and after is not None and before.version == after.version
