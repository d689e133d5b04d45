"""The built-in trainer for fine-tuning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from snncompress.base.distributed import gathered, together
from snncompress.base.progress import Progress, tracked
from snncompress.contract.detection import find_adapter
from snncompress.errors import OptionError
from snncompress.interfaces import Adapter, Forward, Loss
from snncompress.measuring.evaluation import accuracy, classified
from snncompress.model.chance import held, undisturbed
from snncompress.model.computed_once import evaluating
from snncompress.model.copying import private_copy, refuse_broken, refuse_wrapped
from snncompress.model.modules import in_mode
from snncompress.model.own_neurons import Neurons, named_neurons
from snncompress.running.data import Feed
from snncompress.running.precision import rounding_as_outside
from snncompress.running.rehearsal import rehearse

from .distillation import Distillation
from .epochs import Best, Epoch, Tally
from .objective import Objective
from .parallel import Parallel
from .recipe import MakeOptimizer, MakeScheduler, OnEpoch, Recipe
from .refresh import average_statistics


def finetune(
    model: nn.Module,
    data: Any,
    *,
    epochs: int = 1,
    lr: float | None = None,
    weight_decay: float | None = None,
    optimizer: torch.optim.Optimizer | type[torch.optim.Optimizer] | MakeOptimizer | None = None,
    scheduler: MakeScheduler | None = None,
    clip: float | None = None,
    amp: bool = False,
    teacher: nn.Module | Distillation | None = None,
    rate_penalty: float = 0.0,
    validation: Any = None,
    on_epoch: OnEpoch | None = None,
    timesteps: int | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    adapter: Adapter | str | None = None,
    neurons: Neurons | None = None,
    time_dim: int | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Train a network, spiking or not, in place: Adam, a cosine schedule, cross-entropy on the time-averaged output.

    Removed channels and weights are gone, so nothing can bring them back; quantized weights are trained through the
    straight-through estimator. Batch order comes from torch's global generator: call ``torch.manual_seed`` for a
    repeatable run. The train/eval flags are as before afterwards.

    Where ``torch.distributed`` is initialized, all processes train together, in DistributedDataParallel, each on the
    data that it is handed (a DistributedSampler's, or others): they begin with the weights of rank 0 and end with the
    same; statistics of batch norms are averaged after every epoch, and figures are those of all data.

    Args:
        model: the network.
        data: (x, y) batches, or whatever else ``apply`` takes.
        epochs: how many times the data are gone through.
        lr: learning rate, 1e-3 where nothing else is said.
        weight_decay: L2 penalty of the optimizer, by default what is its own default.
        optimizer: in the place of Adam one of torch's optimizer classes, which gets ``lr`` and ``weight_decay``;
            ``callable(parameters)``; or an optimizer of this model's parameters.
        scheduler: in the place of a cosine down to 0, ``callable(optimizer)`` that returns one of torch's learning rate
            schedulers. It is stepped after every epoch, OneCycleLR and CyclicLR after every batch; ReduceLROnPlateau
            is told the loss, or with mode="max" the accuracy, on ``validation`` if there is one. The learning rate of
            an optimizer that you hold is left alone without it.
        clip: gradients are scaled down to this norm, of all parameters together, where it is larger.
        amp: mixed precision: float16 with a gradient scaler on CUDA, elsewhere bfloat16.
        teacher: a network, such as the one that this was made from, whose class scores are learned beside the labels;
            :class:`Distillation` says how much they count, at which temperature, and has firing rates matched too.
        rate_penalty: λ ≥ 0: λ times the mean firing rate (spikes per neuron and timestep) is added to the loss, so that
            fewer spikes are left to pay for. Rates are about 0.1, so λ is about 1.
        validation: labelled data. The accuracy on them is measured after every epoch, and the network ends as it was
            after the best of them, the first one among equals. Training itself goes as it would without.
        on_epoch: called after every epoch with a list of all epochs so far (:class:`Epoch`: loss, accuracy, learning
            rate …); training stops where it returns True, of several processes in one. A logger hooks in here.
        timesteps: as for ``apply``.
        forward: as for ``apply``.
        loss: ``loss(output, y)`` takes the place of cross-entropy, as torch's and snnTorch's losses do.
        adapter: as for ``apply``.
        neurons: as for ``apply``.
        time_dim: as for ``apply``.
        progress: as for ``apply``; the text holds the loss and the accuracy so far.

    Returns:
        The model.

    Raises:
        DataError: no labels, or an output that isn't one of class scores.
        OptionError: an option that can't be, or doesn't fit the model.

    Source: the penalty is the spike regularization of Pellegrini, Zimmer and Masquelier, "Low-activity supervised
    convolutional spiking neural networks applied to speech commands recognition", SLT 2021, with the L1 norm.

    Example:
        >>> from spikingjelly.activation_based import neuron
        >>> model = nn.Sequential(nn.Linear(4, 8), neuron.LIFNode(), nn.Linear(8, 2))
        >>> x, y = torch.rand(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
        >>> finetune(model, (x, y), epochs=2, timesteps=4) is model
        True

        As one trains otherwise; with TensorBoard, ``writer.add_scalar("loss", epochs[-1].loss, len(epochs))``:

        >>> _ = finetune(
        ...     model, (x, y), epochs=9, timesteps=4, optimizer=torch.optim.SGD, lr=0.1, clip=1.0, validation=(x, y),
        ...     scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
        ...     on_epoch=lambda epochs: print([round(epoch.learning_rate, 3) for epoch in epochs]) or len(epochs) == 3,
        ... )
        [0.1]
        [0.1, 0.1]
        [0.1, 0.1, 0.01]
    """
    recipe = Recipe(epochs, lr, weight_decay, optimizer, scheduler, clip, amp, teacher, rate_penalty, on_epoch)
    refuse_wrapped(model)
    with together():
        found = find_adapter(model, named_neurons(adapter, neurons, time_dim), plain=True)
        refuse_broken(model, found)
        feed = Feed(found, data, timesteps, forward, loss, on=model)
        tested = None if validation is None else Feed(found, validation, timesteps, forward, on=model)
    with held(feed.generators()):
        rehearse(private_copy(model, found), feed, stacklevel=3)
    if tested is not None:
        tested.batch_first, tested.few, tested.samples_on = feed.batch_first, feed.few, feed.samples_on
        with undisturbed(model), held(tested.generators()):
            _score(private_copy(model, found), tested)
    train(model, feed, recipe, progress, validation=tested)
    return model


def _score(model: nn.Module, feed: Feed) -> None:
    """Raise DataError where the first batch can't be evaluated, before training takes its time."""
    with evaluating(model):
        batch = feed.first()
        feed.check(model, batch)
        classified(feed(model, batch), batch.y, batch_first=feed.batch_first)


def train(
    model: nn.Module,
    feed: Feed,
    recipe: Recipe,
    progress: Progress | None = None,
    what: str = "",
    validation: Feed | None = None,
) -> None:
    """The loop behind :func:`finetune`; ``what`` begins the progress text."""
    if recipe.epochs == 0:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError("Nothing to train: no parameter of this model requires a gradient.")
    optimizer = recipe.make_optimizer(parameters)
    precision = Precision(parameters[0].device, wanted=recipe.amp)
    schedule, best, history = recipe.make_schedule(optimizer), Best(), list[Epoch]()
    try:
        with in_mode(model, training=True), torch.inference_mode(False), torch.enable_grad(), rounding_as_outside():
            step = Parallel(model, Objective(model, feed, recipe))
            norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
            for number in range(1, recipe.epochs + 1):
                tally, lr = Tally(feed), float(optimizer.param_groups[0]["lr"])
                text = f"{what}fine-tuning, epoch {number}/{recipe.epochs}"
                with step.watching(), feed.in_epoch(number):
                    for batch in tracked(feed, progress, lambda: text + str(tally)):  # noqa: B023 - asked at once
                        optimizer.zero_grad()
                        with precision.cast():
                            loss, output, rate = step(batch)
                        precision.step(loss, optimizer, parameters, recipe.clip)
                        schedule.after_batch()
                        tally.add(output, batch, loss.detach(), rate)
                average_statistics(norms)
                epoch = tally.epoch(number, lr)
                if validation is not None:
                    epoch = replace(epoch, validation_accuracy=_validated(model, validation))
                schedule.after_epoch(epoch)
                best.offer(model, feed.adapter, epoch.validation_accuracy)
                history.append(epoch)
                with together():
                    stops = recipe.on_epoch is not None and _says_stop(recipe.on_epoch(list(history)))
                if any(gathered(stops)):
                    break
            best.restore(model, feed.adapter)
    finally:
        optimizer.zero_grad()
        feed.adapter.reset(model)


class Precision:
    """Where ``wanted`` mixed, else single as ever: casts, and scales float16's gradients."""

    def __init__(self, device: torch.device, *, wanted: bool) -> None:
        if wanted and not torch.amp.is_autocast_available(device.type):
            raise OptionError(f"amp=True: torch has no mixed precision on {device.type}.")
        half = device.type == "cuda"
        self._device, self._wanted = device.type, wanted
        self._dtype = torch.float16 if half else torch.bfloat16
        self._scaler = torch.amp.GradScaler("cuda", enabled=wanted and half)

    def cast(self) -> torch.autocast:
        """Around a forward pass and its loss."""
        return torch.autocast(self._device, self._dtype, enabled=self._wanted)

    def step(
        self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], clip: float | None
    ) -> None:
        """Backward, and the optimizer's step."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if clip is not None:
            self._scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        self._scaler.step(optimizer)
        self._scaler.update()


def _validated(model: nn.Module, validation: Feed) -> float:
    """The accuracy; training goes on with the random numbers that it would have drawn without."""
    with undisturbed(model), held(validation.generators()):
        return accuracy(model, validation)


def _says_stop(answer: object) -> bool:
    return isinstance(answer, (bool, np.bool_)) and bool(answer)
