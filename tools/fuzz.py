"""Search every reader of foreign bytes for an input that breaks it, guided by coverage (atheris).

python tools/fuzz.py [READER ...] [--seconds 60]: each reader is fuzzed in a process of its own
for so long, from good files on, in at most 2 GB. An input that raises anything but the project's
own errors, or takes 20 seconds, is written to fuzz/ and ends the search of that reader.
"""

import argparse
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))


def fuzz(name: str, corpus: str, seconds: int) -> None:
    """Fuzz one reader; does not return."""
    import atheris

    with atheris.instrument_imports(include=["stochastic_depth", "pickletools", "tarfile"]):
        from stochastic_depth.errors import StochasticDepthError
        from support.readers import READERS, whole_files

    for number, content in enumerate(whole_files()[name]):
        (Path(corpus) / f"{number}").write_bytes(content)

    def one(content: bytes) -> None:
        with contextlib.suppress(StochasticDepthError):
            READERS[name](content)

    found = Path("fuzz")
    found.mkdir(exist_ok=True)
    options = [
        f"-max_total_time={seconds}",
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-max_len=20000",
        f"-artifact_prefix={found / name.replace(' ', '-')}-",
    ]
    atheris.Setup([sys.argv[0], *options, corpus], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--seconds", type=int, default=60, help="for each reader")
    parser.add_argument("--corpus", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.corpus:
        fuzz(asked.readers[0], asked.corpus, asked.seconds)
    from support.readers import READERS

    broken = []
    for name in asked.readers or READERS:
        with tempfile.TemporaryDirectory() as corpus:
            command = [sys.executable, __file__, name, "--corpus", corpus]
            done = subprocess.run(
                [*command, f"--seconds={asked.seconds}"],
                capture_output=True,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        tried = re.findall(r"^#(\d+)", done.stderr, re.MULTILINE)
        memory = re.findall(r"rss: (\d+)Mb", done.stderr)
        print(
            f"{name}: {int(tried[-1]) if tried else 0:,} inputs, "
            f"{max(map(int, memory), default=0)} MB, {'broken' if done.returncode else 'held'}",
            flush=True,
        )
        if done.returncode:
            broken.append(name)
            print(done.stderr[-3000:])
    return len(broken)


if __name__ == "__main__":
    sys.exit(main())
