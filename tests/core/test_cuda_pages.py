"""GPU pools in virtual memory, on pages that a dict plays: what is mapped where, also when there is too little."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from ssmcache.memory.cuda_vmm import CudaDriverError, NoMemoryError, PagedPools, results_of

PAGE = 1 << 21
MAX_PAGES = 12


class FakePages:
    """So many pages in all; calls fail as told. Refuses what the CUDA driver does."""

    page_bytes = PAGE

    def __init__(self, num_pages: int) -> None:
        self.num_free = num_pages
        self.mapped: dict[int, int] = {}  # address -> page
        self.allowed: set[int] = set()
        self.reserved: dict[int, int] = {}
        self.pages: set[int] = set()
        self.contents: dict[int, str] = {}
        self.fail: Iterator[bool] = iter(())
        self.num_created = 0

    def _step(self) -> None:
        if next(self.fail, False):
            raise NoMemoryError

    def reserve(self, num_bytes: int) -> int:
        address = 1 << 40 | len(self.reserved) << 32
        self.reserved[address] = num_bytes
        return address

    def give_back(self, address: int, num_bytes: int) -> None:
        assert self.reserved.pop(address) == num_bytes
        assert not [a for a in self.mapped if address <= a < address + num_bytes]

    def create(self) -> int:
        if not self.num_free:
            raise NoMemoryError
        self.num_free -= 1
        self.num_created += 1
        self.pages.add(self.num_created)
        return self.num_created

    def release(self, page: int) -> None:
        assert page not in self.mapped.values()
        self.pages.remove(page)
        self.num_free += 1

    def map(self, address: int, page: int) -> None:
        self._step()
        assert any(start <= address < start + size for start, size in self.reserved.items())
        assert address not in self.mapped
        assert page in self.pages
        assert page not in self.mapped.values()
        self.mapped[address] = page

    def allow(self, address: int, num_bytes: int) -> None:
        self._step()
        addresses = range(address, address + num_bytes, PAGE)
        assert all(a in self.mapped for a in addresses)
        self.allowed |= set(addresses)

    def unmap(self, address: int) -> None:
        del self.mapped[address]
        self.allowed.discard(address)

    def usable(self) -> dict[int, int]:
        assert self.allowed == set(self.mapped)
        assert set(self.mapped.values()) == self.pages, "a page is kept and not used"
        return dict(self.mapped)


def sizes(*num_pages: int) -> list[int]:
    return [count * PAGE for count in num_pages]


def test_a_pool_that_grows_keeps_its_addresses_and_its_pages() -> None:
    pages = FakePages(20)
    pools = PagedPools(pages, 2, MAX_PAGES * PAGE)
    assert pools.resize(sizes(3, 1))
    before, addresses = pages.usable(), list(pools.addresses)
    assert pools.resize(sizes(7, 2))
    after = pages.usable()
    assert pools.addresses == addresses
    assert {address: after[address] for address in before} == before
    assert sorted(after) == [addresses[0] + i * PAGE for i in range(7)] + [addresses[1] + i * PAGE for i in range(2)]


def test_pools_are_rounded_up_to_whole_pages() -> None:
    pools = PagedPools(FakePages(20), 2, MAX_PAGES * PAGE)
    assert pools.resize([1, PAGE + 1])
    assert pools.num_bytes == 3 * PAGE


def test_pages_move_from_a_pool_that_shrinks_to_one_that_grows_with_none_to_spare() -> None:
    pages = FakePages(10)
    pools = PagedPools(pages, 2, MAX_PAGES * PAGE)
    assert pools.resize(sizes(8, 2))
    assert pools.resize(sizes(3, 7))
    assert len(pages.usable()) == 10
    assert pages.num_created == 10


def test_what_no_pool_needs_goes_back_to_the_device() -> None:
    pages = FakePages(10)
    pools = PagedPools(pages, 2, MAX_PAGES * PAGE)
    assert pools.resize(sizes(8, 2))
    assert pools.resize(sizes(2, 1))
    assert pages.num_free == 7
    assert len(pages.usable()) == 3


@pytest.mark.parametrize("wanted", [(8, 3), (0, 11), (MAX_PAGES + 1, 0), (1 << 60, 1)])
def test_too_few_pages_are_a_refusal_that_changes_nothing(wanted: tuple[int, int]) -> None:
    pages = FakePages(10)
    pools = PagedPools(pages, 2, MAX_PAGES * PAGE)
    assert pools.resize(sizes(6, 2))
    before = pages.usable()
    assert pools.resize(sizes(*wanted)) is False
    assert pages.usable() == before
    assert (pages.num_free, pools.num_bytes) == (2, 8 * PAGE)


@pytest.mark.parametrize("step", range(10))
def test_running_out_while_mapping_is_a_refusal_that_changes_nothing(step: int) -> None:
    pages = FakePages(20)
    pools = PagedPools(pages, 3, MAX_PAGES * PAGE)
    assert pools.resize(sizes(6, 2, 1))
    before = pages.usable()
    pages.fail = iter([False] * step + [True])
    # 7 pages are mapped in 2 pools: 9 steps
    fits = pools.resize(sizes(2, 6, 4))
    assert fits == (step == 9)
    if not fits:
        assert pages.usable() == before
        assert pages.num_free == 11


def test_random_sizes_always_leave_each_pool_its_first_pages() -> None:
    rng = random.Random(1)
    pages = FakePages(20)
    pools = PagedPools(pages, 3, MAX_PAGES * PAGE)
    model: list[list[int]] = [[], [], []]
    refused = 0
    for _ in range(500):
        wanted = [rng.randint(0, MAX_PAGES) for _ in model]
        pages.fail = iter([False] * rng.randint(0, 40) + [True])
        before = [list(pool) for pool in model]
        fits = pools.resize(sizes(*wanted))
        pages.fail = iter(())
        refused += not fits
        if sum(wanted) > 20:
            assert not fits
        usable = pages.usable()
        counts = wanted if fits else [len(pool) for pool in before]
        model = [
            [usable.pop(address + index * PAGE) for index in range(count)]
            for address, count in zip(pools.addresses, counts, strict=True)
        ]
        assert not usable
        for old, new in zip(before, model, strict=True):
            kept = min(len(old), len(new))
            assert new[:kept] == old[:kept]
    assert 50 < refused < 450
    pools.close()
    pools.close()
    assert (pages.num_free, pages.reserved, pools.num_bytes) == (20, {}, 0)


def test_a_change_that_cannot_be_undone_is_an_error_of_its_own() -> None:
    pages = FakePages(20)
    pools = PagedPools(pages, 2, MAX_PAGES * PAGE)
    assert pools.resize(sizes(6, 2))
    pages.fail = iter([False, True, True])
    with pytest.raises(CudaDriverError, match="cannot be undone"):
        pools.resize(sizes(2, 6))


def test_a_failed_reservation_gives_the_others_back() -> None:
    class FewAddresses(FakePages):
        def reserve(self, num_bytes: int) -> int:
            if len(self.reserved) == 2:
                raise NoMemoryError
            return super().reserve(num_bytes)

    pages = FewAddresses(10)
    with pytest.raises(NoMemoryError):
        PagedPools(pages, 3, PAGE)
    assert pages.reserved == {}


class Status(int):
    name = "CUDA_ERROR_X"


@pytest.mark.parametrize(("returned", "value"), [((0,), ()), ((0, 5), 5), ((0, 5, 6), (5, 6))])
def test_results_are_what_comes_after_the_status(returned: tuple[Any, ...], value: Any) -> None:
    assert results_of("call", (Status(returned[0]), *returned[1:])) == value


def test_out_of_memory_is_told_from_other_errors() -> None:
    with pytest.raises(NoMemoryError, match="cuMemCreate: CUDA is out of memory"):
        results_of("cuMemCreate", (Status(2), None))
    with pytest.raises(CudaDriverError, match="cuMemMap: CUDA error CUDA_ERROR_X"):
        results_of("cuMemMap", (Status(1),))
