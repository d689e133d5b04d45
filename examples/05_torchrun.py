"""Compress on several processes, each of which has its part of the data.

    torchrun --nproc_per_node 2 examples/05_torchrun.py
    python examples/05_torchrun.py

Both end with the same plan. The data are real scans of handwritten digits, 8x8 pixels, that come with scikit-learn.
"""

import os

import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import layer, neuron
from torch import distributed, nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import snncompress

T = 4  # timesteps: every image is fed as constant current for this long


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        layer.Conv2d(1, 16, 3), neuron.LIFNode(), layer.Conv2d(16, 16, 3), neuron.LIFNode(),
        layer.Flatten(), layer.Linear(256, 10),
    )  # fmt: skip


def main() -> None:
    if "RANK" in os.environ:  # torchrun says so
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    torch.set_num_threads(1)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    learned, held_out = Subset(data, range(1408)), Subset(data, range(1408, 1797))

    def loader(part: Subset, *, shuffle: bool) -> DataLoader:
        """Batches of 64 images on all processes together."""
        sampler = DistributedSampler(part, world, rank, shuffle=shuffle)
        return DataLoader(part, batch_size=64 // world, sampler=sampler)

    training, calibration, test = (
        loader(learned, shuffle=True),
        loader(learned, shuffle=False),
        loader(held_out, shuffle=False),
    )
    model = network()
    snncompress.finetune(model, training, epochs=8, lr=5e-3, timesteps=T)
    dense = snncompress.evaluate(model, test, timesteps=T)
    small = snncompress.apply(model, "svs", ratio=0.5, bits=4, data=calibration, timesteps=T, skip=[])
    after = snncompress.evaluate(small, test, timesteps=T)
    figures = snncompress.compare({"dense": model, "compressed": small}, test, timesteps=T)
    if rank == 0:
        print(figures)
        print(f"accuracy: {dense.accuracy:.3f}, and {after.accuracy:.3f} compressed, without any training after it")
        snncompress.save(small, "digits.safetensors")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
