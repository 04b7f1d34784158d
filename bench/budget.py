"""How the time of a run is shared among its cases."""

import time

CASE_SHARE = 0.04  # a case gets no more of the time, unless its least number of rounds needs it
LARGE = 2**16  # elements a tensor from which elements and not tensors decide the time


class Budget:
    """Shares the remaining time among the remaining cases and says which case is too long.

    The least time of a case (set-up, gate, the least number of rounds) is predicted from seconds an
    element and seconds a tensor. Both begin as a guess and are learned from the cases that ran.
    """

    def __init__(self, seconds: float, cases: int):
        self.deadline, self.cases = time.monotonic() + seconds, cases
        self.most = CASE_SHARE * seconds
        self.per_element, self.per_tensor = 2e-7, 1e-3

    def take(self) -> float:
        """Seconds for the next case."""
        share = self.remaining() / max(self.cases, 1)
        self.cases -= 1
        return min(max(share, 0.0), self.most)

    def remaining(self) -> float:
        """Seconds until the end of the budget."""
        return self.deadline - time.monotonic()

    def too_long(self, elements: int, tensors: int) -> str:
        """Why a case of this size does not fit, or an empty string."""
        least, left = elements * self.per_element + tensors * self.per_tensor, self.remaining()
        return (
            "" if least <= left else f"skipped: needs about {least:.0f} s of {max(left, 0):.0f} s"
        )

    def learn(self, elements: int, tensors: int, seconds: float) -> None:
        """Take note of the time that a case needed until its least number of rounds was done."""
        if elements >= LARGE * tensors:
            self.per_element = seconds / elements
        else:
            self.per_tensor = seconds / tensors
