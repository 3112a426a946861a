"""Memory as text, and the search for the largest that fits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import ConfigError
from lorakit.plan.largest import largest
from lorakit.plan.units import parse_bytes, show_bytes


@pytest.mark.parametrize(
    "text, size",
    [
        ("24GB", 24e9),
        ("24 gb", 24e9),
        ("24G", 24e9),
        ("16GiB", 16 * 2**30),
        ("1.5TB", 1.5e12),
        ("512MB", 512e6),
        ("1000B", 1000),
    ],
)
def test_memory_is_read_as_it_is_written(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "24", "much", "24 XB", "-1GB", "0GB", "1e3GB", "GB", "24GB please"])
def test_what_is_no_amount_of_memory_is_refused_by_name(text):
    with pytest.raises(ConfigError, match="not an amount of memory"):
        parse_bytes(text)


@pytest.mark.parametrize(
    "size, text",
    [(0, "0 B"), (999, "999 B"), (1280, "1.28 KB"), (999_900_000, "1 GB"), (141e9, "141 GB"), (3e15, "3000 TB")],
)
def test_sizes_are_shown_with_three_digits(size, text):
    assert show_bytes(size) == text


@given(
    st.integers(1, 300),
    st.integers(0, 50),
    st.integers(1, 90),
    st.integers(0, 3),
    st.integers(0, 500),
    st.integers(0, 40_000),
    st.integers(1, 300),
)
def test_the_largest_is_that_of_trying_all(most, base, slope, square, jump, budget, at):
    def cost(n: int) -> int:
        return base + slope * n + square * n * n + jump * (n >= at)

    fitting = [n for n in range(1, most + 1) if cost(n) <= budget]
    assert largest(cost, budget, most) == max(fitting, default=0)


def test_a_straight_line_takes_few_looks():
    looks = []
    assert largest(lambda n: looks.append(n) or 1000 + 7 * n, 1000 + 7 * 123, 1024) == 123
    assert len(looks) <= 6


def test_slack_gives_a_number_that_fits_and_is_nearly_the_largest():
    found = largest(lambda n: n * n, 10_000_000, 100_000, slack=0.02)
    assert 3162 * 0.96 <= found <= 3162


@pytest.mark.parametrize("crossing", [3, 40, 1000, 20_000, 100_000])
def test_a_parabola_takes_few_looks_wherever_it_crosses(crossing):
    looks = []

    def cost(n: int) -> int:
        looks.append(n)
        return 10**8 + 5000 * n + n * n

    found = largest(cost, cost(crossing), 1 << 17, slack=0.02)
    assert crossing * 0.98 - 1 <= found <= crossing
    assert len(looks) <= 7
