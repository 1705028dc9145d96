"""Whatever happens to the files of a run is noticed, shown, and never used."""

import dataclasses
import hashlib
import io
import json
import random
import re
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from stochastic_depth.errors import CheckpointError, ConfigError, RunError
from stochastic_depth.files import write_whole
from stochastic_depth.train import begin, fit, open_run, reopen, trained_model
from stochastic_depth.train.checkpoint import (
    MAGIC,
    Checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from stochastic_depth.train.journal import read_journal
from stochastic_depth.train.weights import read_weights, write_weights
from support.runs import STATE, assert_same_end, finish

pytestmark = pytest.mark.usefixtures("one_thread")


def flipped(content: bytes, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def some(bits: int, soak: bool, most: int) -> list[int]:
    """All of them in a soak, else some, the first and the last among them."""
    chosen = range(bits)
    return list(chosen) if soak else [0, *random.Random(0).sample(chosen, most), bits - 1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "c.ckpt"
    save_checkpoint(path, {**STATE, "run": "a"})
    return path, path.read_bytes()


@pytest.mark.soak
def test_every_flipped_bit_of_a_checkpoint_is_noticed(checkpoint, soak, counts):
    path, whole = checkpoint
    for bit in (bits := some(8 * len(whole), soak, 2000)):
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(CheckpointError):
            load_checkpoint(path, "a")
    counts["flipped bits of a checkpoint, noticed"] += len(bits)


@pytest.mark.soak
def test_a_checkpoint_cut_at_every_length_is_noticed(checkpoint, counts):
    path, whole = checkpoint
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError,
            match=r"c\.ckpt is (not a checkpoint of this library, or is cut short|damaged: its)",
        ):
            load_checkpoint(path, "a")
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="damaged: its checksum does not match its"):
        load_checkpoint(path, "a")
    counts["lengths of a truncated checkpoint, noticed"] += len(whole) + 1


@pytest.mark.soak
def test_every_flipped_bit_and_length_of_the_weights_is_noticed(tmp_path, soak, counts):
    path = tmp_path / "model.safetensors"
    weights = {"a": torch.arange(30.0), "b": torch.tensor(7), "c": torch.zeros(2, 3).bfloat16()}
    write_weights(path, weights, {"run": "a", "recipe": "b"})
    whole = path.read_bytes()
    found = read_weights(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    for bit in (bits := some(8 * len(whole), soak, 1000)):
        path.write_bytes(flipped(whole, bit))
        with pytest.raises(RunError, match=r"model\.safetensors"):
            read_weights(path)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(RunError, match=r"model\.safetensors"):
            read_weights(path)
    counts["flipped bits of the weights, noticed"] += len(bits)
    counts["lengths of truncated weights, noticed"] += len(whole)


@pytest.mark.soak
def test_every_flipped_bit_and_length_of_the_configuration_is_noticed(small, path, soak, counts):
    run, _ = begin(small, path)
    described = path / "config.json"
    whole = described.read_bytes()
    for bit in (bits := some(8 * len(whole), soak, 1000)):
        described.write_bytes(flipped(whole, bit))
        with suppress(RunError):
            assert open_run(path) == run  # a blank that became another one
    for length in range(len(whole) - 1):
        described.write_bytes(whole[:length])
        with pytest.raises(RunError, match=r"config\.json"):
            open_run(path)
    counts["flipped bits of config.json, noticed or without effect"] += len(bits)
    counts["lengths of a truncated config.json, noticed"] += len(whole) - 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "damaged or was edited"),
        ({"epochs": 10**400}, "damaged or was edited"),
    ],
)
def test_an_edited_configuration_is_refused(small, path, changes, message):
    begin(small, path)
    values = json.loads((path / "config.json").read_text())
    values["config"] |= changes
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(RunError, match=message):
        open_run(path)


def test_a_configuration_without_its_checksum_is_refused(small, path):
    begin(small, path)
    values = json.loads((path / "config.json").read_text())
    del values["sha256"]
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(RunError, match="damaged or was edited"):
        open_run(path)


@pytest.mark.parametrize("content", [b"5", b"null", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_a_configuration_that_is_none_is_refused(content, path):
    path.mkdir()
    (path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=r"config\.json"):
        open_run(path)


def stopped_after(records, run, images, watch):
    under_way = fit(run, images, watch)
    for _ in range(records):
        next(under_way)
    under_way.close()


def test_files_that_are_no_checkpoints_are_left_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a", keep=1)
    names = [
        "step-best.ckpt",
        "step-000000001 (copy).ckpt",
        "step-7.ckpt",
        "step-００００００００９.ckpt",
    ]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "step-000000099.ckpt").mkdir()
    checkpoints.save(5, best=None, state={})
    checkpoints.save(6, best=None, state={})
    assert checkpoints.steps() == [99, 6]
    state, refused = checkpoints.newest("cpu")
    assert state["step"] == 6
    assert "step-000000099.ckpt cannot be read: Is a directory" in refused[0]
    assert all((tmp_path / name).exists() for name in names)


def test_later_checkpoints_that_are_not_of_this_run_displace_none(tmp_path):
    checkpoints = Checkpoints(tmp_path, "a", keep=2)
    for step in (100, 200):
        Checkpoints(tmp_path, "b", keep=2).save(step, None, {})
    for step in (1, 2, 3):
        checkpoints.save(step, best=None, state={})
    assert checkpoints.steps() == [200, 100, 3, 2]


@pytest.mark.parametrize("state", [5, [], {}, {"run": "a"}, {"run": "a", "step": "1"}])
def test_what_is_no_state_of_a_run_is_refused(tmp_path, state):
    save_checkpoint(tmp_path / "c.ckpt", state)
    with pytest.raises(CheckpointError, match="not the state of a run"):
        load_checkpoint(tmp_path / "c.ckpt", "a")


@pytest.mark.parametrize(
    ("change", "of_the_network"),
    [
        (lambda state: state.pop("optimizer"), False),
        (lambda state: state.update(model=5), True),
        (lambda state: state["model"].popitem(), True),
        (lambda state: state.update(metrics=None), False),
        (lambda state: state["handle"].update(seed="x"), True),
    ],
)
def test_a_state_of_another_network_is_refused(small, path, silent, change, of_the_network):
    run, images = begin(small, path)
    stopped_after(1, run, images, silent)
    state = run.checkpoints.load(4, "cpu")
    change(state)
    save_checkpoint(run.checkpoints.path(4), state)
    if of_the_network:  # an optimizer is not needed to evaluate it
        with pytest.raises(CheckpointError, match="step 4 does not fit this network"):
            trained_model(run, images)
    else:
        trained_model(run, images)
    with pytest.raises(CheckpointError, match="step 4 does not fit this network"):
        next(fit(run, images, silent))


def with_checksum(payload: bytes) -> bytes:
    return MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload


def archive(pickled: bytes, compression: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as made:
        made.writestr("archive/data.pkl", pickled)
        for name, content in {"version": b"3\n", "byteorder": b"little", **more}.items():
            made.writestr(f"archive/{name}", content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "cannot be read"),
        (archive(b""), "cannot be read"),
        (archive(b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R."), "bytearray"),
        (archive(b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R."), "asks for os system"),
        (archive(b"\x80\x02}.", zipfile.ZIP_DEFLATED, **{"data/0": bytes(10**8)}), "compressed"),
        (archive(b"\x80\x02]" + b"]" * 10**5 + b"a" * 10**5 + b"."), "not the state"),
    ],
)
def test_a_checkpoint_with_the_right_checksum_can_still_not_do_harm(tmp_path, payload, message):
    (tmp_path / "c.ckpt").write_bytes(with_checksum(payload))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "c.ckpt", "a")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_half_written_last_line_of_the_journal_is_dropped(small, path, silent, share, tmp_path):
    run, images = begin(small, path)
    stopped_after(2, run, images, silent)
    line = run.journal.read_bytes().splitlines()[0]
    with run.journal.open("ab") as file:
        file.write(line[: int(share * len(line))])
    assert len(run.records()) == 2
    list(fit(*reopen(path), silent))
    assert_same_end(run, finish(tmp_path / "other", small, silent)[0])


@pytest.mark.parametrize(
    "line", [b"5", b"[" * 100_000, b"{}", b'{"step": "x"}', b"\xff", b"NaN", b'{"step": 1e999}']
)
def test_a_line_of_the_journal_that_is_none_is_named(tmp_path, line):
    write_whole(tmp_path / "metrics.jsonl", line + b"\n")
    with pytest.raises(RunError, match=re.escape("metrics.jsonl, line 1 is not a record")):
        read_journal(tmp_path / "metrics.jsonl", "a")


def test_an_empty_folder_is_begun_in_and_a_folder_of_something_else_is_not(
    small, path, monkeypatch
):
    path.mkdir()
    run, _ = begin(small, path)
    assert open_run(path) == run
    described = (path / "config.json").read_bytes()
    with pytest.raises(RunError, match="exists already: choose another --run, or resume it"):
        begin(small, path)
    assert (path / "config.json").read_bytes() == described
    assert [p.name for p in path.parent.iterdir()] == ["run"]
    other = path.with_name("other")
    other.mkdir()
    (other / "thesis").write_bytes(b"")
    with pytest.raises(RunError, match="other exists already, and is not a run: choose another"):
        begin(small, other)
    assert [p.name for p in other.iterdir()] == ["thesis"]
    (current := path.with_name("current")).mkdir()
    monkeypatch.chdir(current)
    for name in (Path("."), current, Path("../current")):
        with pytest.raises(RunError, match="exists already, and is not a run: choose another"):
            begin(small, name)
    assert not list(current.iterdir())


def test_images_too_small_for_the_network_are_told_and_leave_no_folder(small, path):
    tiny = dataclasses.replace(small, data=dataclasses.replace(small.data, size=2))
    with pytest.raises(
        ConfigError, match=r"2x2 pixels, which no cifar-resnet takes: give --data\.size 4, or"
    ):
        begin(tiny, path)
    assert not path.exists()


def test_a_name_too_long_for_the_system_is_told(small, path):
    with pytest.raises(RunError, match="cannot be created: File name too long"):
        begin(small, path.with_name("x" * 300))


@pytest.mark.parametrize("name", ["epochs", "evaluate_every", "keep"])
def test_counts_have_an_end(small, name):
    with pytest.raises(
        ConfigError, match=f"{name.replace('_', '-')} is 1{'0' * 30}: it must be at"
    ):
        dataclasses.replace(small, **{name: 10**30})


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        (b"", r"config\.json is empty: put the original back, or remove \S+ and begin another run"),
        (b"[]", r"config\.json does not describe a run: put the original back"),
        (
            b'{"format": 3, "id',
            r"config\.json is damaged .* put the original back, or begin another",
        ),
        (bytes(2000), r"config\.json is damaged .* put the original back, or begin another run"),
        (b"[" * 9_999, r"config\.json is damaged .* put the original back, or begin another run"),
        (
            b'{"format": 1}',
            r"was written by another version of this library: the format in its config\.json is 1, "
            "and this version reads 3; use the version that wrote it",
        ),
    ],
)
def test_it_is_told_why_a_configuration_is_not_read(content, shown, path):
    path.mkdir()
    (path / "config.json").write_bytes(content)
    with pytest.raises(RunError, match=shown):
        open_run(path)


def test_a_checkpoint_that_does_not_name_the_last_line_of_the_journal_is_refused(
    small, path, silent
):
    run, images = begin(small, path)
    stopped_after(1, run, images, silent)
    state = run.checkpoints.load(4, "cpu")
    del state["journal"]
    save_checkpoint(run.checkpoints.path(4), state)
    with pytest.raises(CheckpointError, match=r"step 4 does not fit .*'journal'"):
        list(fit(run, images, silent))
