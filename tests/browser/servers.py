"""JupyterLab and Voila on a free loopback port, each in folders of its own, for the browser tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
CHROMIUM = Path("/usr/bin/chromium")
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(folder: Path) -> dict[str, str]:
    """The tests' own folders, where nothing of an earlier run is found; one thread, since the machine is small."""
    places = {
        name: str(folder / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "XDG_CACHE_HOME")
    }
    root = os.pathsep.join([str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return os.environ | places | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}


@contextlib.contextmanager
def running(command: list[str], url: str, folder: Path, env: dict[str, str]) -> Iterator[str]:
    """Start a server, wait until it answers, if only that there is no such page, and end it afterwards."""
    log = folder / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT)
        try:
            _wait(url, server, log)
            yield url
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=60).close()
        except urllib.error.HTTPError as refusal:
            refusal.close()
            return
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"no answer from {url}:\n{log.read_text()[-4000:]}")


@contextlib.contextmanager
def jupyterlab(folder: Path, notebook: Path) -> Iterator[str]:
    """JupyterLab on a copy of ``notebook``; gives its address."""
    shutil.copy(notebook, folder / notebook.name)
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    port = free_port()
    # No password: the server listens on loopback only, for as long as the test runs.
    flags = ["--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token="]
    command = [sys.executable, "-m", "jupyterlab", *flags, f"--LabApp.user_settings_dir={folder / 'settings'}"]
    with running(command, f"http://127.0.0.1:{port}/api", folder, environment(folder)):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def voila(folder: Path, notebook: Path) -> Iterator[str]:
    """Voila on a copy of ``notebook``; gives its address, which answers once the notebook has run."""
    shutil.copy(notebook, folder / notebook.name)
    port = free_port()
    command = [sys.executable, "-m", "voila", notebook.name, "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"]
    with running(command, f"http://127.0.0.1:{port}/nothing", folder, environment(folder)):
        yield f"http://127.0.0.1:{port}"
