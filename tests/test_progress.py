"""Progress: a bar in a terminal, plain lines without rich, silence elsewhere."""

import builtins
import sys

import pytest

from jaxunlearn.progress import progress


def work(total, sizes, **options):
    with progress("replaying", total, **options) as advance:
        for size in sizes:
            advance(size)


@pytest.fixture
def no_rich(monkeypatch):
    """`import rich` fails, whatever is installed or already imported."""
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "rich":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_it_is_silent_where_there_is_no_terminal(capsys):
    work(10, [1] * 10)
    assert capsys.readouterr() == ("", "")


def test_it_is_silent_when_told_so_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    work(10, [1] * 10, show=False)
    assert capsys.readouterr() == ("", "")


def test_it_shows_in_a_terminal(capsys, monkeypatch, no_rich):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    work(10, [10])
    assert "replaying: 10/10" in capsys.readouterr().err


def test_without_rich_it_writes_lines_to_standard_error_and_not_many(capsys, no_rich):
    work(1000, [1] * 1000, show=True)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[-1] == "replaying: 1000/1000"
    assert 1 <= len(lines) <= 11


def test_with_rich_it_draws_a_bar_on_standard_error(capsys):
    pytest.importorskip("rich")
    work(4, [1, 3], show=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "replaying" in err
    assert "4/4" in err


@pytest.mark.parametrize("total", [0, -1])
def test_nothing_to_do_shows_nothing(total, capsys):
    work(total, [], show=True)
    work(total, [0], show=True)
    assert capsys.readouterr() == ("", "")


def test_an_error_inside_comes_out(no_rich):
    with pytest.raises(ZeroDivisionError), progress("replaying", 3, show=True):
        raise ZeroDivisionError
