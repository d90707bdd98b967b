"""Values of the command line against published parsers' results, and what they refuse."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dnnlib.errors import ConfigError
from dnnlib.parse import format_nimg, parse_bytes, parse_int_list, parse_nimg
from tests.helpers.paths import GOLDEN_DIR

NUMBERS = json.loads((GOLDEN_DIR / "numbers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", NUMBERS["parse_nimg"], ids=lambda case: case["text"])
def test_image_counts_parse_as_published(case):
    assert parse_nimg(case["text"]) == case["value"]


@pytest.mark.parametrize("case", NUMBERS["parse_int_list"], ids=lambda case: case["text"])
def test_lists_of_numbers_parse_as_published(case):
    assert parse_int_list(case["text"]) == case["value"]


def test_values_that_are_parsed_already_pass():
    assert parse_nimg(7) == 7
    assert parse_int_list([3, 1]) == [3, 1]


@given(st.integers(0, 1 << 50))
def test_an_image_count_reads_back_as_written(nimg):
    assert parse_nimg(format_nimg(nimg)) == nimg


@given(st.lists(st.integers(0, 10**6), min_size=1))
def test_numbers_keep_their_order_and_repeats(numbers):
    assert parse_int_list(",".join(map(str, numbers))) == numbers


@pytest.mark.parametrize("text", ["", "abc", "-5", "1.5", "1e6", "Ki", "12ki", "12K", "1 Mi", "0x10"])
def test_text_that_is_no_image_count_is_refused(text):
    with pytest.raises(ConfigError, match="Ki, Mi or Gi"):
        parse_nimg(text)


@pytest.mark.parametrize("text", ["", "a", "1,", "1-", "--1", "1-2-3", "1.5", "1;2"])
def test_text_that_is_no_list_of_numbers_is_refused(text):
    with pytest.raises(ConfigError, match="neither a number nor a range"):
        parse_int_list(text)


def test_numbers_and_ends_of_ranges_may_be_negative():
    assert parse_int_list("-3") == [-3]
    assert parse_int_list("-2-1,5,-4--3") == [-2, -1, 0, 1, 5, -4, -3]


def test_a_range_that_runs_backwards_is_refused_with_the_right_one():
    with pytest.raises(ConfigError, match=r"write 5-10$"):
        parse_int_list("10-5")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        ("7B", 7),
        ("2K", 2000),
        ("500MB", 500_000_000),
        ("2GiB", 2 << 30),
        ("1Ti", 1 << 40),
        (" 3G ", 3 * 10**9),
    ],
)
def test_sizes_have_units_of_1000_or_1024(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5GB", "2 GB", "GB", "2KiBi", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size; write bytes with an optional unit"):
        parse_bytes(text)
