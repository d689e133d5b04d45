"""Public networks as their authors wrote them: how much of each can go, how long that takes, what stays whole and why.

    python benchmarks/public_networks.py LIST.py --checkouts FOLDER [--only NAME ...]

No code of others is part of this project: LIST.py, which is yours, says where networks are and how they are built, and
FOLDER holds the checkouts, as owner+repository; what is missing there is named with the command that gets it. Of every
network half the channels of each layer are removed (criterion "magnitude", nothing repaired), once with the default
``skip`` and once with ``skip=[]``, in a process and with a time limit of its own, on one thread. That nothing else has
changed is tested without the library's own trial: in float64 the smaller network must give what the original gives
with the removed channels' spikes, and what layers take in of them, set to zero. Statistics of batch norms are taken
from three batches of noise before, so that spikes come through. Writes benchmarks/results/public_networks.md.

LIST.py defines ``NETWORKS``, a list of mappings:

    name, world ("spikingjelly" or "snntorch"), repository ("owner/name"), commit
    file           in the repository: a module, script or notebook, of which imports, definitions and constants are run
    build          an expression over these that gives the network
    input          the shape of a batch, or an expression that gives one
    options        further arguments of apply(), as expressions: {"timesteps": "4", "forward": "lambda model, x: ..."}
    paths          folders of the repository from which it imports, beside its root and the file's own
    rewrite        (pattern, replacement) pairs for the file's text

and, if need be, ``prepare(checkout)``, called before anything is imported, which puts right what imports can't find.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import datetime
import importlib.util
import json
import multiprocessing
import platform
import re
import resource
import sys
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import snncompress
from snncompress.contract.detection import find_adapter
from snncompress.interfaces import Adapter
from snncompress.model.brevitas_layers import without_quantization
from snncompress.model.cells import layer_at
from snncompress.model.copying import private_copy
from snncompress.model.edits import RemoveChannels
from snncompress.model.modules import tensors_in
from snncompress.model.network import WEIGHT_LAYERS, Network, channel_axis, weight_layers
from snncompress.model.own_neurons import named_neurons
from snncompress.running.data import Feed
from snncompress.structure.tracing import trace

HERE = Path(__file__).resolve().parent
RATIO, SECONDS = 0.5, 300
NEARLY, SOME = 0.8, 0.05  # of what could go
LITTLE = 0.01
GAINS = (1, 4, 16, 64)  # of the input, until a spike that was removed changes something


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("list", type=Path)
    parser.add_argument("--checkouts", type=Path, required=True)
    parser.add_argument("--results", type=Path, help="a folder of results as JSON, not run again")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME")
    options = parser.parse_args()
    torch.set_num_threads(1)
    listed = module_of(options.list)
    missing = {n["repository"]: n["commit"] for n in listed.NETWORKS if not folder(options.checkouts, n).is_dir()}
    for repository, commit in missing.items():
        where = options.checkouts / repository.replace("/", "+")
        print(f"git clone https://github.com/{repository} {where} && git -C {where} checkout {commit}")
    results = []
    for network in listed.NETWORKS:
        if network["repository"] in missing or (options.only and network["name"] not in options.only):
            continue
        kept = options.results and options.results / (re.sub(r"\W+", "_", network["name"]) + ".json")
        if kept and kept.exists() and not options.only:
            results.append(json.loads(kept.read_text()))
            continue
        prepare = getattr(listed, "prepare", lambda path: None)
        results.append({**network, **in_a_process(network, folder(options.checkouts, network), prepare)})
        print(row(results[-1]), flush=True)
        if kept:
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(results[-1], indent=1))
    if not options.only:
        (HERE / "results" / "public_networks.md").write_text("\n".join(report(results)) + "\n")


def folder(checkouts: Path, network: Mapping[str, Any]) -> Path:
    """Where a repository is checked out."""
    return Path(checkouts / str(network["repository"]).replace("/", "+")).resolve()


def in_a_process(network: Mapping[str, Any], checkout: Path, prepare: Callable[[Path], None]) -> dict[str, Any]:
    """What became of a network, or why nothing did."""
    forked = multiprocessing.get_context("fork")  # what takes long to import is there already
    ours, theirs = forked.Pipe(duplex=False)

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 10))
        with contextlib.redirect_stdout(sys.stderr):
            try:
                theirs.send(tried(network, checkout, prepare))
            except Exception as error:
                theirs.send({"error": f"{type(error).__name__}: {error}"})

    process = forked.Process(target=run)
    process.start()
    theirs.close()
    try:
        result = ours.recv() if ours.poll(10 * SECONDS) else None
    except EOFError:
        result = None
    process.kill()
    process.join()
    if result is None:
        return {"error": f"not done after {SECONDS} s of processor time, or for want of memory"}
    return dict(result)


# -- building one --


def module_of(path: Path) -> Any:
    """A module from its file."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(path: Path) -> str:
    """The code of a module, or of a notebook's cells."""
    if path.suffix != ".ipynb":
        return path.read_text(errors="replace")
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    lines = "\n\n".join("".join(cell["source"]) for cell in cells).splitlines()
    return "\n".join("" if line.lstrip().startswith(("!", "%", "pip ")) else line for line in lines)


def definitions(text: str, into: dict[str, Any], path: Path) -> None:
    """Run imports, definitions and what is set to something; nothing else, so that nothing is trained or loaded."""
    for node in ast.parse(text).body:
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef)):
            exec(compile(ast.Module([node], []), str(path), "exec"), into)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            with contextlib.suppress(Exception):  # it may need data, or what was trained
                exec(compile(ast.Module([node], []), str(path), "exec"), into)


def built(network: Mapping[str, Any], checkout: Path) -> tuple[nn.Module, Any, dict[str, Any]]:
    """The network, a batch, and further arguments of apply()."""
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "public_network", "torch": torch, "nn": nn}
    if network.get("file"):
        path = checkout / network["file"]
        names |= {"__file__": str(path)}
        sys.path[:0] = [str(path.parent), str(checkout), *(str(checkout / p) for p in network.get("paths", ()))]
        package = ".".join(path.parent.relative_to(checkout).parts)
        names["__package__"] = network.get("package", package)
        text = text_of(path)
        for pattern, replacement in network.get("rewrite", ()):
            text = re.sub(pattern, replacement, text)
        module = type(sys)("public_network")
        module.__dict__.update(names)
        sys.modules["public_network"] = module
        names = module.__dict__
        definitions(text, names, path)
    exec(network.get("imports", ""), names)
    torch.manual_seed(0)
    model = eval(network["build"], names)
    x = network["input"]
    x = eval(x, names) if isinstance(x, str) else torch.rand(*x)
    return model, x, {key: eval(value, names) for key, value in network.get("options", {}).items()}


# -- trying one --


def tried(network: Mapping[str, Any], checkout: Path, prepare: Callable[[Path], None]) -> dict[str, Any]:
    """Both calls of apply() on one network."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        prepare(checkout)
        model, x, options = built(network, checkout)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"couldn't be built: {type(error).__name__}: {error}"}
    own = {key: options[key] for key in ("neurons", "time_dim") if key in options}
    running = {key: options[key] for key in ("timesteps", "forward") if key in options}
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    try:
        adapter = find_adapter(model, named_neurons(None, own.get("neurons"), own.get("time_dim")))
        feed = Feed(adapter, x, **running, on=model)
        warm(model, feed)
        model.eval()
        shape = trace(private_copy(model, adapter), adapter, feed.example(), timesteps=feed.timesteps, groups=False)
        found["least"] = least(model, shape)
    except Exception as error:
        traceback.print_exc()
        found["before"] = f"{type(error).__name__}: {error}"
    for key, more in (("default", {}), ("all", {"skip": []})):
        torch.manual_seed(0)
        start = time.process_time()
        try:
            small = snncompress.apply(
                model, "magnitude", RATIO, None, data=x, repair=None, progress=False, **running, **own, **more
            )
        except Exception as error:
            traceback.print_exc()
            found[key] = {"error": f"{type(error).__name__}: {error}", "seconds": time.process_time() - start}
            continue
        seconds = time.process_time() - start
        share = sum(p.numel() for p in small.parameters()) / found["parameters"]
        found[key] = {"share": share, "seconds": seconds, "why": why(model, snncompress.plan_of(small).skipped)}
        found[key] |= compared(model, small, feed)
    return found


def warm(model: nn.Module, feed: Feed) -> None:
    """Take the statistics of batch norms from three batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    before = [(norm, norm.momentum) for norm in norms]
    for norm in norms:
        norm.momentum = None
    model.train()
    with torch.no_grad(), contextlib.suppress(Exception):  # some don't bear training with one sample
        for _ in range(3 if norms else 0):
            feed(model, feed.first())
    feed.adapter.reset(model)
    for norm, momentum in before:
        norm.momentum = momentum


def least(model: nn.Module, network: Network) -> float:
    """The share of parameters that is left where every layer but the classifier loses half its outputs."""
    total = kept = 0.0
    for name, module in model.named_modules():
        own = sum(p.numel() for p in module.parameters(recurse=False))
        share = RATIO
        if isinstance(module, WEIGHT_LAYERS) and name in network.layers:
            depthwise = getattr(module, "groups", 1) == getattr(module, "in_channels", 0)
            fed = network.producers[name] and not depthwise
            share = (1 if name in network.classifiers else RATIO) * (RATIO if fed else 1)
        elif isinstance(module, (*WEIGHT_LAYERS, nn.Embedding)):
            share = 1
        total, kept = total + own, kept + share * own
    return kept / total


def why(model: nn.Module, skipped: Mapping[str, str]) -> dict[str, tuple[int, float]]:
    """Reason → how many layers it holds for, and the share of the weights in them; names are left out of reasons."""
    layers: dict[str, Any] = {name: layer_at(model, name) for name in weight_layers(model)}
    names = sorted({*dict(model.named_modules()), *layers}, key=len, reverse=True)
    sizes = {name: layer.weight.numel() for name, layer in layers.items() if hasattr(layer, "weight")}
    total, found = sum(sizes.values()), defaultdict(lambda: (0, 0.0))
    for layer, reason in skipped.items():
        for name in names:
            if name:
                reason = re.sub(rf"(?<![\w.])(?<!the ){re.escape(name)}(?![\w.]*\w)", "…", reason)
        number, share = found[reason]
        found[reason] = number + 1, share + sizes.get(layer, 0) / max(1, total)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


# -- is it the same? --


def compared(model: nn.Module, small: nn.Module, feed: Feed) -> dict[str, Any]:
    """How far the small network is from the silenced original, and the original from that, at the most."""
    plan, off = snncompress.plan_of(small), 0.0
    quiet = silenced(model, plan, feed.adapter)
    for dtype in (torch.float64, torch.float32):  # some networks compute in float32 whatever they hold
        try:
            for gain in GAINS if plan.edits else GAINS[:1]:
                wanted, got, whole = (outputs(m, feed, dtype, gain) for m in (quiet, small, model))
                off, reacts = max(off, apart(wanted, got)), apart(wanted, whole)
                if reacts:
                    break
        except Exception as error:
            traceback.print_exc()
            problem = f"{type(error).__name__}: {error}"
            continue
        return {"off": off, "reacts": reacts, "in": str(dtype).removeprefix("torch."), "gain": gain}
    return {"not compared": problem}


def outputs(model: nn.Module, feed: Feed, dtype: torch.dtype, gain: float) -> list[Tensor]:
    """What the model returns on the first batch, made larger."""

    def larger(x: Any) -> Any:
        return x.to(dtype) * gain if isinstance(x, Tensor) and x.is_floating_point() else x

    with torch.no_grad():
        model = private_copy(model, feed.adapter).to(dtype).eval()
        without_quantization(model)  # Brevitas' scales are of the weights that are left
        x = tree_map(larger, feed.first().raw)
        feed = Feed(feed.adapter, [x], feed.timesteps, feed.forward)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            torch.manual_seed(0)
            return [t.clone() for t in tensors_in(feed(model, feed.first())) if t.is_floating_point()]
        finally:
            torch.set_default_dtype(before)


def apart(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest difference, relative to the largest number."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    return max(float((x - y).abs().max() / x.abs().max().clamp_min(1)) for x, y in zip(a, b, strict=True) if x.numel())


def silenced(model: nn.Module, plan: snncompress.Plan, adapter: Adapter) -> nn.Module:
    """A copy whose neurons put out 0, and whose layers take in 0, where the plan removes a channel."""
    result = private_copy(model, adapter)
    removals = [edit for edit in plan.edits if isinstance(edit, RemoveChannels)]
    axes = {piece.module: piece.axis for edit in removals for piece in edit.slices}
    shifted = {shift.reader for edit in removals for shift in edit.shifts}  # batch norms make something of 0
    for name, indices in plan.removed_channels("neuron").items():
        result.get_submodule(name).register_forward_hook(_silencer(torch.tensor(indices), axes[name]))
    for name, indices in plan.removed_channels("in").items():
        layer = result.get_submodule(name)
        if isinstance(layer, WEIGHT_LAYERS) and name not in shifted:
            layer.register_forward_pre_hook(_deafener(torch.tensor(indices), channel_axis(layer)))
    adapter.reset(result)
    return result


def _silencer(indices: Tensor, axis: int) -> Callable[..., Any]:
    def hook(module: nn.Module, _: Any, output: Any) -> Any:
        spikes = output[0] if isinstance(output, tuple) else output
        spikes = spikes.index_fill(axis, indices, 0.0)
        if hasattr(module, "spk"):  # snnTorch's recurrent neurons feed their own spikes back
            module.spk = spikes
        return (spikes, *output[1:]) if isinstance(output, tuple) else spikes

    return hook


def _deafener(indices: Tensor, axis: int) -> Callable[..., Any]:
    return lambda module, args: (args[0].index_fill(axis, indices, 0.0), *args[1:])


# -- the table --


def verdict(result: Mapping[str, Any]) -> str:
    """How much went, of what could."""
    one = result.get("all", {})
    if "share" not in one:
        return "error"
    if one.get("off", 0) > 1e-4:
        return "WRONG"
    could, did = 1 - result.get("least", RATIO**2), 1 - one["share"]
    if could < LITTLE:
        return "nothing to lose"
    return "nearly whole" if did >= NEARLY * could else "in part" if did >= SOME * could else "not"


def row(result: Mapping[str, Any]) -> str:
    """A line of the table."""
    cells = [result["name"], result["repository"], f"{result['parameters']:,}" if "parameters" in result else "–"]
    cells.append(f"{result['least']:.3f}" if "least" in result else "–")
    for key in ("default", "all"):
        one = result.get(key, {})
        cells.append(f"{one['share']:.3f}" if "share" in one else "–")
        cells.append(f"{one['seconds']:.1f}" if "seconds" in one else "–")
    one = result.get("all", {})
    if "off" in one:
        cells.append(f"{one['off']:.0e}" + ("" if one["reacts"] else " (silent)"))
    else:
        cells.append(one.get("not compared", "–")[:60])
    reasons = [f"{text} ({number}: {share:.0%})" for text, (number, share) in list(one.get("why", {}).items())[:3]]
    problems = [result.get("error"), one.get("error")]
    cells += [verdict(result), "; ".join([p for p in problems if p] + reasons)]
    return "| " + " | ".join(str(c).replace("|", "/").replace("\n", " ")[:400] for c in cells) + " |"


def report(results: list[dict[str, Any]]) -> Iterator[str]:
    """The file's lines."""
    machine = f"{platform.machine()}, torch {torch.__version__}, {datetime.date.today()}"
    yield (
        f"{len(results)} public networks; half the channels of every layer removed (criterion magnitude, no repair), "
        f"on one thread of {machine}; s: seconds of processor time. Shares are of parameters that are left, by default "
        f"and with skip=[]; least: if every layer but the classifier lost half. Off: largest difference from the "
        f"silenced original, relative, in float64 where the network bears it; (silent): nothing that was removed had "
        f"any effect on the output. Nearly whole: at least {NEARLY:.0%} of what could go went. Of what stays with "
        f"skip=[], the three reasons that hold for most weights, with the number of layers and their share."
    )
    for world in dict.fromkeys(r["world"] for r in results):
        some = [r for r in results if r["world"] == world]
        verdicts = [verdict(r) for r in some]
        counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(sorted(verdicts)))
        yield f"\n## {world}: {len(some)} networks: {counts}\n"
        yield "| network | repository | parameters | least | default | s | skip=[] | s | off | | what stays, and why |"
        yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |"
        yield from map(row, some)
    yield "\nCommits:\n"
    yield from sorted({f"- {r['repository']} {r['commit']}" for r in results})


if __name__ == "__main__":
    main()
