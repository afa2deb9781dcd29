"""Request bodies: what is accepted, what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from mtrec_ray.serving import api
from tests.conftest import TinyRun


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"user_id": "u1", "history": []},
        {"user_id": "u1", "k": 0},
        {"user_id": "u1", "k": "ten"},
        {"user_id": "u1", "k": True},
        {"user_id": "", "k": 1},
        {"user_id": "u" * 513},
        {"user_id": 7},
        {"user_id": "u1", "at": -1},
        {"user_id": "u1", "extra": 1},
        {"history": [{"item_id": "i1"}]},
        {"history": [{"item_id": "i1", "timestamp": "soon"}]},
        {"history": [{"item_id": "i1", "timestamp": 1}] * (api.MAX_EVENTS + 1)},
    ],
)
def test_a_wrong_body_is_refused(body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        api.RecommendRequest.model_validate(body)


def test_the_examples_of_the_documentation_are_accepted() -> None:
    for model in (api.RecommendRequest, api.ScoreRequest, api.SimilarRequest, api.ProfileRequest):
        for example in model.model_json_schema()["examples"]:
            model.model_validate(example)


def test_an_inline_history_is_sorted_in_time_and_counts_each_event_once(tiny_run: TinyRun) -> None:
    events = [
        api.Event(event_id="b", item_id="i2", timestamp=20, actions={"click": 1}),
        api.Event(event_id="a", item_id="i1", timestamp=10, context={"device": "web"}),
        api.Event(event_id="b", item_id="i9", timestamp=20),
        api.Event(item_id="i3", timestamp=20),
        api.Event(item_id="i3", timestamp=20),
    ]
    history = api.inline_history(events, tiny_run.predictor.schema)
    assert list(history.item_ids) == ["i1", "i2", "i3", "i3"]
    assert math.isnan(history.actions["click"][0]) and history.actions["click"][1] == 1
    assert list(history.context["device"]) == ["web", None, None, None]


@pytest.mark.parametrize("value", ["Infinity", "-Infinity", "NaN", "1e39"])
def test_an_action_that_is_no_number_for_the_model_is_refused_with_its_place(tiny_run: TinyRun, value: str) -> None:
    body = f'{{"history": [{{"item_id": "i1", "timestamp": 1, "actions": {{"rating": {value}}}}}]}}'
    request = api.RecommendRequest.model_validate(json.loads(body))  # as the web framework reads it
    assert request.history is not None
    with pytest.raises(api.BadRequestError, match=r"^history\[0\]: actions\.rating: expected a finite number"):
        api.inline_history(request.history, tiny_run.predictor.schema)


def test_an_action_that_the_log_does_not_have_is_refused_with_its_place(tiny_run: TinyRun) -> None:
    with pytest.raises(api.BadRequestError, match=r"history\[1\].*'stars'.*click"):
        api.inline_history(
            [api.Event(item_id="i1", timestamp=1), api.Event(item_id="i1", timestamp=2, actions={"stars": 5})],
            tiny_run.predictor.schema,
        )
