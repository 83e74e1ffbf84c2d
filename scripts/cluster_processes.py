"""Commands of `proper` as processes: started, awaited, served, looked up by name, and killed with this one."""

from __future__ import annotations

import atexit
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

# Equal threads: another number of threads rounds sums differently.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def say(text: str) -> None:
    """Print one line at once."""
    print(text, flush=True)


def proper(*arguments: str) -> subprocess.Popen[str]:
    """Start a command of `proper`."""
    command = [sys.executable, "-P", "-m", "proper", *arguments]
    say(f"$ proper {' '.join(arguments)}")
    started = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    atexit.register(started.kill)
    return started


def finished(process: subprocess.Popen[str]) -> None:
    """Wait for a command; end the demo if it fails."""
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}:\n{said}")


@contextmanager
def serving(run: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Serve a run within the block; yield the URL and the process id."""
    server = proper("serve", str(run), "--port", "0", "--no-worker", *options)
    assert server.stderr is not None
    try:
        said = ""
        while not (found := re.search(r"on (http://\S+)", said)):
            line = server.stderr.readline()
            if not line:
                raise SystemExit(f"the server did not start:\n{said}")
            said += line
        threading.Thread(target=server.stderr.read, daemon=True).start()
        until(lambda: ready(found[1]))
        yield found[1], server.pid
        server.terminate()
        say(f"SIGTERM: the server drained and ended with exit code {server.wait(120)}")
    finally:
        server.kill()
        server.wait()


def ready(url: str) -> bool:
    """Return whether a server answers."""
    try:
        return httpx.get(f"{url}/readyz", timeout=10).status_code == 200
    except httpx.TransportError:
        return False


def children(parent: int, name: str) -> list[int]:
    """Return the processes below `parent` whose command line begins with `name`."""
    listed = subprocess.run(["pgrep", "-f", f"^{name}"], capture_output=True, text=True, check=False).stdout.split()
    return [pid for pid in map(int, listed) if parent in ancestors(pid)]


def ancestors(pid: int) -> list[int]:
    """Return the parents of a process, up to the first one; none if it has ended."""
    found = []
    while pid > 1:
        try:
            status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return []
        pid = int(status.rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def until(found: Callable[[], object], seconds: float = 3600) -> None:
    """Wait until `found()` is true; end the demo if that takes too long."""
    deadline = time.monotonic() + seconds
    while not found():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited for {seconds:.0f} s in vain")
        time.sleep(0.05)
