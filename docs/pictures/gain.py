"""Draw docs/images/gain.png from what the README's SpikingJelly block gives.

python docs/pictures/gain.py
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parent.parent.parent
KEPT, GONE, DENSE = "#00695c", "#e0e0e0", "#9e9e9e"


def run_readme() -> dict[str, Any]:
    data, spikingjelly, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    names: dict[str, Any] = {}
    exec(data + spikingjelly, names)
    return names


def draw(names: dict[str, Any]) -> plt.Figure:
    snncompress, model, small = names["snncompress"], names["model"], names["small"]
    removed = snncompress.plan_of(small).removed_channels()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), width_ratios=(3, 2))

    layers = {"0": "conv 1", "4": "conv 2", "9": "linear 1"}
    for row, (name, label) in enumerate(layers.items()):
        width, gone = len(model.get_submodule(name).weight), set(removed.get(name, ()))
        for channel in range(width):
            left.add_patch(
                Rectangle((channel + 0.1, -row - 0.35), 0.8, 0.7, color=GONE if channel in gone else KEPT, lw=0)
            )
        left.text(-1, -row, label, ha="right", va="center")
        left.text(width + 1, -row, f"{width} → {width - len(gone)}", va="center")
    left.set(xlim=(-10, 76), ylim=(-2.7, 0.7), title="channels: kept, and removed")
    left.axis("off")

    bits = snncompress.profile(small, names["test"], timesteps=4)
    full = snncompress.profile(model, names["test"], timesteps=4)
    kinds = {
        "parameters": ("n_params", "{:,.0f}", 1),
        "size (kB)": ("size_mb", "{:.1f}", 1e-3),
        "spike additions": ("n_ac", "{:,.0f}", 1),
        "energy (nJ)": ("energy_pj", "{:.1f}", 1e3),
    }
    for row, (label, (field, form, unit)) in enumerate(kinds.items()):
        before, after = getattr(full, field), getattr(bits, field)
        right.barh(-row, 1, color=GONE, height=0.7)
        right.barh(-row, after / before, color=KEPT, height=0.7)
        text = f"{form.format(before / unit)} → {form.format(after / unit)}"
        right.text(0.98, -row, text, ha="right", va="center")
        right.text(-0.02, -row, label, ha="right", va="center")
    right.set(xlim=(0, 1), title="what is left")
    right.axis("off")

    figure.suptitle(
        f"Digits, SpikingJelly, half of the channels, 4 bits: accuracy {names['dense']:.1%},"
        f" straight after {names['straight']:.1%}, fine-tuned {names['tuned']:.1%}",
        fontsize=11,
    )
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    target = ROOT / "docs" / "images" / "gain.png"
    target.parent.mkdir(exist_ok=True)
    draw(run_readme()).savefig(target, dpi=120)
    print(target)
