"""GPU pools in CUDA virtual memory: each has its addresses for good, and pages are mapped behind them as it grows."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class NoMemoryError(Exception):
    """The device, or the system, has no memory left for a page."""


class CudaDriverError(RuntimeError):
    """A call of the CUDA driver failed, and not for lack of memory."""


@cache
def cuda_driver() -> Any:
    """The driver API of cuda-bindings, or None if that is not installed."""
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    return driver


def results_of(call: str, returned: tuple[Any, ...]) -> Any:
    """What a call of the driver returned beside its status: nothing, one value, or a tuple.

    Errors: NoMemoryError, CudaDriverError.
    """
    status, *values = returned
    if int(status) == _OUT_OF_MEMORY:
        raise NoMemoryError(f"{call}: CUDA is out of memory")
    if int(status) != 0:
        raise CudaDriverError(f"{call}: CUDA error {getattr(status, 'name', status)}")
    return values[0] if len(values) == 1 else tuple(values)


class Pages(Protocol):
    """Physical pages of one device, and addresses to see them at."""

    page_bytes: int

    def reserve(self, num_bytes: int) -> int:
        """Addresses for whole pages. Errors: NoMemoryError."""

    def give_back(self, address: int, num_bytes: int) -> None:
        """Give reserved addresses back; nothing is mapped there any more."""

    def create(self) -> Any:
        """A page. Errors: NoMemoryError."""

    def release(self, page: Any) -> None:
        """Give a page back that is mapped nowhere."""

    def map(self, address: int, page: Any) -> None:
        """Errors: NoMemoryError."""

    def allow(self, address: int, num_bytes: int) -> None:
        """Let the device read and write mapped pages. Errors: NoMemoryError."""

    def unmap(self, address: int) -> None:
        """The page at an address; nothing may be using it."""


class DevicePages:
    """The pages of a CUDA device, of 2 MiB on all of today's.

    Args:
        driver: `cuda_driver()`.
        device: its index; it must have a context.

    Errors: CudaDriverError if the device has no virtual memory.
    """

    def __init__(self, driver: Any, device: int) -> None:
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not results_of("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(attribute, device)):
            raise CudaDriverError(f"CUDA device {device} has no virtual memory management")
        self._driver = driver
        self._kind = driver.CUmemAllocationProp()
        self._kind.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._kind.location.id = device
        self._access = driver.CUmemAccessDesc()
        self._access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._access.location.id = device
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = driver.cuMemGetAllocationGranularity(self._kind, least)
        self.page_bytes = int(results_of("cuMemGetAllocationGranularity", granularity))

    def reserve(self, num_bytes: int) -> int:
        return int(results_of("cuMemAddressReserve", self._driver.cuMemAddressReserve(num_bytes, 0, 0, 0)))

    def give_back(self, address: int, num_bytes: int) -> None:
        results_of("cuMemAddressFree", self._driver.cuMemAddressFree(address, num_bytes))

    def create(self) -> Any:
        return results_of("cuMemCreate", self._driver.cuMemCreate(self.page_bytes, self._kind, 0))

    def release(self, page: Any) -> None:
        results_of("cuMemRelease", self._driver.cuMemRelease(page))

    def map(self, address: int, page: Any) -> None:
        results_of("cuMemMap", self._driver.cuMemMap(address, self.page_bytes, 0, page, 0))

    def allow(self, address: int, num_bytes: int) -> None:
        results_of("cuMemSetAccess", self._driver.cuMemSetAccess(address, num_bytes, [self._access], 1))

    def unmap(self, address: int) -> None:
        results_of("cuMemUnmap", self._driver.cuMemUnmap(address, self.page_bytes))


class PagedPools:
    """Pools of bytes at fixed addresses. A pool grows and shrinks at its end, and the pages that one gives up go to
    those that grow; whatever is in pages that stay is not touched.

    Args:
        pages: where they come from.
        num_pools: how many.
        max_bytes: of one pool; addresses for so much are reserved, which costs no memory.

    Errors: NoMemoryError if there are not enough addresses.
    """

    def __init__(self, pages: Pages, num_pools: int, max_bytes: int) -> None:
        self._source = pages
        self._max_pages = -(-max_bytes // pages.page_bytes)
        self._mapped: list[list[Any]] = []
        self.addresses: list[int] = []
        try:
            for _ in range(num_pools):
                self.addresses.append(pages.reserve(self._max_pages * pages.page_bytes))
                self._mapped.append([])
        except BaseException:
            self.close()
            raise

    @property
    def num_bytes(self) -> int:
        """Of all pages that are mapped."""
        return sum(map(len, self._mapped)) * self._source.page_bytes

    def resize(self, sizes: Sequence[int]) -> bool:
        """Pools of at least so many bytes, in whole pages. False, and nothing has changed, if there is not enough.

        Nothing may be using the pages that go. Cost: about 50 microseconds a page that is mapped.
        Errors: CudaDriverError.
        """
        wanted = [-(-size // self._source.page_bytes) for size in sizes]
        if max(wanted, default=0) > self._max_pages:
            return False
        before = [list(mapped) for mapped in self._mapped]
        spare: list[Any] = []
        try:
            # all that is missing first: until then nothing has to be undone
            while len(spare) < sum(wanted) - sum(map(len, before)):
                spare.append(self._source.create())
            created = list(spare)
            try:
                for pool, count in enumerate(wanted):
                    spare += self._cut(pool, count)
                for pool, count in enumerate(wanted):
                    self._extend(pool, [spare.pop() for _ in range(count - len(self._mapped[pool]))])
            except NoMemoryError:
                self._restore(before)
                spare = created
                raise
        except NoMemoryError:
            return False
        finally:
            for page in spare:
                self._source.release(page)
        return True

    def close(self) -> None:
        """Give all back. Nothing may be using it. Safe to call twice."""
        for pool, address in enumerate(self.addresses[: len(self._mapped)]):
            for page in self._cut(pool, 0):
                self._source.release(page)
            self._source.give_back(address, self._max_pages * self._source.page_bytes)
        self.addresses, self._mapped = [], []

    def _address(self, pool: int, page: int) -> int:
        return self.addresses[pool] + page * self._source.page_bytes

    def _cut(self, pool: int, count: int) -> list[Any]:
        """Leave so many pages at most; returns the others."""
        mapped, cut = self._mapped[pool], []
        while len(mapped) > count:
            self._source.unmap(self._address(pool, len(mapped) - 1))
            cut.append(mapped.pop())
        return cut

    def _extend(self, pool: int, pages: Sequence[Any]) -> None:
        mapped, start = self._mapped[pool], len(self._mapped[pool])
        for page in pages:
            self._source.map(self._address(pool, len(mapped)), page)
            mapped.append(page)
        if pages:
            self._source.allow(self._address(pool, start), len(pages) * self._source.page_bytes)

    def _restore(self, before: Sequence[Sequence[Any]]) -> None:
        try:
            for pool, pages in enumerate(before):
                self._cut(pool, len(pages))
            for pool, pages in enumerate(before):
                self._extend(pool, pages[len(self._mapped[pool]) :])
        except NoMemoryError as error:
            raise CudaDriverError(f"a change of sizes failed and cannot be undone, pages are lost: {error}") from error
