"""One-to-one matching of boundary pixels; loads numba."""

import numpy as np
import numpy.typing as npt
from numba import njit

Mask = npt.NDArray[np.bool_]

NOWHERE = -2
"""Marks a drawn pixel from which no augmenting path goes."""


def match(found_HW: Mask, drawn_HW: Mask, *, reach_px: float) -> Mask:
    """The pixels of `found_HW` in a largest one-to-one matching with `drawn_HW`, no pair further apart than `reach_px`.

    Pairs are first taken nearest first, then lengthened by augmenting paths (Berge 1957) until none is left.
    """
    radius = int(reach_px)
    steps = [(dy * dy + dx * dx, dy, dx) for dy in range(-radius, radius + 1) for dx in range(-radius, radius + 1)]
    near = [step for step in sorted(steps) if step[0] <= reach_px**2]
    offset_K2 = np.array([step[1:] for step in near], np.int64)
    place_N2 = np.argwhere(found_HW)
    number_HW = np.full(drawn_HW.shape, -1, np.int64)
    number_HW[drawn_HW] = np.arange(int(drawn_HW.sum()))
    partner_N = _match(place_N2, np.pad(number_HW, radius, constant_values=-1), offset_K2, radius)
    matched_HW = np.zeros_like(found_HW)
    matched_HW[found_HW] = partner_N >= 0
    return matched_HW


@njit(cache=True)
def _match(place_N2, number_HW, offset_K2, radius):  # type: ignore[no-untyped-def]
    """The drawn pixel matched with each found one, -1 without one."""
    num_found = len(place_N2)
    partner_N = np.full(num_found, -1, np.int64)
    owner_M = np.full(number_HW.max() + 1, -1, np.int64)
    for k in range(len(offset_K2)):
        dy, dx = offset_K2[k, 0] + radius, offset_K2[k, 1] + radius
        for i in range(num_found):
            if partner_N[i] < 0:
                j = number_HW[place_N2[i, 0] + dy, place_N2[i, 1] + dx]
                if j >= 0 and owner_M[j] < 0:
                    partner_N[i], owner_M[j] = j, i
    _augment(place_N2, number_HW, offset_K2, radius, partner_N, owner_M)
    return partner_N


@njit(cache=True)
def _augment(place_N2, number_HW, offset_K2, radius, partner_N, owner_M):  # type: ignore[no-untyped-def]  # noqa: PLR0917
    """Lengthens a matching by augmenting paths, found breadth first, until there is none.

    What a search without success has seen leads nowhere later either, so each pixel is searched in vain once.
    """
    num_found = len(place_N2)
    seen_M = np.full(len(owner_M), -1, np.int64)
    before_M = np.empty(len(owner_M), np.int64)
    queue = np.empty(num_found, np.int64)
    for root in range(num_found):
        if partner_N[root] >= 0:
            continue
        queue[0], head, tail, end = root, 0, 1, -1
        while head < tail and end < 0:
            i = queue[head]
            head += 1
            for k in range(len(offset_K2)):
                j = number_HW[place_N2[i, 0] + offset_K2[k, 0] + radius, place_N2[i, 1] + offset_K2[k, 1] + radius]
                if j < 0 or seen_M[j] == root or seen_M[j] == NOWHERE:
                    continue
                seen_M[j], before_M[j] = root, i
                if owner_M[j] < 0:
                    end = j
                    break
                queue[tail] = owner_M[j]
                tail += 1
        for at in range(tail if end < 0 else 0):
            if partner_N[queue[at]] >= 0:
                seen_M[partner_N[queue[at]]] = NOWHERE
        while end >= 0:  # hands each drawn pixel on the path to the found pixel before it
            i = before_M[end]
            following = partner_N[i]
            partner_N[i], owner_M[end] = end, i
            end = following
