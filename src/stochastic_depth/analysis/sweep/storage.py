"""Where the queue of a sweep is kept: a journal in its folder, or a PostgreSQL server."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from stochastic_depth.errors import ConfigError, RunError, StochasticDepthError
from stochastic_depth.extras import require

SERVER = "postgresql://"


def open_storage(journal: Path, lock: FileLock, url: str | None) -> Any:
    """Optuna's storage.

    Args:
        journal: the file, where no `url` is given.
        lock: held by whoever writes the journal.
        url: postgresql://user:password@host/database.

    Raises:
        ConfigError: when `url` is not of a PostgreSQL server.
        MissingExtraError: Optuna or psycopg is not installed.
        RunError: when the server cannot be reached.
    """
    optuna = require("optuna", "sweep")
    if url is None:
        # Optuna's own lock outlives a killed process by its grace period of 30 s.
        backend = optuna.storages.journal.JournalFileBackend(str(journal), lock_obj=lock)
        return optuna.storages.JournalStorage(backend)
    if not url.startswith(SERVER):
        raise ConfigError(f"the queue's storage is {url!r}: it must begin with {SERVER}")
    require("psycopg", "sweep")
    # A connection for each look: between two of them, a server may be started anew.
    unpooled = {"poolclass": require("sqlalchemy", "sweep").NullPool}
    with storage_told(journal):
        return optuna.storages.RDBStorage(
            url.replace(SERVER, "postgresql+psycopg://", 1), engine_kwargs=unpooled
        )


@contextmanager
def storage_told(journal: Path) -> Iterator[None]:
    """Errors of the storage as one sentence, without the password in the URL."""
    optuna, sqlalchemy = require("optuna", "sweep"), require("sqlalchemy", "sweep")
    try:
        yield
    except StochasticDepthError:
        raise
    except (ValueError, KeyError) as error:  # from a journal that is none
        raise RunError(
            f"{journal} is damaged ({error}): delete it, it is made anew from the run folders"
        ) from error
    except (
        optuna.exceptions.StorageInternalError,
        sqlalchemy.exc.SQLAlchemyError,
        OSError,
    ) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise RunError(f"the queue of the sweep cannot be used: {reason}") from error


def drop_unfinished_line(journal: Path) -> None:
    """Cut off what a process that was killed while it wrote has left; others may not be writing."""
    if not journal.exists():
        return
    with journal.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            os.truncate(journal, content.rfind(b"\n") + 1)
