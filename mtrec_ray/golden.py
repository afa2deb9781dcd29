"""Golden requests: questions with their answers that a bundle carries, so that whoever loads it can prove that it answers as it
did where it was made. They are drawn from the catalogue; no user's history is among them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mtrec_ray.histories import History
from mtrec_ray.predictor import Predictor

REQUESTS, K = 8, 10
FROM = 200
"""Histories are drawn from so many of the most popular items."""
TOLERANCE = 1e-3
"""Of a score, times max(1, |score|): processors and versions of libraries add up in other orders; another model is far off."""


class GoldenError(ValueError):
    """A predictor that does not answer as its bundle did when it was made."""


def histories(predictor: Predictor) -> list[History]:
    """One empty, the others of growing length; actions and context are missing."""
    popular = np.argsort(-predictor.popularity_N.numpy(), kind="stable")[:FROM]
    rng, capacity = np.random.default_rng(0), predictor.schema.window - 1
    out = [History()]
    for length in np.linspace(1, capacity, REQUESTS - 1).round().astype(int).tolist():
        items = [predictor.item_ids[i] for i in rng.choice(popular, length)]
        out.append(History(items, [1_600_000_000_000 + 60_000 * n for n in range(length)]))
    return out


def make(predictor: Predictor) -> dict[str, Any]:
    """What `check` reads; empty for a bundle that ranks nothing."""
    if predictor.retrieval_name is None:
        return {"requests": []}
    asked = histories(predictor)
    answers = [plain(a) for a in predictor.recommend(asked, K)]
    if not all(np.isfinite([i["score"], *i["tasks"].values()]).all() for a in answers for i in a):
        return {"requests": [], "broken": "scores contain NaN or infinity: the model is broken"}  # evaluation says so too
    return {
        "requests": [
            {"item_ids": list(h.item_ids), "times": list(h.times), "answer": a} for h, a in zip(asked, answers, strict=True)
        ]
    }


def plain(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"item_id": i["item_id"], "score": i["score"], "tasks": i["tasks"]} for i in answer["items"]]


def asked(golden: dict[str, Any]) -> list[History]:
    return [History(r["item_ids"], r["times"]) for r in golden["requests"]]


def check(predictor: Predictor, golden: dict[str, Any]) -> None:
    """Ask again. Raises GoldenError."""
    if "broken" in golden:
        raise GoldenError(golden["broken"])
    if golden["requests"]:
        compare(golden, [plain(a) for a in predictor.recommend(asked(golden), K)])


def compare(golden: dict[str, Any], answers: list[list[dict[str, Any]]]) -> None:
    """Answers given to the golden requests against those kept. Raises GoldenError."""
    for number, (request, answer) in enumerate(zip(golden["requests"], answers, strict=True)):
        expected = request["answer"]
        if len(answer) != len(expected):
            raise GoldenError(f"golden request {number}: {len(answer)} items, {len(expected)} expected")
        known = {e["item_id"]: e for e in expected}
        for place, (found, kept) in enumerate(zip(answer, expected, strict=True)):
            # among equal scores the order may be another one
            same = known.get(found["item_id"], {"score": found["score"], "tasks": found["tasks"]})
            pairs = [(found["score"], kept["score"]), *((found["tasks"][t], v) for t, v in same["tasks"].items())]
            if not all(_close(a, b) for a, b in pairs):
                raise GoldenError(
                    f"golden request {number}, place {place + 1}: item {found['item_id']!r} with {found['score']:.6g}, "
                    f"expected {kept['item_id']!r} with {kept['score']:.6g}"
                )


def _close(a: float, b: float) -> bool:
    return bool(abs(a - b) <= TOLERANCE * max(1.0, abs(a), abs(b)))
