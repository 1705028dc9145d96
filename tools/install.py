"""Install the project and one of its extras into .venv, and say what that does: make install."""

import os
import re
import subprocess
import sys
import threading
import time
import venv
from collections import deque
from pathlib import Path

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv"
EXTRAS = {
    "demo": "PyTorch, scikit-learn and what draws pictures, 1.1 GB",
    "dev": "all that the tests use, about 3 GB",
}
IMPORTED = "import stochastic_depth.lab.comparison"
"""What is compiled at once: PyTorch and what draws pictures. A command would wait for it."""

GPU_BUILD = """
  This PyTorch is built for NVIDIA GPUs: some 3 GB to fetch. Without such a GPU, stop here
  (Ctrl-C), install the CPU build as pytorch.org/get-started says, with .venv/bin/pip
  in the place of pip, and start again: it will be kept.
"""


class Progress:
    """Prints what pip does: a line when that changes, and one every ten seconds."""

    def __init__(self) -> None:
        self.began, self.doing, self.packages = time.monotonic(), "making .venv", 0
        self.warned = False
        self._ended = threading.Event()
        threading.Thread(target=self._tick, daemon=True).start()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.began:5.0f} s  {text}", flush=True)

    def line(self, line: str) -> None:
        """One line of pip's."""
        if found := re.match(r"\s*(?:Downloading|Using cached) (\S+?)-(\d[^-]*)\S* \((.+)\)", line):
            name, version, size = found.groups()
            self.doing = f"fetching {name.rpartition('/')[2]} {version}, {size}"
            if size.endswith("GB") or (size.endswith("MB") and float(size.split()[0]) >= 20):
                self.say(self.doing)
        elif found := re.match(r"Installing collected packages: (.+)", line):
            self.packages = len(found[1].split(", "))
            self.doing = f"unpacking {self.packages} packages"
            self.say(self.doing)
        if not self.warned and re.match(r"Collecting nvidia", line):
            self.warned = True
            print(GPU_BUILD, flush=True)

    def end(self) -> None:
        self._ended.set()

    def _tick(self) -> None:
        while not self._ended.wait(10):
            self.say(self.doing)


def main(extra: str) -> int:
    if sys.version_info < (3, 11):  # noqa: UP036
        print(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=...")
        return 1
    print(f"Installing into .venv: {EXTRAS[extra]}.", flush=True)
    progress = Progress()
    python = VENV / "bin" / "python"
    if not python.exists():
        try:
            venv.create(VENV, with_pip=True)
        except subprocess.CalledProcessError:
            print("python3 has no venv: install it (Debian and Ubuntu: apt install python3-venv)")
            return 1
    progress.doing = "looking at what is needed"
    command = [
        python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off",
        "--no-color", "--no-input",
        "--no-compile",  # nine tenths of it are never imported
        "--constraint", "constraints.txt", "--editable", f".[{extra}]",
    ]  # fmt: skip
    last: deque[str] = deque(maxlen=20)
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        assert pip.stdout is not None
        for line in pip.stdout:
            last.append(line)
            progress.line(line)
    if pip.returncode:
        progress.end()
        print("".join(last), end="")
        print("pip could not install this; what it said last is above. Start again to go on.")
        return pip.returncode
    progress.doing = "compiling what is imported"
    may_write = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    imported = subprocess.run([python, "-c", IMPORTED], cwd=ROOT, env=may_write)
    progress.end()
    if imported.returncode:
        print("What was installed cannot be imported; why is above. Remove .venv and start again.")
        return imported.returncode
    size = sum(file.lstat().st_size for file in VENV.rglob("*") if file.is_file()) / 1e9
    progress.say(f"installed {what_was_new(progress.packages)}; .venv has {size:.1f} GB")
    for name in EXTRAS if extra == "dev" else (extra,):
        (VENV / f"installed-{name}").touch()
    return 0


def what_was_new(packages: int) -> str:
    return f"{packages} packages" if packages > 1 else "the project; all else was there"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(130)
