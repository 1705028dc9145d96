"""Reads a run folder again and again, and reports every file that it saw incomplete.

It shares no code with what writes the folder, ends when its input does, and prints a line of JSON.
"""

import hashlib
import json
import select
import sys
from pathlib import Path

MAGIC = b"stochastic-depth checkpoint 1\n"


def checkpoint_is_whole(content: bytes) -> bool:
    digest, _, payload = content.removeprefix(MAGIC).partition(b"\n")
    return content.startswith(MAGIC) and hashlib.sha256(payload).hexdigest().encode() == digest


def weights_are_whole(content: bytes) -> bool:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    return len(content) == 8 + size + max(ends)


def config_is_whole(content: bytes) -> bool:
    return len(json.loads(content)["sha256"]) == 64


def journal_is_whole(content: bytes) -> bool:
    return all("step" in json.loads(line) for line in content.split(b"\n")[:-1])


WHOLE = {
    "checkpoints/step-*.ckpt": checkpoint_is_whole,
    "model.safetensors": weights_are_whole,
    "config.json": config_is_whole,
    "metrics.jsonl": journal_is_whole,
}


def look(run: Path, checked: set[tuple]) -> list[str]:
    """What is not whole; files that were checked before are not read again."""
    wrong = []
    for pattern, is_whole in WHOLE.items():
        for path in run.glob(pattern):
            try:
                found = path.stat()
                state = (path.name, found.st_ino, found.st_size, found.st_mtime_ns)
                if state in checked:
                    continue
                content = path.read_bytes()
            except FileNotFoundError:  # an old checkpoint, deleted since
                continue
            checked.add(state)
            try:
                whole = is_whole(content)
            except (ValueError, KeyError):
                whole = False
            if not whole:
                wrong.append(f"{path}: {len(content)} bytes")
    if run.exists() and not (run / "config.json").exists():
        wrong.append(f"{run} has no config.json")
    return wrong


def main() -> None:
    run, looks, wrong, checked = Path(sys.argv[1]), 0, [], set()
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        wrong += look(run, checked)
        looks += 1
    print(json.dumps({"looks": looks, "files": len(checked), "wrong": wrong}))


if __name__ == "__main__":
    main()
