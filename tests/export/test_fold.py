"""Gates averaged over a history against a loop over tokens; folding is exact where gates are constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from proper.adapters.store import AdapterStore, UserRecord
from proper.config import GroupsConfig, make_config
from proper.data.batching import collate
from proper.data.encoder import Encoder
from proper.data.histories import TextExample
from proper.errors import InputError
from proper.export.converted_models import fold_all, folded_size
from proper.export.fold import fold, folded_rank, history_gates
from proper.export.folding_loss import folding_loss, mean_loss
from proper.inference.model import PersonalizedModel, ServedUsers
from proper.layers.bank import AdapterBank
from proper.layers.personalized_linear import AdaptedLinear
from proper.models.personal import ProperModel

CLOSE = {"rtol": 0, "atol": 1e-4}
TEXTS = ("What does this say?", "Short", "A rather longer text than both of the others: what does it say?", "Well?")
HISTORY = [TextExample(at, "own", text, "an answer" * (at + 1), None, None, 9) for at, text in enumerate(TEXTS)]
USERS = ["own", "group", "other", "own"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AdapterStore]:
    opened = AdapterStore(tmp_path / "users")
    yield opened
    opened.close()


def served(model: ProperModel, store: AdapterStore, batch_size: int = 3) -> PersonalizedModel:
    """The tiny model of all stages over a store of two users with adapters and one without."""
    layer = next(iter(model.layers.values()))
    assert layer.bank is not None
    old, draw = layer.bank, torch.Generator().manual_seed(8)
    vectors = [torch.randn(model.embedding_size, generator=draw) for _ in range(4)]
    store.put(
        [
            UserRecord("own", "users", vectors[0], old.layout.unpack(old.values[0])),
            UserRecord("other", "users", vectors[1], old.layout.unpack(old.values[1])),
            UserRecord("group", "groups", vectors[2]),
        ]
    )
    bank = AdapterBank(old.layout, 4, alpha=8.0, trainable=False)
    model.use_bank(bank)
    raw = {"data": {"path": "x"}, "compute": {"dtype": "fp32", "max_length": 64, "batch_size": batch_size}}
    encoder = Encoder(model.backbone.tokenizer, 64)
    return PersonalizedModel(model, encoder, make_config(raw), ServedUsers(store, bank, vectors[3]), "users")


def logits(model: PersonalizedModel, users: list[str]) -> Tensor:
    encoded = [model.encoder.encode(example) for example in HISTORY]
    batch = collate(encoded, model.model.backbone.pad_id)
    with torch.no_grad():
        return model.model.answer_logits(batch, model.rows(users))


def slow_gates(model: PersonalizedModel, user: str) -> dict[str, Tensor]:
    """Mean over all tokens of softmax(W_x x + W_u e + W_r B_u A_u x), a token at a time."""
    seen: dict[str, list[Tensor]] = {name: [] for name in model.model.layers}

    def watch(layer: nn.Module, arguments: tuple[Tensor]) -> None:
        assert isinstance(layer, AdaptedLinear)
        seen[layer.name].append(arguments[0][0])

    hooks = [layer.register_forward_pre_hook(watch) for layer in model.model.layers.values()]
    rows, found = model.rows([user]), {}
    for example in HISTORY:
        with torch.no_grad():
            model.model.answer_logits(collate([model.encoder.encode(example)], 0), rows)
    for hook in hooks:
        hook.remove()
    for name, layer in model.model.layers.items():
        assert layer.router is not None and rows.embedding is not None
        gates = []
        for x in torch.cat(seen[name]):
            scores = layer.router.token @ x + layer.router.user @ rows.embedding[0]
            if rows.slots is not None and layer.bank is not None and layer.lora_router is not None:
                slot = int(rows.slots[0])
                own = layer.bank.scale * layer.bank.up[name][slot] @ (layer.bank.down[name][slot] @ x)
                scores = scores + layer.lora_router.weight @ own
            gates.append(scores.softmax(0))
        found[name] = torch.stack(gates).mean(0).detach()
    return found


@pytest.mark.parametrize("user", ["own", "group", "nobody"])
def test_mean_gates_are_those_that_serve_the_user(
    personal: Callable[..., ProperModel], store: AdapterStore, user: str
) -> None:
    model = served(personal(), store)
    found, expected = history_gates(model, user, HISTORY), slow_gates(model, user)
    assert found.keys() == expected.keys() == model.model.layers.keys()
    for name, gates in found.items():
        torch.testing.assert_close(gates, expected[name], rtol=0, atol=1e-5)
    assert len({tuple(gates.tolist()) for gates in found.values()}) == len(found)


def test_without_a_history_there_is_nothing_to_average(
    personal: Callable[..., ProperModel], store: AdapterStore
) -> None:
    with pytest.raises(InputError, match="user 'own' has no history"):
        fold(served(personal(), store), "own", [])


def hold_gates(model: ProperModel, form: str) -> None:
    """Let no gate depend on a token."""
    for layer in model.layers.values():
        if layer.router is None:
            continue
        layer.router.token.data.zero_()
        if form == "released":
            layer.router.form, layer.router.factor = "released", 1 / 5
        if layer.lora_router is not None:
            layer.lora_router.weight.data.zero_()


@pytest.mark.parametrize("router", ["residual", "paper", "none"])
@pytest.mark.parametrize("form", ["default", "released"])
def test_folding_is_exact_where_gates_are_constant(
    personal: Callable[..., ProperModel], store: AdapterStore, tmp_path: Path, router: str, form: str
) -> None:
    exact = served(personal(router=router), store)
    hold_gates(exact.model, form)
    expected = logits(exact, USERS)
    plain = AdapterStore(tmp_path / "plain")
    model = fold_all(exact, ["own", "group", "other"], lambda _: HISTORY, plain)
    torch.testing.assert_close(logits(model, USERS), expected, **CLOSE)
    assert (logits(model, USERS) - logits(model, USERS[1:] + USERS[:1])).abs().max() > 0.1
    assert not model.model.group_parameters()
    plain.close()


def test_modules_without_experts_and_users_without_an_adapter_are_zero_padded(
    personal: Callable[..., ProperModel], store: AdapterStore, tmp_path: Path
) -> None:
    model = personal()
    model.add_plain_targets(GroupsConfig(target_modules="attention"))
    bank = AdapterBank(model.layout(4), 2, alpha=8.0, trainable=False)
    bank.values.copy_(0.2 * torch.randn(bank.values.shape, generator=torch.Generator().manual_seed(3)))
    model.use_bank(bank)
    exact = served(model, store)
    hold_gates(exact.model, "default")
    loras = {user: fold(exact, user, HISTORY).loras for user in ("own", "group")}
    assert all(one.keys() == exact.model.layers.keys() for one in loras.values())
    assert {lora.rank for one in loras.values() for lora in one.values()} == {24}
    attention = [name for name in exact.model.layers if "attn" in name]
    assert attention and not any(loras["group"][name].up.any() for name in attention)
    expected = logits(exact, USERS)
    plain = AdapterStore(tmp_path / "plain")
    torch.testing.assert_close(
        logits(fold_all(exact, ["own", "group", "other"], lambda _: HISTORY, plain), USERS), expected, **CLOSE
    )
    plain.close()


def test_folding_loses_something_where_gates_depend_on_tokens(
    personal: Callable[..., ProperModel], store: AdapterStore, tmp_path: Path
) -> None:
    exact = served(personal(), store)
    expected = logits(exact, USERS)
    plain = AdapterStore(tmp_path / "plain")
    model = fold_all(exact, ["own", "group", "other"], lambda _: HISTORY, plain)
    backbone = logits(model, ["nobody"] * 4)
    lost = (logits(model, USERS) - expected).abs().mean()
    assert 1e-3 < lost < 0.7 * (expected - backbone).abs().mean()
    plain.close()


def test_the_size_is_that_of_the_rank_that_servers_take(
    personal: Callable[..., ProperModel], store: AdapterStore
) -> None:
    model = served(personal(), store)
    assert folded_rank(model) == 5 * 4 + 4
    numbers = sum(32 * (layer.inputs + layer.outputs) for layer in model.model.layers.values())
    assert folded_size(model) == (numbers, 4 * numbers)


def dataset(**histories: int) -> Any:
    """A data set of target users with so many items of history."""
    users = [SimpleNamespace(id=user, history=count) for user, count in histories.items()]
    return SimpleNamespace(
        users=lambda role: iter(users), history=lambda user, newest: HISTORY[: histories[user]][-(newest or 99) :]
    )


def test_the_loss_of_folding_is_that_of_items_left_out_of_the_gates(
    personal: Callable[..., ProperModel], store: AdapterStore, tmp_path: Path
) -> None:
    data = dataset(own=4, group=3, other=1, gone=4)
    exact = served(personal(), store)
    wanted = [mean_loss(exact, "own", HISTORY[3:]), mean_loss(exact, "group", HISTORY[2:3])]
    found = folding_loss(exact, data, 8)
    assert found is not None and (found["users"], found["items"]) == (2, 2), "two have two items and are in the store"
    assert found["exact"] == pytest.approx(sum(wanted) / 2, abs=1e-4)
    again = served(personal(), store)
    plain = AdapterStore(tmp_path / "plain")
    counts = {"own": 3, "group": 2}
    model = fold_all(again, list(counts), lambda user: HISTORY[: counts[user]], plain)
    folded = [mean_loss(model, "own", HISTORY[3:]), mean_loss(model, "group", HISTORY[2:3])]
    plain.close()
    assert found["folded"] == pytest.approx(sum(folded) / 2, abs=1e-4)
    assert found["difference"] == pytest.approx(found["folded"] - found["exact"], abs=2e-4) and found["difference"]
    assert found["ci95"][0] <= found["difference"] <= found["ci95"][1]


def test_folding_loses_nothing_under_constant_gates_and_needs_two_items(
    personal: Callable[..., ProperModel], store: AdapterStore
) -> None:
    exact = served(personal(), store)
    hold_gates(exact.model, "default")
    assert folding_loss(exact, dataset(own=1, gone=4), 8) is None
    found = folding_loss(exact, dataset(own=4, group=4, other=4), 2)
    assert found is not None and found["users"] == 2
    assert abs(found["difference"]) <= 2e-4


def test_a_loss_is_the_mean_over_answer_tokens(personal: Callable[..., ProperModel], store: AdapterStore) -> None:
    model = served(personal(), store)
    batch = collate([model.encoder.encode(example) for example in HISTORY], model.model.backbone.pad_id)
    kept = batch.labels != -100
    with torch.no_grad():
        scores = model.model.answer_logits(batch, model.rows(["own"] * 4)).float().log_softmax(-1)
    by_token = -scores.gather(2, batch.labels.clamp(min=0)[..., None])[..., 0][kept]
    assert mean_loss(model, "own", HISTORY) == pytest.approx(float(by_token.mean()), abs=1e-4)
