"""Networks for other tools: NIR for neuromorphic hardware, ONNX for inference engines, whole numbers for either."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from snncompress.base.distributed import no_sync
from snncompress.base.files import writable, write_whole
from snncompress.contract.registry import registry
from snncompress.errors import ModelError, OptionError
from snncompress.interfaces import Adapter, Observer, Target
from snncompress.measuring.fits import fitted, staged
from snncompress.model.cells import layer_at
from snncompress.model.chance import seeded
from snncompress.model.copying import private_copy
from snncompress.model.modules import tensors_in
from snncompress.model.network import weight_layers
from snncompress.running.bench import Bench, bench

from .chip_graph import for_chip, whole_numbers
from .freezing import folded, freeze
from .integer_file import integer_file
from .integer_layers import make_float
from .integer_network import counts_in_integers, heard, refuse_integers
from .integer_nir import integer_nir
from .integer_onnx import integer_onnx
from .integer_program import Program, integer_program
from .nir_export import nir_graph
from .nir_running import Approximation, difference
from .onnx_export import Step, onnx_model
from .quickening import slowed

Format = Literal["nir", "onnx", "integer"]
_NEEDS = {"nir": ("nir", "h5py"), "onnx": ("onnx", "onnxscript"), "integer": ("safetensors",)}
_ENDINGS = {"safetensors": "integer"}
_ONNX_TORCH = (2, 10)  # PyTorch's exporter before it fails at batch norms or states, or keeps one side of an `if`
_STEPS = 4
_SAMPLES = 64


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: Format | None = None,
    *,
    data: Any,
    timesteps: int | None = None,
    adapter: Adapter | str | None = None,
    target: Target | str | None = None,
    approximate: bool = False,
) -> Approximation | None:
    """Write a network, compressed or not, as a NIR graph, as one timestep in ONNX, or in whole numbers.

    The model stays as it is, and the file appears whole or not at all. In either format the network is taken apart into
    single timesteps; that it then still computes the same, nothing but its neurons having a memory, is tested on a
    copy in float64.

    **NIR** (https://neuroir.org) holds weights as they compute, quantized and masked, with batch norms folded, and
    neurons as differential equations in seconds. With Euler steps of dt = 1e-4 s,

        v ← v + dt/τ · (v_leak - v + r · I);   it fires where v > v_threshold;   there v ← v_reset

    the file's network is, in real numbers, the model: a neuron v ← v + leak · (rest - v) + gain · I becomes an LIF with
    τ = dt / leak, r = gain / leak and v_leak = rest, or without leak an IF with r = gain / dt. So SpikingJelly's
    LIFNode has τ = dt · tau, and r = 1, or r = tau without ``decay_input``; snnTorch's Leaky has τ = dt / (1 - β),
    r = 1 / (1 - β). Shapes have no batch axis; every neuron has its own τ, r and threshold, in float64. Membranes start
    at v_reset. SpikingJelly fires at v ≥ θ already, which differs only for a potential that meets the threshold
    exactly: the graph's metadata tell under "fires", and the timestep under "dt".

    Of neurons in fixed point the equation has the threshold and the leak on the grid; that potentials are rounded NIR
    can't say, and the metadata do under "fixed_point": JSON, neuron → bits, overflow, step.

    NIR has linear, convolution (1-D, 2-D), average pooling (2-D), flatten, sums, and neurons reset to a value. What it
    has no node for is written in several where they compute the same: max-pooling of spikes as a sum that is more than
    half a spike; a synaptic current (snnTorch's Synaptic) as CubaLIF, i ← i + dt/τ_syn · (w_in · x - i), before v; a
    neuron's own spikes (RLeaky, RSynaptic) over an edge back to it; a reset by subtraction as a leaky integrator u, a
    threshold, and an edge back that takes θ off,

        u ← u + dt/τ · (v_leak - u + r · (I - θ' · s));   s is 1 where u > θ, else 0;   edges back hand on the last s

    ``approximate`` writes what isn't the same, in nodes that most programs read: averages in the place of max-pooling,
    and a neuron in one node, reset to its rest, where it subtracts its threshold. Both networks are then run on samples
    from ``data``, and how many spikes differ is printed. All else that NIR can't express is refused, such as
    concatenation.

    **ONNX** (opset 21) holds one timestep: inputs "input" [N, ...] and for every neuron its states, such as
    "lif1.v" or "lif1.mem" [N, C, ...]; outputs "output" ("output_1" … for more) and the states' successors, such as
    "lif1.v_next", to be handed in at the next step. N is free. What the states are before the first step stands in the
    metadata under "initial_states", as JSON: {"lif1.v": 0.0}. Quantized weights are integers of 8, 16 or 32 bits behind
    a DequantizeLinear, which gives the model's weights to the last bit. A grid without zero, as ReScaW's, is stored
    as odd integers of half the scale. Batch norms stay, and may be fused by the engine.

    **Integer** (safetensors) holds a network in whole numbers, as ``freeze(…, integer="full")`` makes it, for readers
    that know nothing of torch: codes of a byte, multipliers, thresholds, and as JSON in which order they are used; see
    docs/integer.md, where an interpreter in numpy fires as the network does, to the last spike.

    A network that is in whole numbers already becomes ONNX with ConvInteger and MatMulInteger, its states being int32,
    "lif1.q" and "lif1.q_next", which fires as it does to the last spike; and NIR with integers as weights and resets,
    potentials being numbers of a step, which does so where nothing is rounded.

    Args:
        model: a network of SpikingJelly or snnTorch that runs step by step or in multi-step mode.
        path: the file.
        format: "nir", "onnx" or "integer"; None: the ending of ``path``, .nir, .onnx or .safetensors.
        data: an example of what it takes: a batch, a DataLoader, or an iterable of batches.
        timesteps: T says that ``data`` are samples [N, ...], fed as constant current; None that they go in as they are.
        adapter: a framework's name or an Adapter, where the model doesn't tell.
        target: a chip for which a NIR graph is meant, a name (:func:`snncompress.targets`) or an instance. The network
            must fit it (:func:`snncompress.fits`). Averages become sums, quantized weights the whole numbers that they
            are multiples of, and thresholds are in the same units, so that the file's neurons fire as the network's do
            (behind whole numbers whether it is where v > θ or where v ≥ θ);
            every linear layer has a bias, if of zeros.
        approximate: whether NIR may hold another network where it can't hold this one; refused for other formats.

    Returns:
        What ``approximate`` changed, where it did, else None.

    Raises:
        ModelError: the format can't express a module, which is named with the reason and what to do; or the model loops
            over time itself, so that it has no single timestep; or it counts in whole numbers, and ``target`` or
            ``approximate`` are given.
        DataError: the data don't fit the model.
        OptionError: the network doesn't fit the target, or would fire otherwise there, or the format isn't NIR, which
            alone has a ``target`` and is ``approximate``; no such format, or its package isn't installed, or torch is
            older than 2.10 and the format ONNX.
        StorageError: the file can't be written.

    Example:
        >>> import nir
        >>> from spikingjelly.activation_based import neuron
        >>> net = nn.Sequential(nn.Linear(3, 2), neuron.LIFNode(tau=2.0))
        >>> file = getfixture("tmp_path") / "net.nir"
        >>> export(net, file, data=torch.rand(1, 3), timesteps=4)
        >>> graph = nir.read(file)
        >>> graph.edges
        [('input', '0'), ('0', '1'), ('1', 'output')]
        >>> graph.nodes["1"].tau, graph.nodes["1"].r
        (array([0.0002, 0.0002]), array([1., 1.]))
    """
    path = writable(path)
    kind = _checked_format(format, path, whole=counts_in_integers(model))
    chip: Target | None = None if target is None else registry().resolve("target", target, Target)
    if chip is not None and kind != "nir":
        raise OptionError(f"target= writes NIR graphs, not {kind!r}: format='nir'.")
    if approximate and kind != "nir":
        raise OptionError(f"approximate=True is for NIR, and {kind!r} holds the network as it is: leave it out.")
    if chip is not None and chip.unlike:
        raise OptionError(
            f"No network can be written for {chip.name!r} that fires there as it does here: {chip.unlike}. Train with "
            f"neurons of its vendor's own tools, and let them map it; export without target= writes NIR for simulators."
        )
    if chip is not None or approximate:
        refuse_integers(model, "written for a target, or approximately")
    if kind == "integer" or counts_in_integers(model):
        content = _IN_INTEGERS[kind](_program(model, data, timesteps, adapter))
        write_whole(path, lambda file: file.write(content))
        return None
    with no_sync(), bench(model, data, timesteps, adapter=adapter) as table:
        numbers = {} if chip is None else _numbers(table, chip)
        found, batch = table.adapter, table.feed.first()
        for module in table.model.modules():
            slowed(module)
            make_float(module)  # of a network that was frozen for integers
        step, x = _one_step(table.copy(), found, batch.x, timesteps)
        _check_same(table.model, found, step, x)
        changed: Approximation | None = None
        if kind == "nir":
            step, x = _one_step(folded(table.copy().eval(), found, table.feed.example()), found, batch.x, timesteps)
        with found.alone(step):
            if kind == "nir":
                graph, replaced = nir_graph(step, found, x[:1], approximate=approximate)
                if chip is not None:
                    _refuse_several(graph, chip)
                    graph = for_chip(graph, numbers)
                content = _nir_bytes(graph)
                if replaced:
                    changed = _changed(table.copy(), found, batch.x, timesteps, graph, replaced)
            else:
                content = onnx_model(Step(step, found), x)
    write_whole(path, lambda file: file.write(content))
    if changed is not None:
        print(changed)
    return changed


def _checked_format(format: str | None, path: Path, *, whole: bool) -> Format:
    kind: Any = _ENDINGS.get(path.suffix[1:], path.suffix[1:]) if format is None else format
    if kind not in get_args(Format):
        raise OptionError(
            f"format must be 'nir', 'onnx' or 'integer', not {kind!r}; None takes the ending of the file's name."
        )
    for package in ("onnx",) if whole and kind == "onnx" else _NEEDS[kind]:
        try:
            import_module(package)
        except ImportError as error:
            raise OptionError(
                f"Format {kind!r} needs {package} ({error}): pip install 'snncompress[export]'."
            ) from error
    if (
        kind == "onnx" and not whole and cast(Any, torch.__version__) < _ONNX_TORCH
    ):  # it compares with tuples, as a version does
        needed = ".".join(map(str, _ONNX_TORCH))
        raise OptionError(f"Format 'onnx' needs torch {needed} or newer, and this is {torch.__version__}: update it.")
    result: Format = kind
    return result


def _one_step(
    copy: nn.Module, adapter: Adapter, x: Tensor, timesteps: int | None, samples: int = 2
) -> tuple[nn.Module, Tensor]:
    """The copy, called once per timestep now, and one step's input [2, ...], both on the CPU."""
    x = adapter.single_step(copy, x, timesteps)[:samples].cpu()
    adapter.make_traceable(copy)
    return copy.cpu().eval(), x if len(x) > 1 else x.repeat(2, *[1] * (x.dim() - 1))  # at N = 1 N would look fixed


def _check_same(model: nn.Module, adapter: Adapter, step: nn.Module, x: Tensor) -> None:
    """Raises ModelError where T steps one by one differ from the model itself."""
    whole = private_copy(model, adapter).cpu().eval()
    adapter.make_traceable(whole)
    exact = x.double() if x.is_floating_point() else x  # indices of an embedding stay what they are
    name, advice = type(model).__name__, "Let its forward handle one timestep, and leave the rest to a loop outside it."
    try:
        with seeded(whole), adapter.alone(whole):
            wanted = [next(tensors_in(adapter.run(whole.double(), exact, _STEPS)))]
        one = Step(private_copy(step, adapter).double(), adapter)
        with seeded(one), adapter.alone(one):
            states = one.initial(exact)
            outputs = []
            for _ in range(_STEPS):
                y, states = one.split(one(exact, *states))
                outputs.append(y[0])
        wanted += [adapter.states(whole.get_submodule(neuron))[state] for neuron, state in one.names]
    except ModelError:
        raise
    except Exception as error:  # the model is the user's: anything can come out of it
        raise ModelError(
            f"{name} can't be run for {_STEPS} timesteps, as it is and one by one, in float64, on an input of shape "
            f"{list(x.shape)}: {type(error).__name__}: {error}. {advice}"
        ) from error
    got = [torch.stack(outputs), *states]
    if not all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-6, atol=1e-9) for a, b in zip(got, wanted, strict=True)
    ):
        shapes = f"the steps give {list(got[0].shape)}, the model {list(wanted[0].shape)}"
        unlike = "the values are others" if got[0].shape == wanted[0].shape else shapes
        raise ModelError(
            f"{name} computes something else when it is run one timestep at a time, its neurons' states handed on: "
            f"{unlike}. Likely cause: its forward works across timesteps (a mean over time, a loop), or a module "
            f"besides the neurons has a memory, as RateMaxPool has. {advice}"
        )


def _numbers(table: Bench[Any], chip: Target) -> dict[str, Tensor]:
    """Layer → its weight as whole numbers, where it is quantized; raises OptionError unless the network fits."""
    found = fitted(chip, staged(table, known=True))
    if not found:
        raise OptionError(
            f"This {type(table.model).__name__} doesn't fit {chip.name!r}: {'; '.join(found.steps)}. "
            f"snncompress.apply(model, target={chip.name!r}) makes one that does, where it can."
        )
    whole = {name: whole_numbers(layer_at(table.model, name)) for name in weight_layers(table.model)}
    return {name: numbers for name, numbers in whole.items() if numbers is not None}


def _program(model: nn.Module, data: Any, timesteps: int | None, adapter: Adapter | str | None) -> Program:
    """Of a network in whole numbers; of another once it is one."""
    if not counts_in_integers(model):
        model = freeze(model, data, timesteps=timesteps, integer="full", adapter=adapter)
    with no_sync(), bench(model, data, timesteps, adapter=adapter, plain=True) as table:
        found, x = table.adapter, table.feed.example_batch().x
        step = private_copy(table.model, found)
        first = found.single_step(step, x, timesteps)
        steps = [first] * (timesteps or 1) if timesteps or first.dim() == x.dim() else list(x)
        with torch.no_grad(), found.alone(step):
            whole = heard(table.model, found, table.feed.example())
            single = heard(step, found, lambda net: [net(x) for x in steps])
            if any(not torch.equal(single.get(name, spikes[:0]), spikes) for name, spikes in whole.items()):
                raise ModelError(
                    f"{type(model).__name__} computes something else when it is run one timestep at a time. Likely "
                    f"cause: its forward works across timesteps. Let it handle one, and leave the rest to a loop."
                )
            return integer_program(step, found, first[:1])


def _changed(
    copy: nn.Module, adapter: Adapter, x: Tensor, timesteps: int | None, graph: Any, replaced: dict[str, str]
) -> Approximation:
    """What the graph's spikes are beside the model's, on as many samples as are soon run."""
    step, x = _one_step(copy, adapter, x, timesteps, _SAMPLES)
    steps = timesteps or 4 * _STEPS
    spikes: dict[str, list[Tensor]] = {}
    with ExitStack() as stack, torch.no_grad(), adapter.alone(step):
        step.double()
        adapter.reset(step)
        for name, neuron in adapter.neurons(step).items():
            stack.callback(adapter.observe(neuron, _hearing(spikes.setdefault(name, [])), membrane=False))
        for _ in range(steps):
            step(x.double())
    return difference(graph, x, {name: torch.cat(heard) for name, heard in spikes.items()}, steps, replaced)


def _hearing(heard: list[Tensor]) -> Observer:
    return lambda spikes, _: heard.append(spikes.double())


def _refuse_several(graph: Any, chip: Target) -> None:
    """Raise ModelError for what is one thing in the network and several nodes in the file: chips have no such parts."""
    for name, node in graph.nodes.items():
        if (kind := type(node).__name__) in ("Threshold", "Scale", "LI", "I"):
            raise ModelError(
                f"{name} takes several NIR nodes, {kind} among them, and what programs {chip.name!r} reads none of "
                f"those. approximate=True writes neurons reset to their rest in one node, and averages for maxima."
            )


_IN_INTEGERS: dict[Format, Callable[[Program], bytes]] = {
    "integer": integer_file,
    "onnx": integer_onnx,
    "nir": lambda program: _nir_bytes(integer_nir(program)),
}


def _nir_bytes(graph: Any) -> bytes:
    import nir

    buffer = io.BytesIO()
    nir.write(buffer, graph)
    return buffer.getvalue()
