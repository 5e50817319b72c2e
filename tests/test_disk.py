"""A file is there whole or not at all, whoever else writes it; a folder has one command that writes in it."""

import errno
import fcntl
import os
import signal
from pathlib import Path

import pytest
from processes import contents

from kd_dist.disk import alone, exchange, exchange_in_turn, published, replaced
from kd_dist.errors import KdError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_of_two_writers_the_last_to_begin_publishes_and_the_other_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    said = rf"^{path}: a.tar.[0-9a-f]{{8}}.tmp was taken away before it was whole, so another process writes here too; "
    with pytest.raises(KdError, match=said), published(path) as first:
        first.write(b"first, whole")
        with published(path) as second:
            second.write(b"second")
        assert path.read_bytes() == b"second"
    assert path.read_bytes() == b"second" and names(tmp_path) == ["a.tar"]


def test_a_writer_that_is_half_way_is_not_published_by_another(tmp_path):
    path = tmp_path / "a.tar"
    first, second = published(path), published(path)
    one, other = first.__enter__(), second.__enter__()
    one.write(b"first, whole")
    other.write(b"sec")
    other.flush()
    with pytest.raises(KdError):
        first.__exit__(None, None, None)
    assert not path.exists()
    other.write(b"ond")
    second.__exit__(None, None, None)
    assert path.read_bytes() == b"second" and names(tmp_path) == ["a.tar"]


def test_what_killed_writers_have_left_goes_with_the_next_one_and_nothing_else_does(tmp_path):
    path = tmp_path / "a.tar"
    for _ in range(2):
        child = os.fork()
        if child == 0:
            with published(path) as file:
                file.write(b"half")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert len(names(tmp_path)) == 1 and not path.exists()  # the second has removed what the first left
    others = ["a.idx.01234567.tmp", "a.tar.mine.tmp", "b.tar.01234567.tmp"]
    for name in others:
        (tmp_path / name).touch()
    with published(path) as file:
        file.write(b"whole")
    assert names(tmp_path) == sorted(["a.tar", *others]) and path.read_bytes() == b"whole"


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, same_names):
    path = tmp_path / "a.tar"
    path.write_bytes(b"old")
    same_names(path).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught, published(path) as file:
        file.write(b"new")
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.tar"]


# ---------------------------------------------------------------------------------------------- alone


def test_a_second_one_is_refused_and_the_lock_goes_with_the_first(tmp_path):
    folder = tmp_path / "new"
    said = rf"^{folder}: process {os.getpid()} on .* is writing here; wait for it, or choose another folder$"
    with alone(folder), pytest.raises(KdError, match=said), alone(folder):
        pass
    with alone(folder):
        pass


@pytest.mark.parametrize("below", ["runs", "runs/digits"])
def test_a_file_in_the_way_of_a_folder_is_one_sentence(tmp_path, below):
    (tmp_path / "runs").write_text("mine")
    with (
        pytest.raises(KdError, match=r": cannot be made a folder \(.*\); choose another one$"),
        alone(tmp_path / below),
    ):
        pytest.fail("there is no such folder")
    assert (tmp_path / "runs").read_text() == "mine"


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(failure, os.strerror(failure))

    monkeypatch.setattr(fcntl, "flock", refuse)
    for failure in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
        with alone(tmp_path):
            inside = (tmp_path / ".lock").read_text()
        assert inside.startswith(f"process {os.getpid()} on ")
        said = capsys.readouterr().err
        assert said == (
            f"warning: {tmp_path}: its file system has no locks ({os.strerror(failure)}), so nothing keeps a second "
            f"command from writing here; start none\n"
        )
    failure = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), alone(tmp_path):
        pass


def test_a_folder_takes_the_place_of_another_only_when_it_is_whole(tmp_path):
    folder = tmp_path / "package"

    def fill(word: str, fail: bool = False) -> None:
        with replaced(folder) as fresh:
            assert fresh.parent == tmp_path and not list(fresh.iterdir())
            (fresh / "deep").mkdir()
            (fresh / "deep" / word).write_text(word)
            if fail:
                raise KeyError(word)

    with pytest.raises(KeyError):
        fill("never", fail=True)
    assert not list(tmp_path.iterdir())
    fill("first")
    assert contents(tmp_path) == {"package/deep/first": b"first"}
    (tmp_path / "package.0123abcd.tmp").mkdir()  # of a killed process
    (tmp_path / "package.notes.tmp").mkdir()  # of somebody else
    with pytest.raises(KeyError):
        fill("never", fail=True)
    assert contents(tmp_path) == {"package/deep/first": b"first"}
    fill("second")
    assert contents(tmp_path) == {"package/deep/second": b"second"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["package", "package.notes.tmp"]


@pytest.mark.parametrize("way", [exchange, exchange_in_turn])
def test_two_folders_exchange_their_names(tmp_path, way):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "said").write_text(name)
    way(tmp_path / "one", tmp_path / "other")
    assert contents(tmp_path) == {"one/said": b"other", "other/said": b"one"}
    with pytest.raises(OSError):
        way(tmp_path / "gone", tmp_path / "never")


@pytest.mark.parametrize("what", ["file", "link", "dangling"])
def test_what_is_no_folder_of_its_own_is_not_replaced(tmp_path, what):
    place, elsewhere = tmp_path / "package", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if what == "file":
        place.write_text("mine")
    else:
        place.symlink_to(elsewhere if what == "link" else tmp_path / "nowhere")
    before = names(tmp_path)
    with pytest.raises(KdError, match="package: is not a folder of its own; move it away, then"), replaced(place):
        pass
    assert names(tmp_path) == before and place.is_symlink() == (what != "file")
