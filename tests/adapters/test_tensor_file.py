"""A disk that takes no more says so in one line, whatever is being written."""

from __future__ import annotations

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.tensor_file import write_tensors


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system refuses larger files with an error, as a full disk does."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    write_tensors(tensors, tmp_path / "t.safetensors", {"format": "pt"})
    assert load_file(tmp_path / "t.safetensors")["a"].equal(tensors["a"])


@pytest.mark.parametrize("written_before", [False, True])
def test_it_is_as_readable_as_other_files(tmp_path: Path, written_before: bool) -> None:
    file = tmp_path / "t.safetensors"
    if written_before:
        file.touch(mode=0o640)
    usual = os.umask(0o022)
    try:
        write_tensors({"a": torch.zeros(2)}, file)
    finally:
        os.umask(usual)
    assert file.stat().st_mode & 0o777 == (0o640 if written_before else 0o644)


def test_a_full_disk_is_an_error_of_the_disk(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    with (
        files_of_at_most(4096),
        pytest.raises(OSError, match=r"t\.safetensors: cannot be written") as found,
    ):
        write_tensors({"a": torch.zeros(100_000)}, file)
    assert "\n" not in str(found.value)
    assert not file.exists()
