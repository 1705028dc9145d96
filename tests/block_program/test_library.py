"""Nobody else can plant code that is run, nor read what is compiled."""

import os
import stat

import pytest
import torch

from stochastic_depth.block_program import library
from stochastic_depth.block_program.library import only_we_write, private_cache
from stochastic_depth.errors import EngineError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes files of another user")
NOBODY = 65534


@pytest.fixture
def above(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folder_is_for_its_owner_alone_whatever_the_umask(above):
    before = os.umask(0)
    try:
        assert private_cache() == above / "stochastic-depth"
    finally:
        os.umask(before)
    assert mode(above / "stochastic-depth") == 0o700


def test_one_of_ours_that_others_can_write_is_closed_to_them(above):
    (above / "stochastic-depth").mkdir(parents=True)
    (above / "stochastic-depth").chmod(0o777)
    assert mode(private_cache()) == 0o700


@needs_root
def test_a_folder_of_another_user_is_refused(above):
    (above / "stochastic-depth").mkdir(parents=True)
    os.chown(above / "stochastic-depth", NOBODY, NOBODY)
    with pytest.raises(EngineError, match=r"not a folder of yours.*XDG_CACHE_HOME"):
        private_cache()


def test_a_link_in_its_place_is_refused(above, tmp_path):
    above.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (above / "stochastic-depth").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="not a folder of yours"):
        private_cache()


def test_a_place_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"no folder for compiled code.*--engine eager"):
        private_cache()


def test_a_file_that_others_can_write_is_not_trusted(tmp_path):
    path = tmp_path / "x.so"
    path.write_bytes(b"")
    path.chmod(0o700)
    assert only_we_write(path)
    for open_to_others in (0o720, 0o702):
        path.chmod(open_to_others)
        assert not only_we_write(path)
    (tmp_path / "link.so").symlink_to(path)
    assert not only_we_write(tmp_path / "link.so")


@needs_root
def test_a_file_of_another_user_is_not_trusted(tmp_path):
    path = tmp_path / "x.so"
    path.write_bytes(b"")
    os.chown(path, NOBODY, NOBODY)
    assert not only_we_write(path)


@pytest.mark.skipif(
    library.why_unavailable() is not None, reason=f"needs kernels: {library.why_unavailable()}"
)
def test_a_library_that_was_planted_is_not_loaded_and_one_of_ours_is(above, monkeypatch):
    made, compile = [], library._compile
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-O1"))  # as good, and sooner there
    monkeypatch.setattr(library, "_compile", lambda *given: (made.append(given), compile(*given)))

    def compiled_by_now():
        library.library.cache_clear()
        library.library(torch.bfloat16)
        return len(made)

    assert compiled_by_now() == 1
    assert compiled_by_now() == 1
    (built,) = (above / "stochastic-depth").iterdir()
    assert mode(built) == 0o700

    built.unlink()  # not written over: it is mapped
    built.write_bytes(b"planted")
    built.chmod(0o777)
    assert compiled_by_now() == 2
    assert built.stat().st_size > 1000

    wrapper = above / "another-compiler"  # of the same version, with options of its own
    wrapper.write_text(f'#!/bin/sh\nexec {library._compiler()} "$@" -O0\n')
    wrapper.chmod(0o700)
    monkeypatch.setenv("CXX", str(wrapper))
    assert compiled_by_now() == 3
    monkeypatch.delenv("CXX")

    # One of ours that is damaged, elsewhere, since a library is loaded once from one place.
    monkeypatch.setenv("XDG_CACHE_HOME", str(above / "other"))
    damaged = private_cache() / built.name
    damaged.write_bytes(b"damaged")
    damaged.chmod(0o700)
    with pytest.raises(
        EngineError, match=r"native kernels: .*; remove .*so, or begin a run with --engine eager"
    ):
        compiled_by_now()
    library.library.cache_clear()
