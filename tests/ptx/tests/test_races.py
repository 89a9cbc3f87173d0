"""Who is ordered after whom, apart from any kernel."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx.races import Clock, Shadow

pytestmark = pytest.mark.exhaustive

THREADS, BLOCKS, GRANULES = 96, 2, 12
MASKS = np.array([2**32 - 1, 0xFF, 0xFFFF0000], np.uint32)


@pytest.mark.parametrize("seed", range(20))
def test_shortcuts_for_shared_memory_change_no_verdict(seed):
    """Random accesses and barriers of two blocks of three warps, their shared memory apart."""
    rng = np.random.default_rng(seed)
    number = np.arange(THREADS * BLOCKS, dtype=np.int32)
    clock = Clock(number, THREADS, 0, BLOCKS)
    quick, plain = Shadow(BLOCKS * GRANULES, of_block=True), Shadow(BLOCKS * GRANULES)
    ordered = raced = 0
    leaves = rng.integers(600, size=len(number))  # when a thread exits, if it does
    for step in range(300):
        action = rng.choice(
            ["read", "write", "atomic", "warps", "block"], p=[0.3, 0.2, 0.1, 0.3, 0.1]
        )
        if action == "block":
            clock.epoch[rng.integers(BLOCKS)] += 1
            continue
        if action == "warps":
            mask = rng.choice(MASKS)
            come = (
                (rng.random(6) < 0.7)[number // 32]
                & (leaves > step)
                & (mask >> number.astype("u4") % 32 & 1 != 0)
            )
            clock.pass_warp_barrier(np.flatnonzero(come), np.full(1, mask))
            continue
        lanes = np.sort(rng.choice(np.flatnonzero(leaves > step), rng.integers(1, 8), False))
        at = lanes // THREADS * GRANULES + rng.integers(0, GRANULES, len(lanes))
        now = clock.now(lanes)
        verdicts = []
        for shadow in (quick, plain):
            if action == "read":
                verdicts.append([shadow.read(at, now)])
            else:
                verdicts.append(shadow.write(at, now, atomic=action == "atomic"))
        for one, other in zip(*verdicts, strict=True):
            np.testing.assert_array_equal(one, other)
        ordered += verdicts[0][0] is None
        raced += verdicts[0][0] is not None
    assert ordered > 20
    assert raced > 20
