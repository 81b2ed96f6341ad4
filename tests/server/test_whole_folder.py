"""A folder that appears whole, or not at all, and says so before the work rather than after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.whole_folder import whole_folder


def test_it_appears_at_the_end_and_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    with whole_folder(out) as made:
        (made / "file").write_text("whole")
        assert not out.exists()
    assert (out / "file").read_text() == "whole"
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "other") as made:
        (made / "file").write_text((made / "absent").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_link_to_an_empty_folder_is_followed(tmp_path: Path) -> None:
    large, link = tmp_path / "large" / "disk", tmp_path / "out"
    large.mkdir(parents=True)
    link.symlink_to(large)
    with whole_folder(link) as made:
        assert made.parent.parent == large.parent  # on that disk, not on this one
        (made / "file").write_text("whole")
    assert link.is_symlink()
    assert (large / "file").read_text() == "whole"


@pytest.mark.parametrize("kind", ["here", "mount"])
def test_a_folder_that_cannot_be_replaced_is_refused_before_any_work(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if kind == "here":
        monkeypatch.chdir(out)
        out = Path()
    else:
        monkeypatch.setattr(Path, "is_mount", lambda self: self == out)
    said = "no folder can take its place; name one in it"
    with pytest.raises(OSError, match=said) as error, whole_folder(out):
        pytest.fail("the work has begun")
    assert error.value.filename
