"""Processes killed while they save: is there ever less than a whole file?

    python benchmarks/crash.py [--kills 300]

A process saves two networks in turn to one file, without end, and is killed (SIGKILL) after a random time. After each
kill the file must load, and hold one of the two networks to the last bit. POSIX.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch
from rich.progress import track
from torch import nn
from vgg16 import vgg16

import snncompress

WIDTHS = [16, 16, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128]


def network(bits: int) -> nn.Module:
    torch.manual_seed(bits)
    options = {"data": torch.rand(1, 3, 32, 32), "timesteps": 1, "repair": None, "progress": False}
    return snncompress.apply(vgg16(widths=WIDTHS), "magnitude", 0.3, bits, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300)
    kills = parser.parse_args().kills
    torch.set_num_threads(1)
    random.seed(0)
    networks = [network(4), network(8)]
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "network.safetensors"
        snncompress.save(networks[0], path)
        began = time.perf_counter()
        snncompress.save(networks[0], path)
        once = time.perf_counter() - began
        found, during = [0, 0], 0
        for _ in track(range(kills), description="kills"):
            if (child := os.fork()) == 0:
                while True:
                    for net in networks:
                        snncompress.save(net, path)
            time.sleep(random.uniform(0, 6 * once))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            left = [file for file in path.parent.iterdir() if file != path]
            during += bool(left)  # it died while it was writing
            for file in left:
                file.unlink()
            loaded = snncompress.load(path, into=vgg16(widths=WIDTHS))
            same = [torch.equal(loaded.conv2.weight, net.conv2.weight) for net in networks]
            found[same.index(True)] += 1
    print(
        f"{kills} kills, {during} of them while a file was being written (a save takes {1e3 * once:.0f} ms): every "
        f"time a whole file, {found[0]} × of the first network, {found[1]} × of the second."
    )


if __name__ == "__main__":
    main()
