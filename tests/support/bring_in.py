"""Bringing a model into a weight cache with all its stages, whoever loads it."""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from aegaeon._native import CachedModel, WeightCache
from aegaeon.errors import DeadlineExceeded, WeightsEvicted

if TYPE_CHECKING:
    from aegaeon._native import LoadJob  # a name for types only

log = logging.getLogger(__name__)


class CacheRequest(msgspec.Struct, frozen=True):
    """What identifies a model in the cache, and its size there."""

    key: bytes  # 32 bytes: the identity of its files and of the layout
    model: str
    size_bytes: int
    stages: int


Jobs = Callable[[], list["LoadJob"]]


def bring_in(
    cache: WeightCache, request: CacheRequest, jobs: Jobs, threads: int, timeout_s: float
) -> CachedModel:
    """Return the model with all stages in and pinned once, loaded by us or by another process.

    `jobs` is asked for only when we load. `timeout_s` bounds the waits for room and for other
    loaders, not our own load. Raises BudgetTooSmall, CheckpointError, LoadCancelled,
    DeadlineExceeded.
    """
    deadline_s = time.monotonic() + timeout_s
    while True:
        left_s = max(deadline_s - time.monotonic(), 0.0)
        model = cache.acquire(
            request.key, request.model, request.size_bytes, request.stages, left_s
        )
        try:
            if model.pin():
                _finish(model, request, jobs, threads, deadline_s)
                return model
        except WeightsEvicted:
            log.info("weights evicted while waiting for them model=%s", request.model)
        except BaseException:
            model.close()
            raise
        model.close()


def _finish(
    model: CachedModel, request: CacheRequest, jobs: Jobs, threads: int, deadline_s: float
) -> None:
    """Load the model, or wait for its loader and take its place when it goes."""
    while model.is_loader or not model.wait_stage(
        model.stages, max(deadline_s - time.monotonic(), 0.0)
    ):
        if model.is_loader or model.take_over():
            began_s = time.monotonic()
            model.load(jobs(), threads)
            took_s = time.monotonic() - began_s
            log.info("weights loaded model=%s took_s=%.3f", request.model, took_s)
        elif time.monotonic() >= deadline_s:
            raise DeadlineExceeded(
                f"{request.model} is still being loaded by another process; wait for it, or see "
                "what keeps that process"
            )
