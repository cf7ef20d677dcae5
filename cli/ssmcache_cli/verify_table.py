"""What `verify`, and `replay --verify`, print."""

from collections.abc import Iterator

from ssmcache_sim.payload_check import PayloadCheck
from ssmcache_sim.sizes import format_size
from ssmcache_sim.verify import Verification


def payload_lines(payload: PayloadCheck) -> Iterator[str]:
    """What was checked, and what was wrong."""
    yield f"payload: {format_size(payload.checked_bytes)} reused, compared byte for byte"
    yield f"  {payload.wrong_bytes:,} wrong bytes, {payload.missing_pages:,} missing pages"
    if payload.first is not None:
        first = payload.first
        yield f"  first in request {first.request}: {first.num_bytes:,} bytes of {first.buffer}"


def verification_lines(verification: Verification) -> Iterator[str]:
    """The whole answer."""
    difference = verification.difference
    yield f"decisions: {verification.num_decisions:,} equal, {'none' if difference is None else 'then one'} different"
    if difference is not None:
        yield f"  line {difference.line_number:,}, {difference.request}"
        yield f"  simulated: {difference.simulated or 'end of the log'}"
        yield f"  real:      {difference.real or 'end of the log'}"
    yield from payload_lines(verification.payload)
    yield "passed" if verification.passed else "FAILED"
