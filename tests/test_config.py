"""Configs: defaults, presets, overrides, and errors that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from proper.config import Config, load_config, make_config
from proper.config.errors import explain
from proper.errors import ConfigError


def complaint(**sections: Any) -> str:
    """The message for a config that is wrong in `sections`."""
    with pytest.raises(ConfigError) as caught:
        make_config({"data": {"path": "x.jsonl"}, **sections}, "notes.yaml")
    message = str(caught.value)
    assert message.startswith("notes.yaml: ")
    assert "\n" not in message
    return message.removeprefix("notes.yaml: ")


def write(folder: Path, text: str) -> Path:
    path = folder / "notes.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_only_the_path_of_the_data_is_needed() -> None:
    config = make_config({"data": {"path": "x.jsonl"}})
    assert config.data.user == "user_id"
    assert config.backbone == "proper-nano"
    assert config.split.target_users == 100
    assert config.groups.experts == 5
    assert complaint(data={}) == "'data.path' is missing"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"grups": {}}, "unknown key 'grups'; did you mean 'groups'?"),
        ({"groups": {"expert": 3}}, "unknown key 'groups.expert'; did you mean 'experts'?"),
        (
            {"groups": {"constraint": {"weigth": 1}}},
            "unknown key 'groups.constraint.weigth'; did you mean 'weight'?",
        ),
        ({"users": {"tiers": {"zzz": 1}}}, "unknown key 'users.tiers.zzz'; known: select, validation, pool_below"),
        # The misspelled key is why the right one is missing, so it goes first.
        ({"data": {"pth": "x"}}, "unknown key 'data.pth'; did you mean 'path'? (and 1 more)"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(sections: dict[str, Any], message: str) -> None:
    assert complaint(**sections).startswith(message)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"groups": {"learning_rate": -1}}, "'groups.learning_rate': should be greater than 0 or 'auto', not -1"),
        (
            {"groups": {"learning_rate": "fast"}},
            "'groups.learning_rate': should be a valid number or 'auto', not 'fast'",
        ),
        ({"users": {"slots": 0}}, "'users.slots': should be 'auto' or greater than or equal to 1, not 0"),
        ({"groups": {"layers": 0}}, "'groups.layers': should be 'all' or greater than or equal to 1, not 0"),
        ({"groups": {"layers": "first 3"}}, "'groups.layers': should be 'all' or a valid integer"),
        (
            {"groups": {"layers": 4}, "users": {"layers": "last 5"}},
            "'config': users.layers: 5 is more than the 4 layers with experts (groups.layers)",
        ),
        ({"task": {"labels": ["a"]}}, "'task.labels': list should have at least 2 items after validation, not 1"),
        (
            {"groups": {"experts": 2.5}},
            "'groups.experts': should be a valid integer, got a number with a fractional part",
        ),
        ({"split": {"queries": float("nan")}}, "'split.queries': should be a finite number, not nan"),
        ({"groups": {"learning_rate": float("inf")}}, "'groups.learning_rate': should be a finite number or 'auto'"),
        ({"evaluation": {"seeds": [0, "a"]}}, "'evaluation.seeds': should be a valid integer, not 'a'"),
        ({"evaluation": {"seeds": [1, 1]}}, "'evaluation.seeds': seeds must be distinct"),
        ({"task": {"kind": "generation", "decode": "score"}}, "'task': decode: 'score' needs labels"),
        ({"task": {"labels": ["a", "b"]}}, "'task': labels: go with kind: classification or rating"),
        (
            {"data": {"path": "x", "layout": "oppu"}},
            "'data': layout: 'oppu' goes with format: lamp or oppu, not 'auto'",
        ),
        ({"groups": {"layers": True}}, "'groups.layers': should be a number, not true (as which YAML reads"),
        ({"population": {"epochs": False}}, "'population.epochs': should be a number, not false"),
        ({"split": {"max_queries": True}}, "'split.max_queries': should be a number, not true"),
        ({"evaluation": {"seeds": [0, True]}}, "'evaluation.seeds': should be a number, not true"),
        ({"trust_remote_code": True, "groups": {"experts": True}}, "'groups.experts': should be a number, not true"),
        (
            {"task": {"kind": "classification", "labels": [False, "yes"]}},
            "'task.labels': label False is not text: YAML reads no, 1 or 2024-01-01 as another value",
        ),
        ({"groups": 3}, "'groups': should be a section of keys, not 3"),
        ({"preset": "papr"}, "'preset': should be 'paper' or 'released', not 'papr'"),
        ({"preset": ["paper"]}, "'preset': should be 'paper' or 'released', not ['paper']"),
        ({"backbone": ["x" * 500]}, "'backbone': should be a valid string, not ['xxx"),
    ],
)
def test_an_impossible_value_is_named_with_what_it_should_be(sections: dict[str, Any], message: str) -> None:
    said = complaint(**sections)
    assert said.startswith(message)
    assert len(said) < 200


def test_layers_are_all_or_the_last_so_many() -> None:
    config = make_config({"data": {"path": "x"}, "groups": {"layers": "last 4"}, "users": {"layers": 3}})
    assert (config.groups.layers, config.users.layers) == (4, 3)
    assert make_config({"data": {"path": "x"}, "users": {"layers": 3}}).groups.layers == "all"


def test_the_branches_of_a_union_are_one_problem_and_never_part_of_a_key() -> None:
    both = complaint(groups={"learning_rate": -1}, users={"slots": 0})
    assert both.startswith("'groups.learning_rate': ")
    assert both.endswith("(and 1 more)")
    wrong_list = complaint(groups={"target_modules": [1, 2, 3]})
    assert wrong_list.startswith("'groups.target_modules': ")
    assert "more" not in wrong_list


def test_a_key_that_is_not_text_is_named() -> None:
    with pytest.raises(ConfigError, match="'1': keys should be strings"):
        make_config({"data": {"path": "x"}, 1: 2})  # type: ignore[dict-item]


def keys(section: type[BaseModel], before: str = "") -> list[str]:
    """Every key of the config down to plain values, as `section.key`."""
    found: list[str] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += keys(inner, f"{before}{name}.")
        else:
            found.append(before + name)
    return found


@given(st.sampled_from(keys(Config)))
def test_any_key_with_a_value_of_no_possible_type_is_named_exactly(key: str) -> None:
    nested: Any = {"neither": "a number", "nor": "text"}
    for name in reversed(key.split(".")):
        nested = {name: nested}
    data = {"path": "x"} | nested.pop("data", {})
    said = complaint(data=data, **nested)
    # Of a mapping from names, the entries are sections.
    named, others = (f"{key}.neither", " (and 1 more)") if key == "tasks" else (key, "")
    assert said.startswith(f"'{named}': should be ")
    assert "more)" not in said.removesuffix(others)


def test_explain_works_for_any_model() -> None:
    class Inner(BaseModel):
        size: int | list[int] = 1

    class Outer(BaseModel):
        inner: Inner = Inner()

    from pydantic import ValidationError

    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": {"size": "big"}})
    assert explain(caught.value, Outer) == "'inner.size': should be a valid integer or a valid list, not 'big'"


def test_a_number_in_scientific_notation_is_a_number(tmp_path: Path) -> None:
    # YAML 1.1 reads 1e-3 as text; it is often written all the same.
    path = write(tmp_path, "data: {path: x}\ngroups: {learning_rate: 1e-3}\n")
    assert load_config(path).groups.learning_rate == 1e-3
    assert load_config(path, ["groups.learning_rate=2e-4"]).groups.learning_rate == 2e-4


def test_overrides_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = write(tmp_path, "preset: paper\ndata: {path: x}\ngroups: {learning_rate: 0.5}\n")
    config = load_config(path, ["groups.constraint.kind=none", "users.router=residual", "evaluation.seeds=[0, 1]"])
    assert config.groups.learning_rate == 0.5
    assert config.groups.train_on == "targets"  # the preset's
    assert config.users.router == "residual"
    assert config.groups.constraint.kind == "none"
    assert config.evaluation.seeds == [0, 1]


def test_epochs_replace_the_default_number_of_steps_and_given_steps_stay() -> None:
    def users(**given: object) -> tuple[float, int | None]:
        config = make_config({"data": {"path": "x"}, "users": given}).users
        return config.epochs, config.steps

    steps = users()[1]
    assert steps is not None
    assert users(epochs=3) == (3, None)
    assert users(steps=7)[1] == 7 and users(epochs=3, steps=7) == (3, 7)
    assert make_config({"preset": "paper", "data": {"path": "x"}, "users": {"steps": 9}}).users.steps == 9
    again = make_config(make_config({"data": {"path": "x"}}).model_dump())
    assert again.users.steps == steps, "a stored config keeps its steps"


def test_presets_say_what_the_paper_and_its_code_do() -> None:
    paper = make_config({"preset": "paper", "data": {"path": "x"}})
    assert (paper.population.learning_rate, paper.population.train_on, paper.groups.train_on) == (
        3e-4,
        "others",
        "targets",
    )
    assert (paper.groups.router, paper.groups.constraint.kind, paper.users.router) == ("default", "users", "paper")
    assert (paper.users.epochs, paper.users.steps, paper.users.batch_size, paper.users.scales) == (2, None, 4, [])
    assert (paper.population.patience, paper.population.batch_size, paper.groups.embedding_init) == (0, 16, 0.02)
    released = make_config({"preset": "released", "data": {"path": "x"}})
    assert released.groups.embedding_init == 1, "as the tables of the released code"
    assert (released.groups.router, released.groups.embedding) == ("released", "per-module")
    assert released.groups.constraint.kind == "released"
    assert released.population.target_modules == "attention"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("groups.experts", "--set groups.experts: write it as section.key=value"),
        ("=3", "--set =3: write it as section.key=value"),
        ("groups.experts=[", "--set groups.experts=[: the value is not YAML"),
        ("groups.exprts=3", "unknown key 'groups.exprts'; did you mean 'experts'?"),
        ("groups..experts=3", "unknown key 'groups.'"),
        ("data.path=caf\udce9.jsonl", "--set data.path: the value is not UTF-8"),
        ("data.path=''", "'data.path': empty"),
        ("data.train_without=''", "'data.train_without': empty"),
        ("backbone=''", "'backbone': empty"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "data: {path: x}\n"), [override])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "notes.yaml: a config is a mapping of sections, this is empty"),
        (b"- a\n- b\n", "notes.yaml: a config is a mapping of sections, this is a list"),
        (b"data: {path: x}\ngroups: [\n", "notes.yaml:3: not YAML: "),
        (b"data: {path: \xff\xfe}\n", "notes.yaml: not YAML: "),
        (b"data: {path: '\x00'}\n", "notes.yaml: not YAML: "),
        (b"data:\n  path: x\n  path: y\n", "notes.yaml:3: not YAML: the key 'path' occurs twice"),
        (b"data: {path: x}\ntask: {}\ndata: {path: y}\n", "notes.yaml:3: not YAML: the key 'data' occurs twice"),
        (b"data:\n  path: 2024-02-30\n", "notes.yaml:2: not YAML: '2024-02-30' is not a value (day is out of range"),
        (b"data: {path: x}\ntrust_remote_code: !!bool z\n", "notes.yaml:2: not YAML: 'z' is not a value"),
        (b"split: {max_queries: 9223372036854775808}\n", "'9223372036854775808' is not a value (too large a number)"),
        (b"data: " + b"[" * 3000, "notes.yaml: not YAML: nested too deep"),
    ],
)
def test_an_unreadable_file_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "notes.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_may_replace_one_that_is_merged(tmp_path: Path) -> None:
    data = "a: {data: &base {path: x, user: u}}\n  b: {data: {<<: *base, user: v}}\n"
    tasks = load_config(write(tmp_path, f"tasks:\n  {data}")).tasks
    assert [(one.data.path, one.data.user) for one in tasks.values()] == [("x", "u"), ("x", "v")]


@pytest.mark.parametrize(
    ("override", "prompt"),
    [
        ("{input}", "{input}"),
        ("{title}: {text} ", "{title}: {text} "),
        ("Issue #{number}, #{input}", "Issue #{number}, #{input}"),
        ("Is it so?  # {input}\nAnswer:", "Is it so?  # {input}\nAnswer:"),
        ("'{input}\n\nTag: '", "{input}\nTag: "),
        ('"{input}\\nTag: "', "{input}\nTag: "),
        ("2024-02-30", "2024-02-30"),
        ("[a", "[a"),
    ],
)
def test_an_override_of_a_text_is_the_text(tmp_path: Path, override: str, prompt: str) -> None:
    path = write(tmp_path, "data: {path: x, prompt: y}\ntasks: {}\n")
    assert load_config(path, [f"data.prompt={override}"]).data.prompt == prompt
    both = write(tmp_path, "tasks: {a: {data: {path: x}}, b: {data: {path: x}}}\n")
    assert load_config(both, [f"tasks.b.data.prompt={override}"]).tasks["b"].data.prompt == prompt


def test_an_override_of_a_text_may_be_null_and_others_are_yaml(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {path: x}\ntask: {kind: rating}\n")
    config = load_config(path, ["data.time=null", "data.user=1", "data.item=no", "task.labels=['1', '2']"])
    assert (config.data.time, config.data.user, config.data.item) == (None, "1", "no")
    assert config.task.labels == ["1", "2"]


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_paths_are_looked_up_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = write(tmp_path, "data: {path: rows.jsonl}\nbackbone: not-a-folder\n")
    config = load_config(path)
    assert config.data.path == str((tmp_path / "rows.jsonl").resolve())
    assert config.backbone == "not-a-folder"


def test_a_config_cannot_change() -> None:
    config = make_config({"data": {"path": "x"}})
    with pytest.raises(ValueError, match="frozen"):
        config.backbone = "other"  # type: ignore[misc]


PRIVATE: dict[str, Any] = {"privacy": {"epsilon": 8}}


def test_privacy_changes_three_defaults_and_is_off_without_a_budget() -> None:
    usual, noise = (
        make_config({"data": {"path": "x"}, "privacy": own}) for own in ({"clip": 2}, {"noise_multiplier": 1})
    )
    assert not usual.privacy.on and noise.privacy.on
    assert (usual.population.patience, usual.groups.constraint.kind, usual.groups.user_encoder) == (3, "users", True)
    assert (noise.population.patience, noise.groups.constraint.kind, noise.groups.user_encoder) == (0, "none", False)
    chosen = make_config({"data": {"path": "x"}, **PRIVATE, "groups": {"constraint": {"kind": "experts"}, "rank": 2}})
    assert (chosen.groups.constraint.kind, chosen.groups.user_encoder, chosen.groups.rank) == ("experts", False, 2)
    assert make_config(chosen.model_dump()) == chosen, "the config of a run folder is read again"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"population": {"patience": 3}}, "population.patience: 3 stops on held-out rows without noise; set it to 0"),
        ({"population": {"max_tokens": 5}}, "population.max_tokens: 5 lets one user decide"),
        ({"compute": {"budget": "2h"}}, "compute.budget: 2h lowers max_tokens; leave it out"),
        ({"groups": {"constraint": {"kind": "users"}}}, "groups.constraint.kind: users compares users"),
        ({"groups": {"experts": "auto"}}, "groups.experts: auto counts clusters of users without noise"),
        ({"groups": {"user_encoder": True}}, "groups.user_encoder: true learns from all users' embeddings"),
        ({"preset": "paper"}, "users.router: paper is trained on all users without noise; set it to none"),
        ({"users": {"form": "core"}}, "users.form: core needs bases that are trained on all users"),
        ({"users": {"start": "meta"}}, "users.start: meta starts a user from what others' adapters learned"),
        ({"evaluation": {"seeds": [0, 1]}}, "evaluation.seeds: [0, 1] train several models"),
    ],
)
def test_privacy_refuses_what_uses_all_users_without_noise(sections: dict[str, Any], message: str) -> None:
    make_config({"data": {"path": "x"}, **sections})
    assert f"privacy: {message}" in complaint(**PRIVATE, **sections)


def test_privacy_has_one_budget() -> None:
    assert complaint(privacy={"epsilon": 8, "noise_multiplier": 1}).startswith("'privacy': set epsilon or noise_mult")
