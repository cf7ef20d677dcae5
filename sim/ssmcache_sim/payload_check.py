"""What became of the payload of a replay on real memory."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WrongBytes:
    """The first bytes that were not what had been written there."""

    request: int
    buffer: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class PayloadCheck:
    """What became of the payload of a replay.

    Attributes:
        checked_bytes: bytes of reused pages and states that were compared.
        missing_pages: pages that a reused prefix needs and that were not on the GPU.
        first: None: all were right.
    """

    checked_bytes: int
    wrong_bytes: int
    missing_pages: int
    first: WrongBytes | None

    @property
    def passed(self) -> bool:
        """Whether every byte and page was right."""
        return not self.wrong_bytes and not self.missing_pages
