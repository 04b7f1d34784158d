"""How the time of a run is shared among its cases, and who is too slow for it."""

import contextlib
import time

from bench.cases import Shapes, numel
from bench.providers import Provider
from bench.timing import MIN_ROUNDS

CASE_SHARE = 0.04  # a case gets no more of the time, unless its least number of rounds needs it
PEER_SHARE = 0.1  # of the time: what one peer may take of it in one case
COMPILE_SHARE = 0.25  # of the time may go into compiling peers
STEPS = MIN_ROUNDS + 5  # that a provider takes at least: the gate's, one to warm up, one counted
BESIDES = 3  # times as long as its steps a case takes: copies, the gate's truth, counting
LARGE = 2**16  # elements a tensor from which elements and not tensors decide the time


class Budget:
    """Shares the remaining time among the remaining cases and says what is too long.

    A provider's step is predicted from seconds an element and seconds a tensor, compiling it from
    seconds a tensor. All begin as a guess and are learned from the cases that ran.
    """

    def __init__(self, seconds: float, cases: int):
        self.deadline, self.cases = time.monotonic() + seconds, cases
        self.most, self.most_of_a_peer = CASE_SHARE * seconds, PEER_SHARE * seconds
        self.costs: dict[str, list[float]] = {}  # of each provider: an element's, a tensor's
        self.compile_most, self.compiled = COMPILE_SHARE * seconds, 0.0
        self.compile_per_tensor = 0.1

    def take(self) -> float:
        """Seconds for the next case."""
        share = self.remaining() / max(self.cases, 1)
        self.cases -= 1
        return min(max(share, 0.0), self.most)

    def remaining(self) -> float:
        """Seconds until the end of the budget."""
        return max(self.deadline - time.monotonic(), 0.0)

    def step(self, provider: Provider, shapes: Shapes) -> float:
        """Seconds that a step of `provider` will probably take."""
        an_element, a_tensor = self.costs.get(provider.name, (2e-9, 1e-5))
        return numel(shapes) * an_element + len(shapes) * a_tensor

    def learn(self, provider: Provider, shapes: Shapes, seconds: float) -> None:
        """Take note of how long a step of `provider` took."""
        costs = self.costs.setdefault(provider.name, [2e-9, 1e-5])
        if numel(shapes) >= LARGE * len(shapes):
            costs[0] = seconds / numel(shapes)
        else:
            costs[1] = seconds / len(shapes)

    def fitting(
        self, running: list[Provider], shapes: Shapes, dtypes: int
    ) -> tuple[list[Provider], str]:
        """Those that the remaining time suffices for, and why not all.

        The slowest peer is left out first, so that a late case is compared with the fast ones; none
        are left where the time does not suffice for ours.
        """
        running, why = list(running), ""
        while reason := self._too_long(running, shapes, dtypes):
            peers = [p for p in running if not p.is_ours]
            if not peers:
                return [], reason
            running.remove(max(peers, key=lambda peer: self.step(peer, shapes)))
            why = reason
        return running, why

    def _too_long(self, running: list[Provider], shapes: Shapes, dtypes: int) -> str:
        """Why a case does not fit, without the peers that are refused; or an empty string."""
        running = [p for p in running if not self.refuse(p, shapes, dtypes)]
        steps = sum(self.step(provider, shapes) for provider in running)
        least = BESIDES * STEPS * dtypes * steps
        return "" if least <= self.remaining() else self._reason(least, self.remaining())

    def refuse(self, provider: Provider, shapes: Shapes, dtypes: int) -> str:
        """Why a peer does not fit into a case, or an empty string."""
        if provider.is_ours:
            return ""
        if provider.compiles:
            need, left = len(shapes) * self.compile_per_tensor, self.compile_most - self.compiled
            if need > left:
                return self._reason(need, max(left, 0.0), " for compiling")
        need = STEPS * dtypes * self.step(provider, shapes)
        return "" if need <= self.most_of_a_peer else self._reason(need, self.most_of_a_peer)

    @staticmethod
    def _reason(need: float, left: float, what: str = "") -> str:
        return f"skipped: needs about {need:.3g} s{what}, of {left:.3g} s"

    @contextlib.contextmanager
    def compiling(self, provider: Provider, shapes: Shapes):
        """Take note of how long a provider took that compiles."""
        begin = time.monotonic()
        yield
        if provider.compiles:
            seconds = time.monotonic() - begin
            self.compiled += seconds
            # The same code again comes from a cache: that says nothing about others.
            self.compile_per_tensor = max(self.compile_per_tensor, seconds / len(shapes))
