import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from stochastic_depth import __version__
from stochastic_depth.cli import COMMANDS, main, spin_count
from stochastic_depth.cli.analyze import QUESTIONS
from stochastic_depth.cli.bench import BENCHMARKS
from stochastic_depth.cli.sweep import OPTIONS
from stochastic_depth.errors import MissingExtraError
from stochastic_depth.recipes import RECIPES

SMALL = ["--model.depth", "8", "--epochs", "2"]


def test_without_a_command_the_commands_are_told(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {command} " in shown for command in COMMANDS)


PAGES = [
    *([command] for command in COMMANDS),
    *(["analyze", question] for question in QUESTIONS),
    *(["bench", benchmark] for benchmark in BENCHMARKS),
    *(["sweep", kind] for kind in OPTIONS),
    *(["sweep", kind, "digits"] for kind in OPTIONS),
    *([command, recipe] for command in ("train", "compare") for recipe in RECIPES),
]


@pytest.mark.parametrize("page", PAGES, ids=" ".join)
def test_every_page_of_help_fills_eighty_columns_and_no_more(page, capsys):
    assert main([*page, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith(f"usage: stochastic-depth {' '.join(page)} [") for line in lines)
    assert all(len(line) <= 80 for line in lines if not line.startswith("usage: "))  # tyro's
    assert "(default: None)" not in " ".join(lines)
    boxes = [line[1:-1].rstrip() for line in lines if len(line) == 80 and line[0] in "│ "]
    for line, following in pairwise(boxes):
        at = len(following) - len(following.lstrip())
        if at > 3 and line[at - 2 : at] == "  " and line[at:].strip():  # one description
            assert len(line) + 1 + len(following.split()[0]) > 77, (line, following)


@pytest.mark.parametrize("command", ["train", "compare", "sweep survival", "sweep gates"])
def test_help_without_a_recipe_names_the_options_and_where_all_of_them_are(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"Options: stochastic-depth {command} RECIPE --help\n" in shown
    named = re.findall(r"--[a-z.-]+", shown.partition("Those used most: ")[2])
    assert len(named) >= 7
    assert main([*command.split(), "digits", "--help"]) == 0
    page = capsys.readouterr().out
    assert all(f" {option} " in page for option in named)


def test_without_source_code_commands_work_and_options_have_no_text(monkeypatch, capsys):
    def none(_):
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", none)
    assert main(["train", "digits", "--help"]) == 0
    assert "--survival.final FLOAT" in capsys.readouterr().out


def test_a_recipe_keeps_its_name(capsys):
    assert main(["train", "digits", "--recipe", "cifar10-resnet110"]) == 2
    capsys.readouterr()
    main(["train", "digits", "--help"])
    assert "--recipe" not in capsys.readouterr().out


def test_the_help_of_a_recipe_tells_defaults_and_units(capsys):
    assert main(["train", "svhn-resnet152", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "test error 1.75 %" in shown
    assert "--survival.final FLOAT" in shown
    assert "(default: 0.5)" in shown
    assert "Passes over the training images" in shown


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"stochastic-depth {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian"], "did you mean train?"),
        (["train", "cifar10-resnet10"], "cifar10-resnet110"),
        (["recipes", "digit"], "did you mean digits"),
        (["train", "digits", "--epoch", "3"], "--epochs"),
        (["train", "digits", "--survival.finale", "0.2"], "--survival.final"),
        (["train", "digits", "--model.kind", "vgg"], "cifar-resnet"),
        (["train", "digits", "--epochs", "many"], "many"),
        (["train", "digits", "--survival.final", "1.5"], "survival.final is 1.5"),
        (["compare", "--seeds", "0"], "--seeds is 0: it must be at least 1"),
        (["predict", "run"], "no IMAGE is given"),
        (["report"], "no RUN is given"),
        (["analyze", "pruning"], "no RUN is given"),
        (["inspect", "timm/resnet18", "--repeats", "0"], "--repeats is 0"),
        (["analyze", "activ"], "did you mean active?"),
        (["bench", "peer"], "did you mean peers"),
        (["eval"], "RUN"),
        (["train", "digits", "--run", "--help"], "Missing value for argument '--run'"),
        (["compare", "digits-constant"], "constant depth already"),
        (["train", "--resume", "nowhere", "--epochs", "9"], "a run cannot be extended"),
        (["train", "--resume", "nowhere", "--seed=1"], "--seed cannot be given with --resume"),
        (["train", "--resume", "run", "--data.root", "D"], "with --resume: give --data DIR"),
        (["export", "nowhere", "--depth", "2"], "--depth is 2.0: it must be above 0"),
        (["export", "nowhere", "--elastic", "--format", "onnx"], "--format asks for onnx"),
        (["export", "nowhere", "--elastic", "--out", "net.onnx"], "--out net.onnx asks for onnx"),
        (["export", "nowhere", "--elastic", "--depth", "0.7"], "--depth is 0.7: leave one out"),
        (["predict", "nowhere", "picture.png", "--depth", "0"], "--depth is 0.0"),
        (["bench", "depth", "--deepest", "10"], "--deepest is 10"),
        (["recipes", "digits", "garbage"], "garbage is too much"),
    ],
)
def test_a_typo_is_met_with_a_suggestion_and_exit_code_2(arguments, hint, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert hint in shown.err + shown.out


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["train", "cifar10-resnet110"], "root"),
        (["train", "digits", "--model.depth", "9"], "depth=9"),
        (["train", "--resume", "nowhere"], "nowhere is not a run folder"),
        (["eval", "nowhere"], "nowhere is not a run folder"),
        (["predict", "nowhere.onnx", "picture.png"], "nowhere.onnx does not exist"),
        (["report", "nowhere"], "nowhere holds no run"),
        (["analyze", "active", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(arguments, shown, capsys):
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert shown in error
    assert error.count("\n") == 1


def test_the_runs_in_a_folder_of_runs_are_named(tmp_path, capsys):
    for name in ("stochastic-seed0", "constant-seed0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert main(["eval", str(tmp_path)]) == 1
    runs = f"{tmp_path / 'constant-seed0'}, {tmp_path / 'stochastic-seed0'}"
    assert f"; the runs in it are {runs}" in capsys.readouterr().err


WITHOUT_PYTORCH = """
import sys
from stochastic_depth.cli import main
code = main(sys.argv[1:])
print(sorted({"torch", "numpy", "altair"} & set(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["trian"], 2),
        *([[command, "--help"], 0] for command in COMMANDS),
        (["train", "digits", "--help"], 0),
        (["train", "digits", "--epoch", "3"], 2),
        (["train", "digits", "--survival.final", "1.5"], 2),
        (["bench", "depth", "--deepest", "10"], 2),
        (["bench", "peers", "--help"], 0),
        (["eval", "nowhere"], 1),
        (["export", "nowhere"], 1),
        (["predict", "nowhere", "picture.png"], 1),
        (["analyze", "active", "nowhere"], 1),
        (["train", "--resume", "nowhere"], 1),
        (["recipes"], 0),
    ],
)
def test_help_and_what_is_wrong_need_no_pytorch(arguments, code):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PYTORCH, *arguments], capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stderr.splitlines()[-1] == "[]"


def test_threads_that_wait_give_their_core_back(monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == spin_count()
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"


@pytest.mark.parametrize(
    ("processor", "count"),
    [("vendor_id: GenuineIntel", "1000"), ("vendor_id: AuthenticAMD", "10000"), (None, "10000")],
)
def test_threads_look_less_often_where_a_look_takes_longer(processor, count, monkeypatch):
    def opened(path):
        assert path == "/proc/cpuinfo"
        if processor is None:
            raise FileNotFoundError(path)
        return io.StringIO(processor)

    monkeypatch.setattr("builtins.open", opened)
    assert spin_count() == count


def test_train_prints_a_line_for_each_epoch_and_then_the_errors(tmp_path, capsys):
    assert main(["train", "digits", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("digits: cifar-resnet 8, 1,197 images → ")
    assert re.match(r"cpu float32, engine (eager|program, native kernels): ", lines[1])
    assert lines[2].startswith("epoch 1/2 loss ")
    assert lines[3].startswith("epoch 2/2 loss ")
    assert "best validation" in "".join(lines[4:])
    assert not any("\x1b" in line for line in lines)
    assert (tmp_path / "runs" / "digits" / "model.safetensors").exists()


def test_a_second_run_of_the_same_recipe_gets_a_folder_of_its_own(tmp_path):
    for _ in range(2):
        assert main(["train", "digits", *SMALL, "--epochs", "1", "--quiet"]) == 0
    assert (tmp_path / "runs" / "digits-2" / "model.safetensors").exists()


def test_quiet_is_quiet(capsys):
    assert main(["train", "digits", *SMALL, "--quiet"]) == 0
    assert capsys.readouterr().out == ""


def test_a_recipe_varies_by_command_line(tmp_path):
    assert (
        main(["train", "digits", *SMALL, "--survival.final", "0.2", "--run", "mine", "--quiet"])
        == 0
    )
    config = json.loads((tmp_path / "mine" / "config.json").read_text())["config"]
    assert config["survival"]["final"] == 0.2
    assert config["model"]["depth"] == 8


def test_eval_gives_the_errors_of_the_journal(tmp_path, capsys):
    main(["train", "digits", *SMALL, "--run", "mine", "--quiet"])
    assert main(["eval", "mine", "--checkpoint", "last"]) == 0
    last = json.loads((tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['test_error']:.2f} %" in capsys.readouterr().out


def test_recipes_lists_all_and_tells_one(capsys):
    assert main(["recipes"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in RECIPES)
    assert main(["recipes", "cifar10-resnet110"]) == 0
    shown = capsys.readouterr().out
    assert "Published: test error 5.23 %" in shown
    assert json.loads(shown[shown.index("{") :])["epochs"] == 500


def test_compare_shows_both_depths_and_trains_nothing_twice(tmp_path, capsys):
    arguments = ["compare", "digits", *SMALL, "--seeds", "2", "--out", "both"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for title in ("ResNet-8 on digits", "Test error", "Training time", "Saving", "FLOPs saved"):
        assert title in shown
    assert (tmp_path / "both" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert len(content["curves"]["stochastic"]) == 2
    journal = tmp_path / "both" / "constant-seed0" / "metrics.jsonl"
    before = journal.read_bytes()
    assert main(arguments) == 0
    assert journal.read_bytes() == before
    assert main([*arguments, "--epochs", "3"]) == 1
    assert "another configuration" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["recipes", "digits"]])
def test_a_reader_that_goes_away_is_no_error(arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "stochastic_depth", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    shown = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 128 + signal.SIGPIPE
    assert shown == ""


@pytest.mark.parametrize("becomes", [KeyboardInterrupt, RecursionError, MissingExtraError])
def test_an_interrupt_is_one_whatever_a_library_makes_of_it(becomes, monkeypatch, capsys):
    def importing(*_):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        except KeyboardInterrupt:
            raise becomes("of the library's own") from None

    monkeypatch.setattr("stochastic_depth.cli.require", importing)
    before = signal.getsignal(signal.SIGINT)
    assert main(["recipes"]) == 128 + signal.SIGINT
    assert capsys.readouterr() == ("", "")
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_while_pytorch_is_imported_ends_the_command_without_a_traceback():
    command = [sys.executable, "-X", "importtime", "-m", "stochastic_depth", "train", "digits"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.endswith(" torch._C\n"):
            break
    process.send_signal(signal.SIGINT)
    shown = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGINT
    assert [line for line in shown.splitlines() if not line.startswith("import time:")] == []


def test_a_number_that_is_none_is_told_without_python(capsys):
    for option, value, kind in (("epochs", "two", "a whole"), ("survival.final", "half", "a")):
        assert main(["train", "digits", f"--{option}", value]) == 2
        assert (
            f"Error parsing --{option}: '{value}' is not {kind} number" in capsys.readouterr().err
        )


def test_help_says_which_recipe_is_the_default(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "stochastic depth. The default." in " ".join(shown.split())


@pytest.mark.parametrize(
    ("arguments", "problem", "remedy"),
    [
        ("digits --schedule.until 0.5", "where schedule is none", "--schedule early"),
        ("digits --schedule.gamma=0.001", "where schedule is none", "--schedule progressive"),
        ("digits-constant --survival.gate batch", "survival.rule is c", "--survival.rule linear"),
        ("digits-constant --survival.balance", "survival.rule is c", "--survival.rule uniform"),
        ("digits-constant --schedule early", "survival.rule is c", "--survival.rule linear"),
        ("digits-constant --distributed.rank-gates", "survival.rule", "--survival.rule linear"),
        ("digits --data.download", "where data.name is digits, which is embedded", None),
        ("digits --data.workers 9", "where data.name is digits, which is read into", None),
        ("cifar10-small --data.workers=9", "where data.name is cifar10, which is", None),
        ("digits --model.growth 12", "where model.kind is cifar-resnet", None),
        ("digits --model.no-bottleneck", "where model.kind is cifar-resnet", None),
        ("cifar10-densenet-bc100 --model.init he", "where model.kind is densenet", None),
        ("cifar10-small-vit --distributed.sync_batchnorm", "which has no BatchNorm", None),
        (
            "digits --optimizer.warmup-rate 0.01",
            "where optimizer.warmup-epochs is 0",
            "--optimizer.warmup-epochs 1",
        ),
        (
            "digits --optimizer.divisor 10 --optimizer.milestones",
            "where optimizer.milestones is empty",
            "--optimizer.milestones 0.5",
        ),
    ],
)
def test_an_option_without_effect_is_refused_and_the_remedy_works(
    arguments, problem, remedy, monkeypatch, capsys
):
    begun = []
    monkeypatch.setattr("stochastic_depth.cli.train._in_all_processes", lambda *_: begun.append(1))
    recipe, option, *_ = arguments.split()
    assert main(["train", *arguments.split()]) == 2
    shown = capsys.readouterr().err
    assert f"error: {option.split('=')[0][2:].replace('no-', '').replace('_', '-')} is " in shown
    assert problem in shown
    assert not begun
    main(["train", recipe] if remedy is None else ["train", *arguments.split(), *remedy.split()])
    assert begun


def test_compare_refuses_an_option_without_effect(capsys):
    assert main(["compare", "digits", "--schedule.until", "0.5"]) == 2
    assert "schedule.until is 0.5, which has no effect where" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["train", "digits", "--run", ""], ["compare", "--out="]])
def test_an_empty_name_is_not_the_current_folder(arguments, capsys):
    assert main(arguments) == 2
    assert "the name is empty" in " ".join(capsys.readouterr().err.split())


def test_a_share_that_is_rounded_is_told_as_other_notes_are(tmp_path, capsys):
    options = "--model.depth 8 --data.train 104 --epochs 1 --optimizer.batch 9 --survival.final 0.3"
    options += " --survival.gate subset --survival.balance"
    assert main(["train", "digits", *options.split(), "--run", "run"]) == 0
    shown = capsys.readouterr()
    note = "runs on 33 % of the samples, because their number is rounded, but evaluation multiplies"
    (line,) = (line for line in shown.out.splitlines() if note in line)
    assert "p_l = 0.3: begin a run with --survival.scale training, which divides by the" in line
    assert main(["train", "digits", *options.split(), "--run", "quiet", "--quiet"]) == 0
    assert shown.err == "".join(capsys.readouterr()) == ""
    dividing = ["--survival.scale", "training", "--run", "dividing"]
    assert main(["train", "digits", *options.split(), *dividing]) == 0
    assert note not in capsys.readouterr().out
