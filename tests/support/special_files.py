"""Things that stand where a file is expected: links, pipes, devices."""

import os
from pathlib import Path

KINDS = ("link", "link to nowhere", "pipe", "device")


def put(path: Path, kind: str, target: Path) -> Path:
    """Put something at `path` that is no regular file; `target` is a file of the user's."""
    match kind:
        case "link":
            path.symlink_to(target)
        case "link to nowhere":
            path.symlink_to(target.with_name("nowhere"))
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
    return path
