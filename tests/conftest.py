"""What all tests share. Imports nothing of `proper`: the shape checks are hooked in when it is first imported."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

from tests import range_server

if TYPE_CHECKING:
    import torch
    from playwright.sync_api import Browser
    from transformers import LlamaConfig

    from proper.models.backbone import Backbone
    from tests.s3_server import S3Server

# Before any test imports the Hugging Face libraries, which read these once.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# One thread everywhere, also in processes that tests start: equal bits need equal threads.
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples on every run: a failure in continuous integration is a failure here. Machines differ in speed.
settings.register_profile("proper", deadline=None, derandomize=True)
settings.load_profile("proper")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Debian's chromium; tests that need it are skipped where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    return path


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """A browser that does not look for updates. Not for longer than a module: no event loop may run beside it."""
    from playwright.sync_api import sync_playwright

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    quiet = ["--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=[*flags, *quiet])
        yield started
        started.close()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server; tests that need it are skipped where there is none."""
    from tests import postgresql_server

    if why := postgresql_server.missing():
        pytest.skip(why)
    with postgresql_server.running() as url:
        yield url


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    """Where `users` keeps its state; a module runs on both with `parametrize("engine", [...], indirect=True)`."""
    return str(getattr(request, "param", "sqlite"))


@pytest.fixture
def users(engine: str, request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a run's store and log, with its state in SQLite or in PostgreSQL."""
    if engine == "postgresql":
        from proper.databases.setup import keep_state

        keep_state(tmp_path, request.getfixturevalue("postgresql"))
    return tmp_path / "users"


@pytest.fixture(scope="session")
def unprivileged() -> list[str]:
    """What a command begins with whose process a folder's mode keeps from writing, also where tests run as root."""
    if os.geteuid():
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("tests run as root, and there is no setpriv")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]


@pytest.fixture
def read_only() -> Callable[[Path, Path], Path]:
    """`read_only(source, target)`: copy a folder so that nobody but root may write into the copy."""

    def copy(source: Path, target: Path) -> Path:
        shutil.copytree(source, target)
        for path in (target, *target.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        return target

    return copy


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3Server]:
    """An S3 server; use `s3`, which tells the code under test how to reach it."""
    from tests.s3_server import running

    with running() as server:
        yield server


@pytest.fixture
def s3(s3_process: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """An S3 server, with the AWS_* variables that point to it."""
    for name, value in s3_process.environment.items():
        monkeypatch.setenv(name, value)
    return s3_process


@pytest.fixture(scope="session")
def tiny_config() -> LlamaConfig:
    """The shape of the tests' tiny Llama, with `proper-nano`'s vocabulary."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=8192,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )


@pytest.fixture(scope="session")
def backbone(tiny_config: LlamaConfig) -> Callable[..., Backbone]:
    """Build the tiny Llama with random weights, the same each time."""
    import torch
    from transformers import LlamaForCausalLM

    from proper.models.backbone import Backbone, digest, load_tokenizer

    tokenizer = load_tokenizer("proper-nano")

    def build(dtype: torch.dtype = torch.float32) -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(tiny_config).to(dtype).eval().requires_grad_(False)
        return Backbone("tiny", model, tokenizer, digest(model))

    return build


@pytest.fixture(scope="session")
def backbone_folder(backbone: Callable[..., Backbone], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as a folder."""
    folder, made = tmp_path_factory.mktemp("backbone"), backbone()
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A web server of this test's own, see `tests/range_server.py`; it serves `site.folder` at `site.url`."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "site"
    folder.mkdir()
    with range_server.serve(folder) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_run(
    backbone: Callable[..., Backbone], backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run folder made by hand around a tiny random Llama: `u0` to `u7` have adapters, `group` has an embedding."""
    import torch
    import yaml
    from peft import LoraConfig, get_peft_model

    from proper.adapters.store import AdapterStore, UserRecord
    from proper.config import make_config
    from proper.files import write_json
    from proper.layers.bank import AdapterBank
    from proper.models.checkpoints import save_tensors
    from proper.models.personal import ProperModel

    folder, made = tmp_path_factory.mktemp("run"), backbone()
    raw = {
        "data": {"path": "nothing.jsonl"},
        "task": {"max_new_tokens": 6},
        "backbone": str(backbone_folder),
        "compute": {"dtype": "fp32", "max_length": 64, "batch_size": 8, "device": "cpu"},
        "groups": {"user_embedding": 16},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    get_peft_model(made.model, lora).save_pretrained(str(folder / "population"))

    config = make_config(raw)
    model = ProperModel(backbone())
    model.add_experts(config.groups, seed=0)
    model.add_lora_router(config.users)
    draw = torch.Generator().manual_seed(1)
    for parameter in (*model.group_parameters().values(), *model.router_parameters().values()):
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
    bank = AdapterBank(model.layout(config.users.rank), 8, alpha=config.users.alpha, trainable=False)
    bank.values.copy_(0.2 * torch.randn(bank.values.shape, generator=draw))
    vectors = 0.5 * torch.randn(10, 16, generator=draw)
    groups = {**model.group_parameters(), "mean_embedding": vectors[9]}
    save_tensors(folder / "groups" / "groups.safetensors", groups, {"modules": list(model.layers)})
    save_tensors(folder / "users" / "router.safetensors", model.router_parameters(), {})
    store = AdapterStore(folder / "users")
    adapters = [bank.layout.unpack(bank.values[slot]) for slot in range(8)]
    store.put(UserRecord(f"u{at}", "users", vectors[at], adapters[at]) for at in range(8))
    store.put([UserRecord("group", "groups", vectors[8])])
    store.close()
    for stage in ("population", "groups", "users"):
        write_json(folder / stage / "stage.json", {"seed": 0, "backbone": made.digest})
    return folder
