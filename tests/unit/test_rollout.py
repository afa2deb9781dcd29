"""A rollout against a cluster and a service that are played: what is deployed, what is told, what is taken back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests

from mtrec_ray.serving import rollout
from mtrec_ray.serving.rollout import RestoreError, RolloutError, Target, roll_out, with_bundle

OLD, NEW = "o" * 64, "n" * 64
CONFIG = {"applications": [{"name": "recommend", "deployments": [{"name": "Ingress", "user_config": {"bundle": "old"}}]}]}
Answer = tuple[str, dict[str, str]]
Play = Callable[..., tuple[Target, list[str]]]


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """-> a target whose service gives these answers in turn, the last one for ever, and the bundles that were deployed."""

    def begin(*answers: Answer | BaseException, fails: tuple[int, ...] = ()) -> tuple[Target, list[str]]:
        deployed: list[str] = []

        class Client:
            def deploy_applications(self, config: dict[str, Any]) -> None:
                deployed.append(config["applications"][0]["deployments"][0]["user_config"]["bundle"])
                if len(deployed) - 1 in fails:
                    raise requests.ConnectionError("gone")

        def told() -> Iterator[Answer | BaseException]:
            yield from answers
            while True:
                yield answers[-1]

        turn = told()

        def served(self: Target) -> Answer:
            found = next(turn)
            if isinstance(found, BaseException):
                raise found
            return found

        monkeypatch.setattr(Target, "deployed", lambda self: (Client(), CONFIG))
        monkeypatch.setattr(Target, "served", served)
        now = iter(range(10**6))
        monkeypatch.setattr(rollout.time, "monotonic", lambda: float(next(now)))
        monkeypatch.setattr(rollout.time, "sleep", lambda seconds: None)
        return Target("http://d", "http://s"), deployed

    return begin


def test_a_bundle_serves_once_it_has_answered_often_enough(play: Play) -> None:
    target, deployed = play((OLD, {}), (OLD, {}), (NEW, {}), requests.ConnectionError(), (NEW, {}))
    roll_out(target, "new", NEW)
    assert deployed == ["new"]


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([(OLD, {}), (OLD, {}), (OLD, {"new": "GoldenError: another"})], "it was refused: GoldenError"),
        ([(OLD, {})], f"still serves {OLD[:12]}"),
        ([(OLD, {}), requests.ConnectionError("nobody")], "nobody"),
    ],
)
def test_one_that_does_not_serve_is_taken_back(play: Play, answers: list[Any], says: str) -> None:
    target, deployed = play(*answers)
    with pytest.raises(RolloutError, match=says):
        roll_out(target, "new", NEW)
    assert deployed == ["new", "old"]


def test_what_was_refused_the_last_time_is_tried_again(play: Play) -> None:
    target, deployed = play(*[(OLD, {"new": "disk full"})] * 3, (NEW, {}))
    roll_out(target, "new", NEW)
    assert deployed == ["new"]
    target, deployed = play((OLD, {"new": "disk full"}))
    with pytest.raises(RolloutError, match="it was refused: disk full"):  # and not for as long as a timeout
        roll_out(target, "new", NEW)
    assert deployed == ["new", "old"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RolloutError("somebody else's answer")])
def test_a_rollout_that_is_stopped_is_taken_back(play: Play, stop: BaseException) -> None:
    target, deployed = play((OLD, {}), (OLD, {}), stop)
    with pytest.raises(type(stop)):
        roll_out(target, "new", NEW)
    assert deployed == ["new", "old"]


def test_a_dashboard_that_goes_is_one_message_and_says_what_may_serve(play: Play) -> None:
    target, deployed = play((OLD, {}), fails=(0,))
    with pytest.raises(RolloutError, match="http://d: the dashboard took no configuration: gone"):
        roll_out(target, "new", NEW)
    assert deployed == ["new", "old"]
    target, _ = play((OLD, {}), (OLD, {"new": "broken"}), fails=(1,))
    with pytest.raises(RestoreError, match=r"new may serve now. .* --rollback"):
        roll_out(target, "new", NEW)


@pytest.mark.parametrize("body", ["[]", "{}", "<html>"])
def test_a_url_of_somebody_else_is_named(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    found = requests.Response()
    found.status_code, found._content = 200, body.encode()
    monkeypatch.setattr(requests, "get", lambda *_, **__: found)
    with pytest.raises(RolloutError, match=r"http://s/versions: this is no answer of the service; correct --url"):
        Target("http://d", "http://s").served()


def test_a_service_that_does_not_answer_is_said_before_anything_is_trained(play: Play) -> None:
    target, deployed = play(requests.ConnectionError("refused"))
    with pytest.raises(RolloutError, match=r"the service does not answer \(refused\); correct --url or --token-env"):
        target.check()
    target, deployed = play(requests.ConnectionError("refused"), requests.ConnectionError("refused"), (OLD, {}))
    target.check()
    assert deployed == [] and with_bundle(CONFIG, "recommend", "x") != CONFIG
