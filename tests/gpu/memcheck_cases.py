"""Every kind of kernel once or more, for compute-sanitizer: run by test_gpu_sanitizer.py, or by hand.

``PYTHONPATH=.:tests python tests/gpu/memcheck_cases.py [GROUP ...]``: all calls, or those of some groups; the names of
groups are those it prints. Every array is an allocation of its own, exactly as large as it is, so that an access beyond
it is beyond an allocation.
"""

import sys
import time
from collections import Counter

import numpy as np
from every_kernel import Place, all_kinds, calls, kind, launches
from gpu_support import cp, device, to_cupy, to_host


def main(wanted):
    cp.cuda.set_allocator(None)
    place = Place(
        move=lambda array: to_cupy(np.ascontiguousarray(array)),
        download=lambda array: np.ascontiguousarray(to_host(array)),
        device=device(),
    )
    chosen = [(group, call) for group, call in calls(place) if not wanted or group in wanted]
    counts, seconds = Counter(group for group, _ in chosen), Counter()
    with launches() as launched:
        for group, call in chosen:
            start = time.perf_counter()
            check = call()
            cp.cuda.runtime.deviceSynchronize()
            check()
            seconds[group] += time.perf_counter() - start
    for group, count in counts.items():
        print(f"{group}: {count} calls, {seconds[group]:.1f} s")
    kinds = Counter(kind(spec) for spec in launched)
    print(f"{len(launched)} launches: " + ", ".join(f"{name} ({count})" for name, count in sorted(kinds.items())))
    missing = set() if wanted else all_kinds(place.device) - set(kinds)
    assert not missing, f"kinds of kernels that were not launched: {sorted(missing)}"
    print(f"ran {len(chosen)} calls")


if __name__ == "__main__":
    main(sys.argv[1:])
