"""How much longer `import snncompress` takes than the `import torch` in it.

Fresh processes, alternating, so that a busy moment hits both; the medians are compared. Exits with 1 where the ratio
isn't below the limit::

    python benchmarks/import_time.py --runs 11
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

LIMIT = 1.5
TIMED = "import time; start = time.perf_counter(); import {}; print(time.perf_counter() - start)"


def seconds(module: str) -> float:
    command = [sys.executable, "-c", TIMED.format(module)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description="Import time of snncompress against torch alone.")
    parser.add_argument("--runs", type=int, default=7, help="processes per module (default: 7)")
    runs = parser.parse_args().runs

    times: dict[str, list[float]] = {"torch": [], "snncompress": []}
    for module in times:
        seconds(module)  # fills the disk cache
    for _ in range(runs):
        for module, measured in times.items():
            measured.append(seconds(module))

    for module, measured in times.items():
        spread = f"{min(measured):.3f} … {max(measured):.3f}"
        print(f"import {module:<12} {statistics.median(measured):.3f} s  ({spread}, {runs} runs)")
    ratio = statistics.median(times["snncompress"]) / statistics.median(times["torch"])
    print(f"ratio {ratio:.2f}, limit {LIMIT}")
    return 0 if ratio < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
