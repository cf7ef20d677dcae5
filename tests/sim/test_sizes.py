import pytest

from ssmcache_sim.errors import SizeError
from ssmcache_sim.ranges import parse_int_values, parse_size_values, parse_tier_size_values
from ssmcache_sim.sizes import format_size, parse_size, parse_tier_size

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("40GiB", 40 * GIB),
        ("1.5TB", 1_500_000_000_000),
        ("512MB", 512_000_000),
        ("1.1GB", 1_100_000_000),
        (" 2 kib ", 2048),
        ("1024", 1024),
        ("7B", 7),
        ("unlimited", None),
        ("Unlimited", None),
    ],
)
def test_sizes_are_read_exactly(text: str, num_bytes: int | None) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-5GiB", "0", "0.1B", "40G", "nan", "inf", "1e9", "1_000", "٣GiB"])
def test_a_size_that_is_none_is_one_line_of_error(text: str) -> None:
    with pytest.raises(SizeError) as caught:
        parse_size(text)
    assert repr(text) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_size_beyond_64_bits_is_refused() -> None:
    with pytest.raises(SizeError, match="expected between"):
        parse_size("9999999PiB")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (40 * GIB, "40 GiB"), (1536 * GIB, "1.5 TiB"), (None, "unlimited")],
)
def test_sizes_are_shown_in_binary_units(num_bytes: int | None, text: str) -> None:
    assert format_size(num_bytes) == text


def test_integers_are_lists_and_doubling_ranges_each_once() -> None:
    assert parse_int_values("512", "x") == (512,)
    assert parse_int_values("512:8192:x2", "x") == (512, 1024, 2048, 4096, 8192)
    assert parse_int_values("3, 1:20:x3,9", "x") == (3, 1, 9)


@pytest.mark.parametrize("text", ["", "512,", "0", "-1", "1:2", "8:2:x2", "1:8:x1", "1:8:2", "a", "1:8:x2:9"])
def test_a_wrong_list_of_integers_is_an_error_that_names_the_option(text: str) -> None:
    with pytest.raises(SizeError, match=r"^--tokens-per-block: expected"):
        parse_int_values(text, "--tokens-per-block")


def test_a_range_of_sizes_is_equally_spaced_on_a_log_axis_with_both_ends() -> None:
    sizes = parse_size_values("5GiB:80GiB:5", "x")
    assert sizes == (5 * GIB, 10 * GIB, 20 * GIB, 40 * GIB, 80 * GIB)
    assert parse_size_values("1KiB,unlimited,1024", "x") == (1024, None)


@pytest.mark.parametrize("text", ["5GiB:80GiB", "80GiB:5GiB:3", "5GiB:80GiB:1", "5GiB:unlimited:3", "1GiB,", "1:2:x2"])
def test_a_wrong_list_of_sizes_is_an_error(text: str) -> None:
    with pytest.raises(SizeError):
        parse_size_values(text, "--gpu-memory")


def test_a_tier_below_the_gpu_has_a_size_or_is_written_as_0() -> None:
    assert [parse_tier_size(text, "x") for text in ("0", " 0 ", "1B", "40GiB")] == [0, 0, 1, 40 * GIB]
    assert parse_tier_size_values("0,5GiB:20GiB:3, 1KiB,1024", "x") == (0, 5 * GIB, 10 * GIB, 20 * GIB, 1024)


@pytest.mark.parametrize(
    "text", ["unlimited", "", "-0", "0GiB", "0.5B", "1GiB,", "1GiB:unlimited:2", "0:1GiB:2", "none"]
)
def test_a_wrong_size_of_a_tier_is_an_error_of_one_line(text: str) -> None:
    with pytest.raises(SizeError) as caught:
        parse_tier_size_values(text, "--host-memory")
    assert "\n" not in str(caught.value)
    if ":" not in text:
        assert str(caught.value).startswith("--host-memory: expected ")
        assert "or unlimited" not in str(caught.value)
