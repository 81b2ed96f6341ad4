"""Writing tensors: what a disk refuses is an error of the disk, as for every other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(
    tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write contiguous ``tensors`` to a safetensors file, readable as other files are.

    Raises OSError naming the file when the disk is full or may not be written.
    """
    new = not file.exists()
    file.touch()
    mode = file.stat().st_mode  # the library would replace the file by one for its owner alone
    try:
        save_file(dict(tensors), file, metadata=None if metadata is None else dict(metadata))
    except SafetensorError as problem:
        if new:
            file.unlink(missing_ok=True)
        raise OSError(f"{file}: cannot be written ({problem})") from None
    file.chmod(mode)
