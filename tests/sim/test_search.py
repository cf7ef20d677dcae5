"""The search by replays on made-up savings."""

from collections.abc import Callable

import pytest

from ssmcache_sim.candidates import Shape
from ssmcache_sim.search import Option, SearchResult, search

SHAPES = [Shape(1, interval, "last") for interval in (1, 2, 4, 8)]
OPTIONS = [(shape, slots) for shape in SHAPES for slots in (2, 50, 100, 150, 200)]


def savings(option: Option) -> int:
    """One peak a shape, that of the interval 2 the highest, at 70 slots."""
    shape, slots = option
    assert shape.ssm_reuse_interval is not None
    peak = {1: 60, 2: 70, 4: 80, 8: 90}[shape.ssm_reuse_interval]
    height = {1: 9000, 2: 10_000, 4: 7000, 8: 5000}[shape.ssm_reuse_interval]
    return height - (slots - peak) ** 2


def find(
    estimate: Callable[[Option], int], num_replays: int = 24, known: dict[Shape, int] | None = None
) -> tuple[SearchResult, list[Option]]:
    made: list[Option] = []

    def measure(option: Option) -> int:
        made.append(option)
        return savings(option)

    return search(OPTIONS, estimate, measure, known or {}, num_replays, lambda option: True, lambda done: None), made


def test_true_estimates_need_a_few_replays_of_the_best_and_the_runner_up() -> None:
    found, made = find(savings)
    assert (found.num_replays, found.num_promising) == (6, 0)
    assert [shape.ssm_reuse_interval for shape, _ in made] == [2, 1, 2, 2, 1, 1]
    assert max(found.saved_ns.values()) >= 10_000 - 2


@pytest.mark.parametrize("error", [-4000, 4000])
def test_an_error_that_all_estimates_share_is_corrected(error: int) -> None:
    found, made = find(lambda option: savings(option) + error)
    assert len(made) == 6
    assert max(found.saved_ns.values()) >= 10_000 - 2


def test_an_error_of_one_shape_is_found_out() -> None:
    found, _ = find(lambda option: savings(option) + 5000 * (option[0].ssm_reuse_interval == 8))
    best = max(found.saved_ns, key=lambda option: found.saved_ns[option])
    assert best[0].ssm_reuse_interval == 2
    assert found.num_replays <= 12


def test_the_bound_holds_and_what_is_left_is_told() -> None:
    found, made = find(lambda option: savings(option) + 5000 * (option[0].ssm_reuse_interval == 8), num_replays=2)
    assert len(made) == found.num_replays == 2
    assert found.num_promising > 0


def test_known_shapes_that_save_more_need_no_replay() -> None:
    known = {Shape(1, 16): 50_000, Shape(1, 32): 40_000}
    found, made = find(savings, known=known)
    assert (found.num_replays, made) == (0, [])


def test_the_runner_up_is_another_interval_or_admission_and_not_another_block() -> None:
    known = {Shape(1, 16): 50_000, Shape(2, 16): 40_000}
    _, made = find(savings, known=known)
    assert {shape.ssm_reuse_interval for shape, _ in made} == {2}
