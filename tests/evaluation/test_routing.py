"""Routing figures against loops written from their definitions, and on mixtures whose answer is known."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proper.errors import DataError
from proper.evaluation.routing import (
    analyze_routing,
    constraint_cosine,
    group_nmi,
    main_experts,
    mutual_information,
    project,
)


def invent(seed: int, users: int = 6, modules: int = 3, experts: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(experts, 0.7), size=(users, modules))


def one_hot(experts: list[int], count: int, modules: int = 2) -> np.ndarray:
    return np.repeat(np.eye(count)[experts][:, None], modules, axis=1)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6), st.integers(1, 3), st.integers(1, 5))
def test_figures_against_their_definitions(seed, users, modules, experts):
    gates = invent(seed, users, modules, experts)
    information, cosines = [], []
    for module in range(modules):
        joint = gates[:, module] / users
        by_user, by_expert = joint.sum(axis=1), joint.sum(axis=0)
        information.append(
            sum(
                joint[u, e] * math.log(joint[u, e] / (by_user[u] * by_expert[e]))
                for u in range(users)
                for e in range(experts)
                if joint[u, e] > 0
            )
        )
        for one, other in itertools.combinations(gates[:, module], 2):
            cosines.append(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
    assert mutual_information(gates) == pytest.approx(np.mean(information), abs=1e-12)
    assert constraint_cosine(gates) == pytest.approx(np.mean(cosines))


def test_extremes():
    alike, apart = one_hot([0, 0, 0], 3), one_hot([0, 1, 2], 3)
    assert (mutual_information(alike), constraint_cosine(alike)) == (0, 1)
    assert mutual_information(apart) == pytest.approx(math.log(3))
    assert constraint_cosine(apart) == pytest.approx(0)
    assert constraint_cosine(apart[:1]) is None


def test_everything_comes_out_as_json():
    gates, users = invent(0), [f"u{k}" for k in range(6)]
    histories = {user: 10 + place for place, user in enumerate(users)}
    embeddings = np.random.default_rng(1).normal(size=(6, 8))
    results, detail = analyze_routing(gates, users, embeddings, histories, {"u0": 0, "u1": 1, "u2": 0})
    assert set(results) == {
        "experts", "utilization", "entropy", "user_expert_mutual_information", "constraint_cosine", "nmi",
    }  # fmt: skip
    assert results["experts"] == 4
    assert results["utilization"] == pytest.approx(gates.mean(axis=(0, 1)))
    assert results["entropy"] == pytest.approx(-(gates * np.log(gates)).sum(axis=2).mean())
    row = detail["users"][1]
    assert (row["user"], row["history"], row["group"]) == ("u1", 11, 1)
    assert row["gates"] == pytest.approx(gates[1].mean(axis=0))
    assert row["main"] == int(gates[1].mean(axis=0).argmax())
    assert detail["users"][5]["group"] is None
    json.dumps([results, detail], allow_nan=False)


def test_without_true_groups_there_is_no_nmi():
    results, _ = analyze_routing(invent(0), [f"u{k}" for k in range(6)], np.zeros((6, 2)), {})
    assert "nmi" not in results


def test_planted_groups_are_found_and_noise_is_not():
    random = np.random.default_rng(0)
    groups = {f"u{k}": k % 5 for k in range(60)}
    users = list(groups)
    centres = random.dirichlet(np.full(5, 0.4), size=(5, 3))
    noise = random.dirichlet(np.ones(5), size=(60, 3))
    planted = 0.9 * centres[[groups[user] for user in users]] + 0.1 * noise
    assert group_nmi(planted, users, groups) == pytest.approx(1)
    assert group_nmi(noise, users, groups) < 0.4
    assert group_nmi(one_hot([1] * 60, 5), users, groups) == 0  # one point: one cluster, no warning
    assert group_nmi(planted, users, {}) is None


def test_order_of_users_does_not_change_the_figures():
    gates, users = invent(3, users=20), [f"u{k}" for k in range(20)]
    groups = {user: k % 3 for k, user in enumerate(users)}
    order = np.random.default_rng(0).permutation(20)
    first, _ = analyze_routing(gates, users, gates[:, 0], {}, groups)
    again, _ = analyze_routing(gates[order], [users[k] for k in order], gates[order, 0], {}, groups)
    for key in ("entropy", "user_expert_mutual_information", "constraint_cosine"):
        assert again[key] == pytest.approx(first[key])


def test_main_expert_falls_back_to_what_stands_out():
    assert main_experts(one_hot([2, 0, 1], 3)).tolist() == [2, 0, 1]
    shared = np.asarray([[[0.8, 0.15, 0.05]], [[0.8, 0.05, 0.15]], [[0.9, 0.05, 0.05]]])
    assert main_experts(shared).tolist() == [1, 2, 0]
    assert main_experts(shared[:1]).tolist() == [0]


def test_the_map_keeps_distances_of_a_plane_and_does_not_flip():
    random = np.random.default_rng(0)
    flat = random.normal(size=(12, 2)) * [3, 1]
    plane, _ = np.linalg.qr(random.normal(size=(7, 2)))
    found, shares = project(flat @ plane.T + 5)
    for one, other in itertools.combinations(range(12), 2):
        distance = np.linalg.norm(flat[one] - flat[other])
        assert np.linalg.norm(found[one] - found[other]) == pytest.approx(distance)
    assert sum(shares) == pytest.approx(1) and shares[0] > shares[1]
    assert (found[np.abs(found).argmax(axis=0), [0, 1]] > 0).all()


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (3, 2)])
def test_small_maps_have_two_coordinates(shape):
    found, shares = project(np.ones(shape))
    assert found.shape == (shape[0], 2) and not found.any() and shares == [0, 0]


def test_embeddings_of_each_module_are_laid_side_by_side():
    tables = np.random.default_rng(0).normal(size=(6, 3, 8))
    users = [f"u{k}" for k in range(6)]
    _, one = analyze_routing(invent(0), users, tables, {})
    _, other = analyze_routing(invent(0), users, tables.reshape(6, 24), {})
    assert one == other


@pytest.mark.parametrize(
    ("gates", "says"),
    [
        (np.ones((2, 3)), "must be"),
        (np.ones((3, 1, 1)), "must be"),
        (np.full((2, 1, 2), 0.4), "user a: they do not sum to 1"),
        (np.asarray([[[0.5, 0.5]], [[math.nan, 1]]]), "user b: they do not sum to 1"),
    ],
)
def test_gates_that_are_none_are_refused(gates, says):
    with pytest.raises(DataError, match=says):
        analyze_routing(gates, ["a", "b"], np.zeros((2, 2)), {})
