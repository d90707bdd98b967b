"""The random numbers of a CUDA device, computed on the CPU: the reference for what seeds mean.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). Element i of a small tensor is
drawn by thread i, whose position is the third word of the counter; each call of PyTorch takes one step of the first.
"""

import math

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(seed: int, step: int, threads: np.ndarray) -> np.ndarray:
    """Return the four 32-bit words of each thread at `step`: [n] to [n, 4]."""
    zeros = np.zeros(len(threads), np.uint64)
    c0, c1, c2, c3 = zeros + np.uint64(step), zeros, threads.astype(np.uint64), zeros
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        one, two = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (two >> _HALF) ^ c1 ^ k0, two & _LOW, (one >> _HALF) ^ c3 ^ k1, one & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1)


def noise_of_seed(seed: int, num: int) -> np.ndarray:
    """Return the first `num` (at most the threads of the card) standard normal numbers of `seed`: Box and Muller."""
    words = philox(seed, 0, np.arange(num)).astype(np.float32)
    uniform = words[:, 0] * np.float32(2**-32) + np.float32(2**-33)
    angle = words[:, 1] * np.float32(2 * math.pi * 2**-32) + np.float32(math.pi * 2**-32)
    result: np.ndarray = np.sqrt(-2 * np.log(uniform)) * np.sin(angle)
    return result


def class_of_seed(seed: int, num_classes: int) -> int:
    """Return the class that is drawn after the noise of `seed`."""
    return int(philox(seed, 1, np.arange(1))[0, 0]) % num_classes
