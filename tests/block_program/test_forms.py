"""The native kernels as they are compiled for other processors, as far as this one can run them.

Vectors of another width are lowered by the compiler to what there is, and the instructions that sum
products of bfloat16, of pairs and of tiles, are written out; so every form's logic runs everywhere.
What only the instructions themselves could show is compiled, and not run. NEON runs under qemu.
"""

import shutil
import subprocess

import pytest
import torch

from stochastic_depth.block_program import library
from support import kernels

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        library.why_unavailable() is not None,
        reason=f"needs a compiler: {library.why_unavailable()}",
    ),
]
FORMS = {
    "AVX-512": ("-DLANES=16",),
    "AVX-512 with products of pairs": ("-DLANES=16", "-DPAIRS"),
    "AVX-512 with products of tiles": ("-DLANES=16", "-DPAIRS", "-DTILES"),
    "NEON": ("-DLANES=4",),
}
if torch.cpu.get_capabilities().get("avx512_f"):
    FORMS["AVX2"] = ("-march=haswell",)
if torch.cpu.get_capabilities().get("amx_bf16"):
    FORMS["AVX512-BF16 without AMX"] = ("-mno-amx-bf16",)
    FORMS["AVX-512 where AMX is not permitted"] = library.WITHOUT_TILES
FLAGS = library.FLAGS
"""Of the form that is for this processor."""
CROSS = "aarch64-linux-gnu-g++"
INSTRUCTIONS = {
    "vdpbf16ps": ("g++", "-march=cooperlake"),
    "tdpbf16ps": ("g++", "-march=sapphirerapids"),
    "vfmadd": ("g++", "-march=skylake-avx512"),
    "bfdot": (CROSS, "-march=armv8.6-a"),
    "fmla": (CROSS, "-march=armv8-a"),
}


@pytest.fixture(scope="module", params=FORMS, ids=str)
def form(request):
    patch = pytest.MonkeyPatch()
    patch.setattr(library, "FLAGS", (*library.FLAGS, "-O1", *FORMS[request.param]))
    library.library.cache_clear()
    yield request.param
    patch.undo()
    library.library.cache_clear()


@pytest.mark.parametrize(
    ("n", "channels", "side"),
    [
        *((3, 16, 32), (2, 32, 16), (4, 32, 24), (3, 64, 8)),
        *((5, 16, 8), (5, 32, 4), (9, 64, 2)),  # narrow
    ],
)
def test_a_branch(form, n, channels, side):
    kernels.check_a_branch(n, channels, side, 1.25, 2)


@pytest.mark.parametrize(("n", "channels", "side"), [(3, 16, 16), (9, 16, 8), (9, 32, 4)])
def test_a_transition(form, n, channels, side):
    kernels.check_a_transition(n, channels, side, torch.bfloat16, 2)


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (4, 16)])
def test_the_stem(form, channels, side):
    kernels.check_the_stem(channels, side)


def test_what_is_between_and_the_head(form):
    kernels.check_two_branches(32, 16)
    kernels.check_pooling_and_padding(16, (16, 16), torch.bfloat16)
    kernels.check_another_first_convolution(16, 32, 2)
    kernels.check_the_head(64, 10)
    kernels.check_a_large_mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_step_is_as_exact_as_by_pytorchs_kernels(form, dtype):
    if dtype == torch.float32 and "products of" in form:
        pytest.skip("pairs and tiles are of bfloat16")
    kernels.assert_as_exact((2, 3, 4), dtype, (32, 32))


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_processors_that_are_not_here_get_their_instruction(instruction, tmp_path):
    compiler, processor = INSTRUCTIONS[instruction]
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    flags = [flag for flag in FLAGS if flag not in ("-march=native", "-shared")]
    flags += ["-O1", "-fexpensive-optimizations", processor]
    made = tmp_path / "kernels.s"
    command = [compiler, *flags, "-S", "-o", str(made), str(library.SOURCE)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized" in outcome.stderr or "bad value" in outcome.stderr:
        pytest.skip(f"this {compiler} does not know {processor}")
    assert outcome.returncode == 0, outcome.stderr
    assert made.read_text().count(instruction) > 30


@pytest.mark.parametrize("flags", [(), ("-DFLOAT32",), ("-march=armv8.6-a",)], ids=str)
def test_on_arm_the_kernels_give_what_they_give_here(flags, tmp_path):
    for program in (CROSS, "qemu-aarch64"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (Debian: g++-aarch64-linux-gnu, qemu-user)")
    source = (
        library.SOURCE.parent.parent.parent.parent.parent / "tests/block_program/all_kernels.cpp"
    )
    pairs = ("-DPAIRS",) if "-march=armv8.6-a" in flags else ()
    here = [flag for flag in flags if flag.startswith("-D")]
    builds = {
        "here": ["g++", *here, *pairs],  # for any processor, which rounds as that of Arm does
        "arm": [CROSS, "-static", *flags],
    }
    runs = {"here": [], "arm": ["qemu-aarch64"]}
    outcomes = {}
    for name, command in builds.items():
        made = tmp_path / name
        rest = ["-O1", "-pthread", "-std=c++17", f"-DMOST_THREADS={library.MOST_THREADS}"]
        rest += [f"-I{library.SOURCE.parent}", "-o", str(made), str(source)]
        subprocess.run([*command, *rest], check=True)
        said = subprocess.run([*runs[name], str(made)], check=True, capture_output=True, text=True)
        outcomes[name] = [
            torch.tensor([*map(float, line.split()[1:])]) for line in said.stdout.splitlines()
        ]
    assert len(outcomes["here"]) == 6 * 6 + 4 * 2 + 2 * 5
    for mine, theirs in zip(outcomes["arm"], outcomes["here"], strict=True):
        assert mine.numel() > 0
        assert theirs.isfinite().all()
        assert (mine - theirs).norm() <= 1e-2 * theirs.norm()
