"""The files in `deploy/`: they parse, name this version of the package and of Ray, and their commands are accepted."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import proper
from proper.cli.app import app

ROOT = Path(__file__).parents[2]
MANIFESTS = sorted((ROOT / "deploy").glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects of a manifest."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def containers(value: Any) -> Iterator[dict[str, Any]]:
    """All containers below a value."""
    if isinstance(value, dict):
        yield from value.get("containers", ())
        for inner in value.values():
            yield from containers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from containers(inner)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_images_and_ray_are_those_of_this_version(path: Path) -> None:
    ray = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert ray is not None
    found = [each for document in documents(path) for each in containers(document)]
    assert found and {each["image"].rpartition(":")[2] for each in found} == {proper.__version__}
    assert set(re.findall(r'rayVersion: "(\S+)"', path.read_text(encoding="utf-8"))) == {ray[1]}


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_commands_are_accepted(path: Path) -> None:
    text = " ".join(
        line.strip() for line in path.read_text(encoding="utf-8").splitlines() if not line.strip().startswith("#")
    )
    commands = re.findall(r"proper ((?:run|serve) /shared\S* (?:--\S+ \S+ ?)+)", text)
    assert commands
    group: Any = typer.main.get_command(app)
    for line in commands:
        name, *arguments = shlex.split(line)
        chosen = group.commands[name]
        parsed = chosen.make_context(name, arguments, resilient_parsing=True)
        assert parsed.params["cluster"] == "auto" and not parsed.args


def test_the_service_reaches_the_http_server() -> None:
    by_kind = {each["kind"]: each for each in documents(ROOT / "deploy" / "kuberay-serve.yaml")}
    pod = by_kind["Deployment"]["spec"]["template"]
    assert by_kind["Service"]["spec"]["selector"] == pod["metadata"]["labels"]
    (http,) = pod["spec"]["containers"]
    assert by_kind["Service"]["spec"]["ports"][0]["targetPort"] == http["ports"][0]["name"]
    # KubeRay names the head's service after the cluster.
    assert f"--address={by_kind['RayCluster']['metadata']['name']}-head-svc:6379" in http["args"][0]
    drain = re.search(r"--drain (\d+)", http["args"][0])
    assert drain is not None and pod["spec"]["terminationGracePeriodSeconds"] > int(drain[1])


def test_the_image_has_what_the_file_copies_and_installs() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    installed = re.search(r"'\.\[(\S+)\]'", text)
    assert installed is not None and set(installed[1].split(",")) <= extras.keys()
