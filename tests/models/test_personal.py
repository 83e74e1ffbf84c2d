"""The backbone with the method's layers: what a row's logits may depend on, and where stages are equal to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from proper.config import GroupsConfig, UsersConfig
from proper.data.batching import collate
from proper.data.encoder import EncodedExample
from proper.layers.bank import AdapterBank
from proper.layers.batch_context import RowContext
from proper.models.backbone import Backbone
from proper.models.personal import ProperModel
from tests.models.mixed_rows import SLOTS, mixed, rows_of

Build = Callable[..., ProperModel]


def pick(rows: RowContext, index: list[int]) -> RowContext:
    assert rows.embedding is not None and rows.slots is not None
    return RowContext(rows.mode, embedding=rows.embedding[index], slots=rows.slots[index])


def answers(model: ProperModel, encoded: Sequence[EncodedExample], rows: RowContext) -> list[Tensor]:
    """Each row's logits for its own answer."""
    batch = collate(encoded, pad=0)
    with torch.no_grad():
        logits = model.answer_logits(batch, rows)
    return [logits[at, logits.shape[1] - (len(row.ids) - row.start) :] for at, row in enumerate(encoded)]


@pytest.mark.parametrize("router", ["residual", "paper", "none"])
@pytest.mark.parametrize("mode", ["groups", "fit", "users"])
def test_a_rows_logits_do_not_depend_on_its_neighbours_or_their_order(personal: Build, router: str, mode: str) -> None:
    model = personal(router=router)
    encoded, rows = rows_of(), mixed(model, mode)

    together = answers(model, encoded, rows)

    for at in range(len(encoded)):
        alone = answers(model, [encoded[at]], pick(rows, [at]))[0]
        assert float((together[at] - alone).abs().max()) < 1e-4
    order = [3, 0, 4, 2, 1]
    shuffled = answers(model, [encoded[at] for at in order], pick(rows, order))
    for place, at in enumerate(order):
        assert float((together[at] - shuffled[place]).abs().max()) < 1e-4
    others = answers(model, encoded, RowContext(rows.mode, rows.embedding, torch.tensor([0, 1, 1, 2, 2])))
    assert torch.equal(others[0], together[0]), "the neighbours' adapters are none of a row's business"
    if mode != "groups":
        assert not torch.allclose(others[1], together[1], atol=1e-2), "but its own adapter is"


@pytest.mark.parametrize("mode", ["off", "groups", "fit", "users"])
def test_logits_do_not_depend_on_the_padding_side(personal: Build, mode: str) -> None:
    model = personal()
    encoded, rows = rows_of(), mixed(model, mode)
    left = answers(model, encoded, rows)

    length = max(len(row.ids) for row in encoded)
    ids = torch.tensor([[*row.ids, *[5] * (length - len(row.ids))] for row in encoded])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (length - len(row.ids)) for row in encoded])
    with torch.no_grad(), model.routing.use(rows):
        right = model.backbone.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    for at, row in enumerate(encoded):
        expected = right[at, row.start - 1 : len(row.ids) - 1]
        assert float((left[at] - expected).abs().max()) < 1e-4


def test_fresh_layers_leave_every_stage_at_the_one_before_it_to_the_bit(backbone: Callable[..., Backbone]) -> None:
    model, users = ProperModel(backbone()), UsersConfig()
    encoded = rows_of()
    population = answers(model, encoded, RowContext())
    model.add_experts(GroupsConfig(user_embedding=16), seed=0)
    rows = mixed(model, "groups")
    groups = answers(model, encoded, rows)
    assert all(torch.equal(a, b) for a, b in zip(population, groups, strict=True)), "zero experts"

    for name, parameter in model.group_parameters().items():
        if name.endswith(".up"):
            parameter.data.normal_(std=0.2)
    groups = answers(model, encoded, rows)
    model.add_lora_router(users)
    bank = AdapterBank(model.layout(users.rank), 3, alpha=users.alpha, trainable=True)
    for slot in range(3):
        bank.fresh(slot, torch.Generator().manual_seed(slot))
    model.use_bank(bank)
    for parameter in model.router_parameters().values():
        parameter.data.normal_()
    for mode in ("fit", "users"):
        own = answers(model, encoded, mixed(model, mode))
        assert all(torch.equal(a, b) for a, b in zip(groups, own, strict=True)), f"B_u = 0, {mode}"
    assert not torch.allclose(groups[0], population[0], atol=1e-2)


def test_switched_off_layers_are_the_backbone_to_the_bit(personal: Build, backbone: Callable[..., Backbone]) -> None:
    plain, model = ProperModel(backbone()), personal()
    for one, other in zip(
        answers(plain, rows_of(), RowContext()), answers(model, rows_of(), RowContext()), strict=True
    ):
        assert torch.equal(one, other)


def test_experts_follow_from_their_seed_and_nothing_else(backbone: Callable[..., Backbone]) -> None:
    def parameters(seed: int) -> dict[str, Tensor]:
        model = ProperModel(backbone())
        before = torch.random.get_rng_state()
        model.add_experts(GroupsConfig(), seed)
        assert torch.equal(torch.random.get_rng_state(), before)
        return {name: p.detach() for name, p in model.group_parameters().items()}

    one, same, other = parameters(3), parameters(3), parameters(4)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if not name.endswith(".up"))


def test_what_is_added_has_the_methods_shapes(personal: Build) -> None:
    model = personal()
    modules = [f"model.layers.{layer}.mlp.{part}_proj" for layer in (0, 1) for part in ("gate", "up", "down")]
    assert list(model.layers) == modules
    shapes = {name: tuple(p.shape) for name, p in model.group_parameters().items()}
    assert len(shapes) == 24
    down = "model.layers.1.mlp.down_proj"
    assert shapes[f"{down}.down"] == (20, 48) and shapes[f"{down}.up"] == (32, 20)
    assert shapes[f"{down}.token"] == (5, 48) and shapes[f"{down}.user"] == (5, 16)
    assert {name: tuple(p.shape) for name, p in model.router_parameters().items()}[down] == (5, 32)
    assert all(p.dtype == torch.float32 for p in personal(torch.bfloat16).group_parameters().values())


def test_every_module_reads_its_own_part_of_a_per_module_table(personal: Build) -> None:
    model = personal(embedding="per-module")
    assert model.embedding_size == 2 * (32 + 32 + 48)
    encoded, rows = rows_of(), mixed(model, "groups")
    before = answers(model, encoded, rows)
    assert rows.embedding is not None
    rows.embedding[0, -1] += 10  # the last module's last coordinate
    after = answers(model, encoded, rows)
    assert not torch.allclose(after[0], before[0], atol=1e-3) and torch.equal(after[1], before[1])
    spans = [layer.router.span for layer in model.layers.values() if layer.router is not None]
    assert [(span.start, span.stop) for span in spans] == [
        (0, 32), (32, 64), (64, 112), (112, 144), (144, 176), (176, 224),
    ]  # fmt: skip


def test_adding_experts_again_replaces_them(personal: Build) -> None:
    model = personal()
    model.add_experts(GroupsConfig(user_embedding=16), seed=1)
    assert len(model.layers) == 6 and len(model.group_parameters()) == 24
    assert not any("base.base" in name for name, _ in model.backbone.model.named_modules())
    plain = answers(model, rows_of(), RowContext())
    assert torch.equal(answers(model, rows_of(), mixed(model, "groups"))[0], plain[0])


def test_user_adapters_without_experts(backbone: Callable[..., Backbone]) -> None:
    model = ProperModel(backbone())
    model.add_plain_targets(GroupsConfig(target_modules="all"))
    bank = AdapterBank(model.layout(2), 3, alpha=4.0, trainable=True)
    bank.values.normal_(std=0.2)
    model.use_bank(bank)
    encoded = rows_of()
    slots = torch.tensor(SLOTS)
    plain, own = answers(model, encoded, RowContext()), answers(model, encoded, RowContext("fit", slots=slots))
    assert len(model.layers) == 14 and not model.group_parameters()
    assert torch.equal(plain[2], own[2]), "slot -1"
    assert not torch.allclose(plain[0], own[0], atol=1e-2)


def test_layers_without_experts_or_adapters_do_nothing(personal: Build) -> None:
    """Against the same model in which what is left out is there, and zero."""
    model, whole = personal(layers=1, user_layers=1), personal()
    assert list(model.layers) == [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    bank, every = (next(iter(each.layers.values())).bank for each in (model, whole))
    assert bank is not None and every is not None
    every.values.zero_()
    for name, parameter in whole.group_parameters().items():
        parameter.data.copy_(
            model.group_parameters()[name]
        ) if name in model.group_parameters() else parameter.data.zero_()
    for name, parameter in whole.router_parameters().items():
        parameter.data.copy_(model.router_parameters()[name]) if name in model.layers else parameter.data.zero_()
    for name in model.layers:
        every.down[name].data.copy_(bank.down[name])
        every.up[name].data.copy_(bank.up[name])
    for mode in ("groups", "fit", "users"):
        pairs = zip(
            answers(model, rows_of(), mixed(model, mode)), answers(whole, rows_of(), mixed(whole, mode)), strict=True
        )
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_layers_with_experts_only_keep_the_gates_of_stage_2(personal: Build) -> None:
    model = personal(user_layers=1)
    upper = [name for name in model.layers if ".1." in name]
    assert list(model.router_parameters()) == upper
    assert [name for name, layer in model.layers.items() if layer.bank is not None] == upper
    assert model.user_layout(UsersConfig(layers=1)).width * 2 == model.layout(UsersConfig().rank).width
    gates: dict[str, dict[str, Tensor]] = {}
    for mode in ("groups", "users"):
        batch = collate(rows_of(), pad=0)
        rows = replace(mixed(model, mode), users=torch.arange(5), mask=batch.attention_mask.bool())
        with torch.no_grad():
            model.answer_logits(batch, rows)
        gates[mode] = dict(model.routing.gates)
    changed = {name for name in model.layers if not torch.equal(gates["groups"][name], gates["users"][name])}
    assert changed == {*upper}


@pytest.mark.parametrize(
    ("router", "count", "residual"), [("residual", 6, True), ("paper", 6, False), ("none", 0, False)]
)
def test_router_forms(personal: Build, router: str, count: int, residual: bool) -> None:
    model = personal(router=router)
    assert len(model.router_parameters()) == count
    assert all(layer.residual == residual for layer in model.layers.values())
