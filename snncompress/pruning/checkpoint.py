"""Long runs that can be stopped and resumed: after every step the model, its edits and the random state are kept."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snncompress.base.distributed import gathered, processes, rank, shared, together
from snncompress.base.files import refuse_special, write_whole
from snncompress.errors import OptionError, StorageError
from snncompress.model.chance import PLAIN, cuda_devices, generators_in, set_state, state_of
from snncompress.model.edits import Edit, edit_from_dict
from snncompress.model.modules import tensors_in
from snncompress.running.data import Feed

FORMAT = 3
_FILE = "checkpoint.pt"


class Checkpoint:
    """The last finished step of one run, in one file of ``folder``.

    ``settings`` and the model tell whose run it is: another run is refused. What is kept is tensors and JSON, read
    without pickled code. Of several processes that of rank 0 reads and writes, for all.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Mapping[str, Any], model: nn.Module) -> None:
        together_with = {"processes": processes()} if processes() > 1 else {}
        self._run = {**json.loads(json.dumps(settings)), "model": shared(fingerprint(model)), **together_with}
        with together():
            self._prepare(folder)

    def _prepare(self, folder: str | os.PathLike[str]) -> None:
        try:
            if not os.fspath(folder):
                raise OSError("it is empty; None keeps no checkpoints")
            self.path = Path(folder) / _FILE
            if rank():
                return
            refuse_special(self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for part in self.path.parent.glob(f".{_FILE}.*"):  # of a run that was killed while it wrote
                part.unlink()
        except (OSError, TypeError) as error:
            raise StorageError(f"checkpoint={folder!r} can't be used as a folder: {error}.") from error

    def resume(
        self, model: nn.Module, feed: Feed, redo: Callable[[Edit], None]
    ) -> tuple[int, list[Edit], list[str], dict[str, str]]:
        """Bring ``model`` and the random state to the last finished step: what :meth:`save` was handed."""
        data: bytes | None = None
        with together():
            try:
                data = self.path.read_bytes() if rank() == 0 and self.path.exists() else None
            except OSError as error:
                raise StorageError(f"{self.path} can't be read: {error}.") from error
        data = shared(data)
        if data is None:
            return 0, [], [], {}
        try:
            kept = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if kept["format"] != FORMAT:
                raise StorageError(f"{self.path} has format {kept['format']!r}; this version reads {FORMAT}.")
            run, edits = json.loads(kept["run"]), [edit_from_dict(e) for e in json.loads(kept["edits"])]
            step, state, generators = int(kept["step"]), kept["state"], kept["generators"]
            repaired = [str(name) for name in kept["repaired"]]
            left = {str(name): str(why) for name, why in dict(kept.get("left", {})).items()}
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            what = type(error).__name__  # torch's own advice, to load it with code and all, is not ours
            raise StorageError(f"{self.path} is damaged ({what}). Delete it to start the run anew.") from error
        if others := sorted(k for k in run.keys() | self._run.keys() if run.get(k) != self._run.get(k)):
            said = ", ".join(f"{k} ({run.get(k)} there, {self._run.get(k)} here)" for k in others)
            raise OptionError(
                f"{self.path} is of another run, which differs in {said}. Give the same arguments and the same model "
                f"to resume that one, or another folder."
            )
        if rank():
            generators = kept["others"][rank() - 1]
        drawn_from = _generators(model, feed)
        if len(drawn_from) != len(generators):
            raise OptionError(
                f"{self.path} is of a run with {len(generators)} random generators, this one has {len(drawn_from)}: "
                f"the data, the model or the devices are others. Give the same to resume it, or another folder."
            )
        for edit in edits:
            redo(edit)
        model.load_state_dict(state)
        for generator, saved in zip(drawn_from, generators, strict=True):
            set_state(generator, json.loads(saved) if isinstance(saved, str) else saved)
        return step, edits, repaired, left

    def save(
        self, step: int, edits: list[Edit], repaired: list[str], left: dict[str, str], model: nn.Module, feed: Feed
    ) -> None:
        """Keep the state after ``step``; a run that is killed meanwhile finds the one before.

        ``repaired`` are layers; ``left`` those that stay so far, with the reason.
        """
        generators, *others = gathered([_kept(state_of(generator)) for generator in _generators(model, feed)])
        kept = {
            "format": FORMAT,
            "run": json.dumps(self._run),
            "step": step,
            "edits": json.dumps([edit.to_dict() for edit in edits]),
            "repaired": repaired,
            "left": left,
            "state": model.state_dict(),
            "generators": generators,
            **({"others": others} if others else {}),
        }
        with together():
            if rank() == 0:
                write_whole(self.path, lambda file: torch.save(kept, file))


def _generators(model: nn.Module, feed: Feed) -> list[Any]:
    """What a run draws from: torch's, Python's and numpy's own generators, the model's and the data's."""
    devices = (torch.cuda.default_generators[device] for device in cuda_devices(model))
    return [torch.default_generator, *devices, *PLAIN, *generators_in(model), *feed.generators()]


def _kept(state: Any) -> Any:
    """A state as it is read without code: a tensor, or JSON."""
    return state if isinstance(state, Tensor) else json.dumps(state, default=lambda array: array.tolist())


def fingerprint(model: nn.Module) -> str:
    """A short digest of a model: its modules, their numbers, its tensors."""
    digest = hashlib.sha256(re.sub(r" at 0x[0-9a-f]+", "", repr(model)).encode())
    for name, module in model.named_modules():
        if any(module.children()):
            continue
        # what neurons don't print: thresholds, decays, resets
        numbers = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k != "training"}
        digest.update(f"{name}{sorted(numbers.items())}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest_of(tensor, digest)
    return digest.hexdigest()[:16]


def digest_of(value: Any, digest: Any = None) -> str:
    """A short digest of the tensors in a batch or a state_dict entry."""
    digest = hashlib.sha256() if digest is None else digest
    for tensor in tensors_in(value):
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return str(digest.hexdigest()[:16])
