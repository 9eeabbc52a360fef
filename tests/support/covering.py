"""Products of parameters, of which a part covers what one test per run is enough for; the rest is `slow`."""

from collections import Counter
from collections.abc import Iterable
from itertools import combinations, product
from typing import Any

import pytest

Met = frozenset[tuple[int, Any]]


def covering(*axes: Iterable[Any], together: int) -> list[Any]:
    """The product of the axes for `parametrize`. In what is not `slow`, any `together` values of different axes meet."""

    def met(values: tuple) -> set[Met]:
        return {frozenset(some) for some in combinations(enumerate(values), together)}

    everything = list(product(*map(tuple, axes)))
    missing = set().union(*map(met, everything))
    chosen, taken = set(), Counter()
    while missing:
        best = max(
            everything, key=lambda values: (len(met(values) & missing), -sum(taken[one] for one in enumerate(values)))
        )
        chosen.add(best)
        taken.update(enumerate(best))
        missing -= met(best)
    return [pytest.param(*values, marks=() if values in chosen else pytest.mark.slow) for values in everything]
