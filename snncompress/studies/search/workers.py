"""Trials in several processes of this machine, or as tasks on a Ray cluster; all take from the same storage."""

from __future__ import annotations

import concurrent.futures
import io
import multiprocessing
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from snncompress.errors import ModelError, OptionError, SNNCompressError

from .queue import opened
from .trying import Work, Worker

Result = int | None
_WORKERS: dict[str, Worker] = {}
"""In a process that runs trials: the one search that it works for, by its key."""
_PARCELS: dict[str, bytes] = {}


def one_by_one(worker: Worker) -> Iterator[int]:
    """In this process; yields the numbers of trials that are done."""
    while (number := worker.next()) is not None:
        yield number


def in_processes(work: Work, n_jobs: int) -> Iterator[int]:
    """In so many processes of this machine."""
    key, parcel = _key(), packed(work)
    context = multiprocessing.get_context("spawn")  # a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(n_jobs, context, _begin, (key, parcel)) as pool:
        try:
            yield from _kept_busy(lambda: pool.submit(_next, key), n_jobs)
        except BrokenProcessPool as error:
            raise SNNCompressError(
                "A process of the search died. Likely cause: it was killed, as for lack of memory, or the script lacks "
                "if __name__ == '__main__':, which processes need around the call. The trials so far are in the "
                "storage: the same call with the same storage= goes on, with fewer n_jobs= if memory ran out."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def on_ray(work: Work, n_jobs: int | None, resources: Mapping[str, Any]) -> Iterator[int]:
    """As tasks on a Ray cluster, so many at a time; None: as many as it has CPUs."""
    ray = _ray()
    if not ray.is_initialized():
        try:
            ray.init(address="auto")
        except ConnectionError as error:
            raise OptionError(
                "on='ray' needs a cluster, and none was found. Start one (ray start --head), or call ray.init() first."
            ) from error
    key, parcel = _key(), ray.put(packed(work))
    task = ray.remote(_next_on_ray).options(**resources)
    several = n_jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
    tasks: dict[Future[Result], Any] = {}

    def submit() -> Future[Result]:
        submitted = task.remote(key, [parcel])
        future: Future[Result] = submitted.future()
        tasks[future] = submitted
        return future

    try:
        yield from _kept_busy(submit, several)
    finally:
        for future, submitted in tasks.items():
            if not future.done():
                ray.cancel(submitted)


def packed(work: Work) -> bytes:
    """For another process; raises ModelError where something can't be sent."""
    parcel = io.BytesIO()
    try:
        torch.save(work, parcel)
    except Exception as error:  # pickle's errors are of many kinds
        raise ModelError(
            f"The search can't be sent to other processes: {type(error).__name__}: {error}. Likely cause: the class of "
            f"the model, forward=, loss= or the data stands inside a function, or is a lambda. Put it at the top of a "
            f"module, and pass data as batches, a Dataset or a DataLoader; n_jobs=1 needs none of that."
        ) from error
    return parcel.getvalue()


def _kept_busy(submit: Callable[[], Future[Result]], n_jobs: int) -> Iterator[int]:
    """As many trials at a time, until one finds the line empty."""
    running = {submit() for _ in range(n_jobs)}
    while running:
        done, running = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            number = future.result()
            if number is not None:
                running.add(submit())
                yield number


def _begin(key: str, parcel: bytes) -> None:
    """In a new process: keep what was sent, and end when the process that sent it is gone."""
    _PARCELS[key] = parcel
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _next(key: str) -> Result:
    return _worker(key, lambda: _PARCELS.pop(key)).next()


def _next_on_ray(key: str, box: list[Any]) -> Result:
    return _worker(key, lambda: _ray().get(box[0])).next()


def _worker(key: str, parcel: Callable[[], bytes]) -> Worker:
    if key not in _WORKERS:
        _WORKERS.clear()  # of a search before
        work = _unpacked(parcel())
        _WORKERS[key] = Worker(work, opened(work.queue.storage))
    return _WORKERS[key]


def _unpacked(parcel: bytes) -> Work:
    try:
        work: Work = torch.load(io.BytesIO(parcel), weights_only=False)  # made by this search a moment ago
    except Exception as error:  # whatever importing the user's modules may raise
        raise ModelError(
            f"The search can't be taken up in another process: {type(error).__name__}: {error}. Likely cause: the "
            f"class of the model stands in a notebook or at a prompt, where other processes can't import it. Put it in "
            f"a file of its own, installed or on PYTHONPATH on every machine; n_jobs=1 needs none of that."
        ) from error
    return work


def _key() -> str:
    return uuid.uuid4().hex


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise OptionError('on="ray" needs Ray, which isn\'t installed: pip install "snncompress[ray]".') from error
    return ray
