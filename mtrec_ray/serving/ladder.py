"""What is done when a stage fails, is slow, or has too much to do. The rungs are told in docs/serving.md."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from mtrec_ray.encoders.loading import EncoderError
from mtrec_ray.features import FeatureError
from mtrec_ray.predictor import FilterError, UnknownItemError
from mtrec_ray.serving.stages import MixedBundlesError
from mtrec_ray.serving.store import StoreError
from mtrec_ray.serving.work import DeadlineError

STORE_DOWN, STATE_CACHED, STATE_DOWN = "history_store_down", "state_cached", "state_encoder_down"
RETRIEVAL_DOWN, HEADS_DOWN = "retrieval_down", "heads_down"

log = logging.getLogger("ray.serve")


class StageDownError(RuntimeError):
    """A stage that does not answer."""

    def __init__(self, stage: str, reason: BaseException) -> None:
        super().__init__(f"{stage}: {type(reason).__name__}")
        self.stage, self.reason = stage, reason


THE_CALLERS = (FilterError, UnknownItemError, FeatureError, EncoderError, MixedBundlesError)
"""Errors that are no failure of a stage: the request is told."""
_GONE = (RayActorError, ActorUnavailableError)


async def call(stage: str, ask: Callable[[], Any], until: float, share: float = 1.0) -> Any:
    """What a stage answers, within a share of the time that is left; a replica that dies is asked once more elsewhere.

    ask: starts a request. until: seconds of time.time(). Raises StageDownError, and the caller's own errors.
    """
    latest = time.time() + share * max(until - time.time(), 0.0)
    for attempt in (1, 2):
        response = ask()
        try:
            async with asyncio.timeout(max(latest - time.time(), 1e-3)):
                return await _awaited(response)
        except THE_CALLERS:
            raise
        except _GONE as error:
            if attempt == 2:
                raise StageDownError(stage, error) from error
        except (TimeoutError, DeadlineError, BackPressureError, DeploymentUnavailableError, StoreError) as error:
            raise StageDownError(stage, error) from error
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("stage failed", extra={"stage": stage})
            raise StageDownError(stage, error) from error
    raise AssertionError("unreachable")


async def _awaited(response: Any) -> Any:
    try:
        return await response
    except asyncio.CancelledError:
        cancel = getattr(response, "cancel", None)  # so that the replica does not go on with it
        if cancel is not None:
            cancel()
        raise
