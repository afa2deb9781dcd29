"""The HTTP application and what it answers to errors. The endpoints are the ingress's (serving/ingress.py)."""

from __future__ import annotations

import json

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.serve.exceptions import BackPressureError

from mtrec_ray.encoders.loading import EncoderError
from mtrec_ray.predictor import FilterError, UnknownItemError
from mtrec_ray.serving import api
from mtrec_ray.serving.guard import Guarded
from mtrec_ray.serving.items import ItemError
from mtrec_ray.serving.ladder import StageDownError
from mtrec_ray.serving.stages import MixedBundlesError
from mtrec_ray.serving.store import EventError, StoreError
from mtrec_ray.serving.work import DeadlineError

http = FastAPI(
    title="mtrec_ray",
    description="Recommendations, scores, similar items and profiles from one multi-task model. Times are milliseconds UTC.",
    version="1",
)
http.add_middleware(Guarded)


@http.exception_handler(RequestValidationError)
async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
    """Where and why, without what was sent: it may be no number, and it may be somebody's text."""
    detail = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in error.errors()[:20]]
    return JSONResponse({"detail": json.loads(json.dumps(detail, default=str))}, status_code=422)


@http.exception_handler(UnknownItemError)
async def _unknown_item(request: Request, error: UnknownItemError) -> JSONResponse:
    return JSONResponse({"detail": str(error), "item_id": error.item_id}, status_code=404)


@http.exception_handler(api.BadRequestError)
@http.exception_handler(EventError)
@http.exception_handler(ItemError)
@http.exception_handler(FilterError)
async def _bad_request(request: Request, error: ValueError) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=422)


@http.exception_handler(EncoderError)
async def _no_encoder(request: Request, error: EncoderError) -> JSONResponse:
    return JSONResponse({"detail": f"this service cannot read texts: {error}"}, status_code=501)


@http.exception_handler(StoreError)
async def _store_down(request: Request, error: StoreError) -> JSONResponse:
    """What cannot be kept is not acknowledged."""
    detail = "the store cannot be reached; send this again (an event_id counts once)"
    return JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": "1"})


@http.exception_handler(MixedBundlesError)
async def _mixed_bundles(request: Request, error: MixedBundlesError) -> JSONResponse:
    detail = "a rollout is under way: stages have different bundles; try again"
    return JSONResponse({"detail": detail}, status_code=503, headers={"Retry-After": "1"})


@http.exception_handler(StageDownError)
async def _stage_down(request: Request, error: StageDownError) -> JSONResponse:
    """Nothing stands in for this answer."""
    if isinstance(error.reason, BackPressureError):
        return JSONResponse({"detail": f"{error.stage} has too much to do"}, status_code=429, headers={"Retry-After": "1"})
    if isinstance(error.reason, TimeoutError | DeadlineError):
        return JSONResponse({"detail": f"{error.stage} did not answer before the deadline"}, status_code=504)
    return JSONResponse({"detail": f"{error.stage} does not answer"}, status_code=503, headers={"Retry-After": "1"})
