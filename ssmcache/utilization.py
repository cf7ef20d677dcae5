"""The share of a pool that others may hold while one more sequence is let in, as the exact number that was written."""

from fractions import Fraction


class Utilization:
    """`max_util_for_resume`, asked both ways, by the resume gate and by the floors of pools: 0.7 is seven tenths here,
    not the float beside it, and slots are counted in whole numbers.
    """

    __slots__ = ("_denominator", "_numerator")

    def __init__(self, share: float) -> None:
        exact = Fraction(str(share))
        self._numerator, self._denominator = exact.numerator, exact.denominator

    def admits(self, num_held: int, num_slots: int) -> bool:
        """Whether one more is let in while others hold `num_held` of a pool of `num_slots`."""
        return num_held * self._denominator <= num_slots * self._numerator

    def least_slots(self, num_held: int) -> int:
        """The smallest pool for which `admits` is true."""
        return -(-num_held * self._denominator // self._numerator)
