import io

import pytest

from jaxprune import _progress
from jaxprune._progress import progress, table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves ten seconds at each look."""
    ticks = iter(range(0, 100_000, 10))
    monkeypatch.setattr(_progress.time, "monotonic", lambda: float(next(ticks)))


@pytest.mark.parametrize("file", [io.StringIO, Terminal])
def test_items_pass_through(file):
    assert list(progress(range(7), "reading", unit="layer", file=file())) == list(range(7))
    assert list(progress(iter("abc"), "reading", file=file())) == ["a", "b", "c"]


def test_a_terminal_gets_one_moving_bar():
    file = Terminal()
    list(progress(range(7), "reading", unit="layer", file=file))
    assert "\r" in file.getvalue() and "reading: 100%" in file.getvalue() and "7/7" in file.getvalue()


def test_a_log_gets_few_lines_with_rate_and_time_left(clock):
    file = io.StringIO()
    list(progress(range(10), "reading", unit="layer", file=file, interval=30.0))
    lines = file.getvalue().splitlines()
    assert "\r" not in file.getvalue() and len(lines) == 4
    assert "reading:  30%" in lines[0] and "3/10 [00:30<01:10, 10.00s/ layer]" in lines[0]
    assert "10/10" in lines[-1]


def test_without_a_total_there_is_a_count(clock):
    file = io.StringIO()
    list(progress(iter(range(10)), "reading", file=file, interval=30.0))
    assert [line.split(" [")[0] for line in file.getvalue().splitlines()] == [f"reading: {n} it" for n in (3, 6, 9, 10)]


def test_an_error_inside_the_loop_is_not_hidden():
    with pytest.raises(KeyError):
        for _ in progress([1], "reading", file=io.StringIO()):
            raise KeyError


def test_table_columns_line_up():
    lines = table([dict(name="q", value=1.5), dict(name="down", value=22), dict(name="up", other=True)]).splitlines()
    assert lines[0].split() == ["name", "value", "other"]
    assert [line[4:11].strip() for line in lines[2:]] == ["1.5", "22", ""]
    assert len({line.index(x) + len(x) for line, x in zip(lines[2:4], ["1.5", "22"], strict=True)}) == 1
    assert table([]) == "\n"
