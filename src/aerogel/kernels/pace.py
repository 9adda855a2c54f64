"""Whether a plan's other threads still help: asked now and then, of real calls, for little.

What several threads gain was measured once. Since then another process may have taken a core, or
a virtual machine's cores may have been moved apart, and then waiting for a late thread makes them
slower than one thread alone. So a few calls in a row, every now and then, run the other way.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque

_BURST = 3  # calls in a row the other way; the first finds cold caches and sleeping threads
_REST = 32  # calls from one burst to the next, at least
_BURSTS = 3  # whose median decides: what befalls one of them decides nothing
_WORTH = 0.95  # of the time of the way in use, at most, is worth a change
_OVERHEAD = 0.005  # of all the time may go into bursts


class Pace:
    """Chooses between two ways to do the same, from the times of the calls themselves.

    Bursts cost about 0.5 % of all the time, counted as what they take beyond calls of the way in
    use, and the first one; while the other way is the faster one, they cost nothing. Calls may
    overlap in several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._other = False  # whether the second way is in use
        self._total = self._spent = 0.0
        self._burst = 0.0  # seconds that the next one may take
        self._rest = _REST
        self._untimed = 0  # calls since the last one that was timed
        self._left = 0  # calls of the burst that goes on
        self._usual: deque[float] = deque(maxlen=_BURST)
        self._trial: list[float] = []
        self._ratios: deque[float] = deque(maxlen=_BURSTS)

    @property
    def other(self) -> bool:
        """Whether the next call is to run the second way."""
        return self._other != (self._left > 0)

    def resting(self) -> bool:
        """Whether the next call, in the way in use, need not be timed; one of those left is over.

        The last ones before a burst are. Those between count as much as the next that is: with cold
        caches, a clock, a lock and two sums take 6 us.
        """
        if self._left or self._rest <= _BURST:
            return False
        self._rest -= 1  # calls that overlap may lose a count
        self._untimed += 1
        return True

    def took(self, other: bool, seconds: float) -> None:
        """Learn how long a call took.

        Args:
            other: Whether it ran the second way.
            seconds: By the wall clock.
        """
        with self._lock:
            self._total += seconds
            if not self._left:
                self._total += seconds * self._untimed
                self._untimed = 0
            if other != self.other:
                return  # overlapped with the call that changed the way
            if self._left:
                self._trial.append(seconds)
                self._left -= 1
                if not self._left:
                    self._judge()
                return
            self._usual.append(seconds)
            self._rest -= 1
            if self._rest > 0:
                return
            if self._affordable():
                self._left, self._trial = _BURST, []
            else:
                self._rest = _REST

    def _affordable(self) -> bool:
        """Whether another burst like the last would stay within what bursts may cost."""
        extra = max(0.0, self._burst - sum(self._usual))
        return self._spent + extra <= _OVERHEAD * self._total

    def _judge(self) -> None:
        usual, self._burst = sum(self._usual), sum(self._trial)
        # What a burst saves counts too: on a busy machine either may be the longer one by chance.
        self._spent = max(0.0, self._spent + self._burst - usual)
        self._ratios.append(min(self._trial[1:]) / max(min(self._usual), 1e-9))
        self._rest = _REST
        self._usual.clear()
        if len(self._ratios) == _BURSTS and statistics.median(self._ratios) < _WORTH:
            self._other = not self._other
            self._ratios.clear()
            self._burst = usual
