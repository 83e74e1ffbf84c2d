"""The command line as a whole: help, exit codes, and one line for any error."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import typer

import proper
from proper.cli.app import _after_interruption, app, main, require_text
from proper.cli.demo import Task
from proper.data.demo.users import DemoTask
from proper.errors import InputError

COMMANDS = [
    "demo",
    "check",
    "run",
    "evaluate",
    "report",
    "generate",
    "serve",
    "export-backbone",
    "move-state",
    "simulate",
]
GROUPS = {
    "users": ["list", "show", "rollback", "delete", "check", "enrol", "update", "drift", "export", "import"]
    + ["archive", "verify-deleted"],
    "groups": ["show", "refresh", "rollback"],
    "keys": ["add", "list", "revoke", "open"],
    "data": ["list", "fetch", "convert", "from-git"],
    "backbones": ["fetch", "list"],
    "bench": ["users", "groups", "serve", "store"],
}
EVERY = [[name] for name in COMMANDS] + [[group, name] for group, names in GROUPS.items() for name in names]
Output = pytest.CaptureFixture[str]


def fails(capsys: Output, arguments: list[str], code: int = 2) -> str:
    """Run a command that must fail with one line on stderr and nothing on stdout; return what the line says."""
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("proper: ")
    assert err.count("\n") == 1
    return err.removeprefix("proper: ").removesuffix("\n")


def parse(command: str) -> None:
    """Read a command line as the command would, without running it."""
    program, name, *arguments = shlex.split(command.partition(">")[0])
    assert program == "proper"
    group = typer.main.get_command(app)
    if name in GROUPS:
        group, (name, *arguments) = group.commands[name], arguments  # type: ignore[attr-defined]
    group.commands[name].make_context(name, arguments)  # type: ignore[attr-defined]


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A folder that looks like a run which never came far."""
    folder = tmp_path / "a-run"
    folder.mkdir()
    (folder / "config.yaml").write_text("data: {path: x}\n")
    return folder


def test_the_commands_are_those_that_exist(capsys: Output) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines()] == [*COMMANDS, *GROUPS]
    assert "..." not in listed


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_commands(capsys: Output, group: str) -> None:
    assert main([group, "--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:\n")[2].partition("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines()] == GROUPS[group]
    assert "..." not in listed


@pytest.mark.parametrize("name", [[], *([group] for group in GROUPS), *EVERY], ids=" ".join)
def test_every_command_has_help_with_examples_that_parse(capsys: Output, name: list[str]) -> None:
    assert main([*name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    examples = [line.strip() for line in out.partition("Examples:\n")[2].splitlines()]
    assert examples
    for example in examples:
        assert shlex.split(example)[: len(name) + 1] == ["proper", *name]
        parse(example)


def test_version(capsys: Output) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"proper {proper.__version__}\n", "")


def test_no_command_shows_help_on_stderr(capsys: Output) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Commands:" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "No such command 'rum'"),
        (["run"], "Missing argument 'CONFIG'"),
        (["run", "notes.yaml"], "Missing option '--out'"),
        (["run", "notes.yaml", "--out", "x", "--sed", "1"], "No such option: --sed"),
        (["report", "runs/x", "more"], "Got unexpected extra argument(s) (more)"),
        (["demo", "--users", "0"], "Invalid value for '--users'"),
        (["demo", "--people", "0"], "Invalid value for '--users' / '--people'"),
        (["demo", "--task", "chess"], "Invalid value for '--task': 'chess' is not one of 'classification'"),
        (["generate", "x", "--seed", "one"], "Invalid value for '--seed'"),
    ],
)
def test_wrong_usage_is_one_line_that_points_to_help(capsys: Output, arguments: list[str], message: str) -> None:
    said = fails(capsys, arguments)
    assert said.startswith(message)
    assert said.endswith(" --help'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "notes.yaml: cannot be read: No such file or directory"),
        ("data: [", "notes.yaml:1: not YAML: "),
        ("groups: {}\n", "'data' is missing"),
        ("data: {path: x}\ngruops: {}\n", "unknown key 'gruops'; did you mean 'groups'?"),
        ("data: {path: x}\ngroups: {experts: none}\n", "'groups.experts': should be a valid integer"),
    ],
)
@pytest.mark.parametrize("command", [["check"], ["run", "--out", "a-run"]])
def test_a_bad_config_is_named_before_anything_is_loaded(
    capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], text: str | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("notes.yaml").write_text(text)
    assert message in fails(capsys, [*command, "notes.yaml"])
    assert not Path("a-run").exists()


@pytest.mark.parametrize("command", [["check"], ["run", "--out", "a-run"]])
def test_labels_of_the_same_tokens_are_named(
    capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    """Long labels are cut; a tokenizer may also drop capitals."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"user_id": user, "input": f"note {user} {at}", "output": f"{'very ' * 20}{('good', 'bad')[at % 2]}"}
        for user in "ab"
        for at in range(20)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "data": {"path": "rows.jsonl", "prompt": "{input}", "target": "{output}"},
        "task": {"kind": "classification"},
        "compute": {"max_length": 32},
    }
    Path("notes.yaml").write_text(json.dumps(config))
    assert main([*command, "notes.yaml"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("proper: task: the labels 'very very very ve...very very very bad' and ")
    assert "have the same tokens in this backbone" in said
    assert not Path("a-run").exists()


def test_a_bad_override_is_named(capsys: Output, tmp_path: Path) -> None:
    path = tmp_path / "notes.yaml"
    path.write_text("data: {path: x}\n")
    assert "give --backbone or --time" in fails(capsys, ["check", str(path), "--backbone", "--time"])
    said = fails(capsys, ["check", str(path), "--set", "groups.experts=8", "--set", "split.quries=1"])
    assert "unknown key 'split.quries'; did you mean 'queries'?" in said


@pytest.mark.parametrize("command", ["evaluate", "report", "generate"])
def test_a_folder_without_a_run_is_named(capsys: Output, tmp_path: Path, command: str) -> None:
    more = ["--prompt", "x"] if command == "generate" else []
    assert fails(capsys, [command, str(tmp_path / "gone"), *more]) == f"{tmp_path}/gone: no such run folder"
    assert (
        fails(capsys, [command, str(tmp_path), *more])
        == f"{tmp_path}: not a run folder (config.yaml is missing); run: proper run CONFIG --out {tmp_path}"
    )


def test_an_empty_choice_of_methods_is_named(capsys: Output, run_folder: Path) -> None:
    said = fails(capsys, ["evaluate", str(run_folder), "--methods", ","])
    assert said == "--methods: names are missing, write it as a,b"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --prompt, --field and --input"),
        (["--prompt", "x", "--field", "a=b"], "give one of --prompt, --field and --input"),
        (["--field", "text"], "--field text: write it as name=value"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature: -1.0 is not a number from 0 up"),
        (["--prompt", "x", "--temperature", "nan"], "--temperature: nan is not a number from 0 up"),
        (["--prompt", "x", "--top-p", "0"], "--top-p: 0.0 is not above 0 and at most 1"),
        (["--input", "gone.jsonl"], "gone.jsonl: cannot be read: No such file or directory"),
    ],
)
def test_generate_names_what_it_cannot_answer(
    capsys: Output, run_folder: Path, arguments: list[str], message: str
) -> None:
    assert fails(capsys, ["generate", str(run_folder), *arguments]).startswith(message)


def test_a_bad_line_of_a_file_is_named(capsys: Output, run_folder: Path) -> None:
    path = run_folder / "questions.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": 3}\n\n{\n')
    said = fails(capsys, ["generate", str(run_folder), "--input", str(path)])
    assert said == f"{path}:2: prompt: should be text, not int (and 1 more bad line)"


def test_debugging_shows_the_traceback(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPER_DEBUG", "1")
    assert main(["check", "gone.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("proper: gone.yaml: cannot be read")


def test_the_module_and_the_command_are_the_same() -> None:
    for program in ([sys.executable, "-m", "proper"], [str(Path(sys.executable).with_name("proper"))]):
        done = subprocess.run([*program, "check", "gone.yaml"], capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "proper: gone.yaml: cannot be read: No such file or directory\n"


def test_an_interrupt_is_130_and_one_line(run_folder: Path) -> None:
    pipe = run_folder / "questions"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "proper", "generate", str(run_folder), "--input", str(pipe)]
    # A suite that a script started in the background has its interrupts ignored, and children inherit that.
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # This open returns when the command has opened the other end; then it waits for lines that never come.
    with pipe.open("wb"):
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert err == "proper: interrupted; the same command starts again\n"


def test_the_demo_s_tasks_are_those_that_the_data_has() -> None:
    assert get_args(Task) == get_args(DemoTask)


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "nothing", "--prompt", "caf\udce9"],
        ["generate", "nothing", "--field", "input=caf\udce9"],
        ["generate", "nothing", "--user=caf\udce9", "--prompt", "x"],
        ["report", "nothing", "--user", "caf\udce9"],
        ["keys", "add", "nothing", "--tenant", "caf\udce9"],
    ],
)
def test_an_argument_that_is_no_text_is_refused(capsys: Output, arguments: list[str]) -> None:
    assert "caf\\udce9: this argument is not UTF-8" in fails(capsys, arguments)


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    path = tmp_path / "caf\udce9"
    with pytest.raises(InputError):
        require_text([f"--out={path}"])
    path.mkdir()
    require_text([f"--out={path}", str(path)])


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("run notes.yaml --out runs/notes", "the same command continues"),
        ("move-state runs/notes --store folder", "the same command continues"),
        ("groups refresh runs/notes", "the same command continues"),
        ("users update runs/notes", "the same command continues"),
        ("users export runs/notes --all --out exports/all --format peft", "the same command continues"),
        ("users export runs/notes --user ann --out exports/ann", "the same command starts again"),
        ("users enrol runs/notes --input new.jsonl", "'proper users update' continues the fit"),
        ("groups show runs/notes", "the same command starts again"),
        ("", "the same command starts again"),
    ],
)
def test_an_interrupted_command_says_how_to_continue(command: str, said: str) -> None:
    assert _after_interruption(command.split()).startswith(said)
