"""The trials of a search as a queue in Optuna's storage, from which any number of processes take.

All trials are put in line when the search begins, so that their numbers are those from 0 to n - 1 whoever runs them.
Who takes one writes its name on it, and every half minute that it is alive; a trial whose process is gone goes back in
line, with the parameters that were drawn for it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from snncompress.errors import OptionError, StorageError

BEAT, GRACE = 30.0, 150.0
"""Seconds from one sign of life to the next, and after how many a process on another machine is taken for dead."""
LOCKED = 10
"""Seconds after which a lock on a journal, which lasts milliseconds, is taken for that of a process that is gone."""
ATTEMPTS = 5
"""So many processes may die over a trial."""
ASKED = "snncompress"
_DRAWN = uuid.uuid4().hex
"""What stands for a process's beginning where the system doesn't tell."""


def optuna() -> Any:
    """The package; raises OptionError where it isn't installed."""
    try:
        import optuna as found
    except ImportError as error:
        raise OptionError(
            'search() needs Optuna, which isn\'t installed: pip install "snncompress[search]".'
        ) from error
    return found


@dataclass(frozen=True)
class Queue:
    """Where trials stand, and how the next one's parameters are drawn.

    Fields:
        storage: a file's path, a database's URL, or one of Optuna's storages.
        name: of the study in it.
        maximized: per objective.
        trials: how many there are to be.
        seed: a trial draws from a generator of its own, begun at this and its number.
        sampler: ``sampler(seed)``; None: Optuna's TPE.
        pruner: Optuna's; None: the median rule, where there is one objective.
    """

    storage: Any
    name: str
    maximized: tuple[bool, ...]
    trials: int
    seed: int
    sampler: Callable[[int], Any] | None = None
    pruner: Any = None

    def create(self, storage: Any, asked: Mapping[str, Any]) -> None:
        """Put all trials in line, or those that are missing; raises OptionError where another search stands there."""
        module = optuna()
        directions = ["maximize" if up else "minimize" for up in self.maximized]
        with _quiet(module), _readable(self.storage):
            study = module.create_study(
                storage=storage, study_name=self.name, directions=directions, load_if_exists=True
            )
            before = study.user_attrs.get(ASKED)
            if before is None and study.trials:
                raise OptionError(
                    f"The study {self.name!r} in {self.storage!r} isn't of snncompress.search. Give another name=."
                )
            if before is not None and (others := _differences(before, asked)):
                raise OptionError(
                    f"The study {self.name!r} in {self.storage!r} is of another search, which differs in {others}. "
                    f"Give the same arguments to go on with that one, or another storage= or name=."
                )
            if before is None:
                study.set_user_attr(ASKED, dict(asked))
            for _ in range(self.trials - len(study.get_trials(deepcopy=False))):
                study.add_trial(module.trial.create_trial(state=module.trial.TrialState.WAITING))

    def study(self, storage: Any) -> Any:
        """Optuna's."""
        module = optuna()
        with _readable(self.storage):
            return module.load_study(study_name=self.name, storage=storage, pruner=self.pruner)

    def take(self, study: Any, storage: Any) -> tuple[Any, int] | None:
        """The next trial in line, now this process's own, and its id; None where none is left."""
        module = optuna()
        states = module.trial.TrialState
        self.put_back(storage)
        for frozen, trial_id in self._those(storage, states.WAITING):
            if frozen.number >= self.trials:
                continue
            with suppress(module.exceptions.UpdateFinishedTrialError):
                _sign(storage, trial_id)  # before, too: of one that is killed in between it is known who had it
                if storage.set_trial_state_values(trial_id, states.RUNNING):
                    _sign(storage, trial_id)
                    storage.set_trial_user_attr(trial_id, "attempts", frozen.user_attrs.get("attempts", 0) + 1)
                    study.sampler = self._sampler(frozen.number)
                    return module.trial.Trial(study, trial_id), trial_id
        return None

    def put_back(self, storage: Any) -> None:
        """Back in line with trials whose processes are gone; too many that died over one give it up."""
        module = optuna()
        states = module.trial.TrialState
        for seen, trial_id in self._those(storage, states.RUNNING):
            if not _abandoned(seen):
                continue
            now = storage.get_trial(trial_id)  # another process may have put it back and begun it
            if now.state != states.RUNNING or now.user_attrs != seen.user_attrs:
                continue
            died = now.user_attrs.get("attempts", 0)
            with suppress(module.exceptions.UpdateFinishedTrialError):
                if died < ATTEMPTS:
                    storage.set_trial_state_values(trial_id, states.WAITING)
                    continue
                why = f"{died} processes died over it. Likely cause: out of memory"
                storage.set_trial_user_attr(trial_id, "reason", why)
                storage.set_trial_state_values(trial_id, states.FAIL)

    def _those(self, storage: Any, state: Any) -> Iterator[tuple[Any, int]]:
        """Trials in a state, with their ids."""
        study_id = storage.get_study_id_from_name(self.name)
        for frozen in storage.get_all_trials(study_id, deepcopy=False, states=(state,)):
            yield frozen, storage.get_trial_id_from_study_id_trial_number(study_id, frozen.number)

    def _sampler(self, number: int) -> Any:
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        return optuna().samplers.TPESampler(seed=seed) if self.sampler is None else self.sampler(seed)


def opened(storage: Any) -> Any:
    """Optuna's storage of a path or a URL; raises StorageError."""
    module = optuna()
    if isinstance(storage, (str, os.PathLike)):
        where, storages = str(os.fspath(storage)), module.storages
        with _readable(storage):
            if "://" in where:
                return storages.RDBStorage(where)
            lock = storages.journal.JournalFileOpenLock(where, grace_period=LOCKED)
            return storages.JournalStorage(storages.journal.JournalFileBackend(where, lock_obj=lock))
    return storage


def closed(storage: Any, asked: Any) -> None:
    """Let go of a database that :func:`opened` was asked for."""
    engine = getattr(storage, "engine", None)
    if storage is not asked and engine is not None:
        storage.remove_session()
        engine.dispose()


def give_back(storage: Any, trial_id: int) -> None:
    """Back in line, as if it had never been taken: whoever ran it was stopped."""
    with suppress(Exception):  # what stopped it is what counts
        storage.set_trial_user_attr(trial_id, "attempts", 0)
        storage.set_trial_state_values(trial_id, optuna().trial.TrialState.WAITING)


@contextmanager
def alive(storage: Any, trial_id: int) -> Iterator[None]:
    """Inside, signs of life are written on the trial."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            with suppress(Exception):  # the next one will do
                storage.set_trial_user_attr(trial_id, "seen", time.time())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _sign(storage: Any, trial_id: int) -> None:
    storage.set_trial_user_attr(trial_id, "owner", _identity())
    storage.set_trial_user_attr(trial_id, "seen", time.time())


def _identity() -> list[Any]:
    """Of this process: host, number, and when it began, since numbers are given out again."""
    return [socket.gethostname(), os.getpid(), _began(os.getpid()) or _DRAWN]


def _abandoned(frozen: Any) -> bool:
    """Is the process gone that runs it?"""
    owner = frozen.user_attrs.get("owner")
    if owner is None:
        return True
    if owner == _identity():
        return False
    host, pid, began = owner
    if os.name == "posix" and host == socket.gethostname() and _gone(pid, began):
        return True
    return time.time() - float(frozen.user_attrs.get("seen", 0.0)) > GRACE


def _gone(pid: int, began: str) -> bool:
    """As far as this machine can tell."""
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    now = _began(pid)
    return now is not None and now != began


def _began(pid: int) -> str | None:
    """The boot and the tick at which a process began, where the system tells; another text once it has ended."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        facts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{boot} {facts[19]}{' ended' if facts[0] in 'ZX' else ''}"  # a zombie: nobody has asked how it ended
    except (OSError, IndexError):
        return None


def _differences(before: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} ({before.get(key)!r} there, {asked.get(key)!r} here)"
        for key in sorted(before.keys() | asked.keys())
        if before.get(key) != asked.get(key)
    )


@contextmanager
def _quiet(module: Any) -> Iterator[None]:
    """Optuna says on stderr that a study was made; here a result says what there is."""
    before = module.logging.get_verbosity()
    module.logging.set_verbosity(module.logging.WARNING)
    try:
        yield
    finally:
        module.logging.set_verbosity(before)


@contextmanager
def _readable(storage: Any) -> Iterator[None]:
    try:
        yield
    except OptionError:
        raise
    except Exception as error:  # a file that isn't one, a database that isn't there
        raise StorageError(
            f"storage={storage!r} can't be used: {type(error).__name__}: {error}. Give the path of a file (a journal), "
            f"a URL such as 'sqlite:///search.db', or one of Optuna's storages."
        ) from error
