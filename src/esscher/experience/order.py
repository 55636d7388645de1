"""The order in which rows are looked at: every row once an epoch, a function of (seed, epoch) alone."""

import numpy as np

from esscher.runtime.rng import Phase, numpy_generator


class Epochs:
    """Rows in an order that is drawn anew each epoch; there is nothing to save.

    Args:
        count: rows, >= 1.
        seed: of all orders.
    """

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._order = -1, np.zeros(0, dtype=np.int64)

    def row(self, place: int) -> int:
        """The row at a place, counted from 0 over all epochs."""
        epoch, position = divmod(place, self.count)
        if epoch != self._epoch:
            draw = numpy_generator(self.seed, epoch, Phase.ORDER)
            self._epoch, self._order = epoch, draw.permutation(self.count)
        return int(self._order[position])
