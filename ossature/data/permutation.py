"""A shuffled order of any length that takes no memory: a keyed bijection of 0 .. size - 1.

A Feistel network over the smallest even number of bits that holds `size`, walked until it lands
inside; so the 10th row of the 3rd epoch of a corpus of any size is known in microseconds.

Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), sections 3-4; the
round function is the finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np

ROUNDS = 6
_MASK = 2**64 - 1


class Permutation:
    """The order of `size` things under the key of several integers: `order[i]` for each i."""

    def __init__(self, size: int, *key: int) -> None:
        assert size >= 1
        self.size = size
        self.half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
        self.round_keys = struct.unpack(f"<{ROUNDS}Q", digest)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.size:
            raise IndexError(index)
        # The network permutes up to 4 * size numbers; following its cycle from a number inside
        # leads back inside, and does so one to one.
        while True:
            index = self._network(index)
            if index < self.size:
                return index

    def _network(self, number: int) -> int:
        low_mask = (1 << self.half_bits) - 1
        left, right = number >> self.half_bits, number & low_mask
        for key in self.round_keys:
            left, right = right, left ^ (_mix(right ^ key) & low_mask)
        return left << self.half_bits | right


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def random_keys(start: int, stop: int, seed: int) -> np.ndarray:
    """A 64-bit number for each of start .. stop - 1, which looks random and is the same everywhere.

    To sort by these keys is to shuffle; the numbers of one seed never coincide.
    """
    numbers = np.arange(start, stop, dtype=np.uint64)
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=16).digest()
    for key in struct.unpack("<2Q", digest):
        # The finaliser again, one to one, on 64 bits with the wrap-around of uint64.
        numbers = (numbers ^ np.uint64(key)) + np.uint64(0x9E3779B97F4A7C15)
        numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        numbers ^= numbers >> np.uint64(31)
    return numbers
