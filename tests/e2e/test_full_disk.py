"""A disk that fills up in the middle of a run."""

from __future__ import annotations

import errno

import pytest

from llmc import cli


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_one_message_and_not_a_traceback(monkeypatch, capsys, number):
    def fail(given):
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(cli, "_main", fail)
    assert cli.main(["--config", "run.yml"]) == 2
    assert "goes on from here" in capsys.readouterr().err


def test_a_defect_of_ours_is_not_hidden(monkeypatch):
    def fail(given):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(cli, "_main", fail)
    with pytest.raises(OSError):
        cli.main(["--config", "run.yml"])
