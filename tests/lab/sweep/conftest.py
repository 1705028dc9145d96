"""Sweeps of seconds, and a PostgreSQL server of their own."""

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_sweep import GRID, SMALL

from stochastic_depth.lab.sweep.folder import open_sweep


@pytest.fixture
def sweep(tmp_path):
    """Six runs of six steps."""
    return open_sweep(tmp_path / "sweep", "survival", GRID, SMALL)


@pytest.fixture(params=["journal", "postgresql"])
def url(request) -> str | None:
    """Of the queue: both kinds in turn."""
    return None if request.param == "journal" else request.getfixturevalue("server")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    programs = [path for name in ("initdb", "pg_ctl") if (path := _program(name))]
    if len(programs) < 2:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not here")
    initdb, pg_ctl = programs
    folder = Path(tempfile.mkdtemp(prefix="sd-pg-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _unprivileged(folder, initdb, "-D", folder / "data", "-U", "sweeper", "--auth=trust", "-N")
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    start = ["-o", options, "-l", folder / "log", "-w", "start"]
    _unprivileged(folder, pg_ctl, "-D", folder / "data", *start)
    yield f"postgresql://sweeper@127.0.0.1:{port}/postgres"
    _unprivileged(folder, pg_ctl, "-D", folder / "data", "-m", "immediate", "stop")
    shutil.rmtree(folder)


def _program(name: str) -> str | None:
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(debian[-1]) if debian else None)


def _unprivileged(folder: Path, *command: object) -> None:
    """Run `command`; the server refuses to be run by root."""
    prefix = []
    if os.getuid() == 0:
        try:
            user = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("PostgreSQL does not run as root, and there is no user postgres")
        os.chown(folder, user.pw_uid, user.pw_gid)
        prefix = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    # The server keeps what it inherits: a pipe would never end.
    with (folder / "output").open("ab") as output:
        subprocess.run(
            [*prefix, *map(str, command)], cwd="/", check=True, stdout=output, stderr=output
        )
