"""Evaluate a predictor on the moments of a split, through the predictor's own stages."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mtrec_ray.config import BinaryTask, RegressionTask, SimilarityTask
from mtrec_ray.evaluation import metrics as m
from mtrec_ray.predictor import EncodedHistories, Predictor
from mtrec_ray.retrieval.exact import mask_items, top_k
from mtrec_ray.training.feed import WindowCache, collate

IntArray = NDArray[np.int64]


@dataclass
class Records:
    """What was measured, moment by moment and target by target; `merge` joins what several ranks measured."""

    user: NDArray[np.object_]
    """User id of each moment."""
    retrieval: dict[str, NDArray[np.float64]]
    final: dict[str, NDArray[np.float64]]
    similarity: dict[str, NDArray[np.float64]]
    points: dict[str, m.Points]
    point_moment: IntArray
    """Moment of each target of `points`."""
    profile: dict[str, tuple[IntArray, NDArray[np.float64]]]
    """(label, probability per class) of each moment; label -1 is missing."""
    fold: IntArray
    slices: dict[str, NDArray[np.bool_]] = field(default_factory=dict)
    """Slice -> which moments belong to it."""

    @staticmethod
    def merge(parts: list[Records]) -> Records:
        def join(values: list[NDArray]) -> NDArray:  # type: ignore[type-arg]
            return np.concatenate(values)

        first = parts[0]
        starts = np.cumsum([0, *[len(p.user) for p in parts]])
        return Records(
            user=join([p.user for p in parts]),
            retrieval={n: join([p.retrieval[n] for p in parts]) for n in first.retrieval},
            final={n: join([p.final[n] for p in parts]) for n in first.final},
            similarity={n: join([p.similarity[n] for p in parts]) for n in first.similarity},
            points={
                n: m.Points(join([p.points[n].label for p in parts]), join([p.points[n].prediction for p in parts]))
                for n in first.points
            },
            point_moment=join([p.point_moment + start for p, start in zip(parts, starts, strict=False)]),
            profile={n: (join([p.profile[n][0] for p in parts]), join([p.profile[n][1] for p in parts])) for n in first.profile},
            fold=join([p.fold for p in parts]),
            slices={n: join([p.slices[n] for p in parts]) for n in first.slices},
        )


def moments_of(predictor: Predictor, cache: WindowCache, index: IntArray) -> tuple[EncodedHistories, IntArray, IntArray, IntArray]:
    """Windows of a split -> (encoded histories, flat target positions, window of each, last history item or -1)."""
    batch = collate(cache, index, predictor.schema)
    h, h_length = cache.gather("history", index)
    s, s_length = cache.gather("seen", index)
    items, older = cache.columns["history_item"][h], cache.columns["seen_item"][s]
    h_end, s_end = np.cumsum(h_length), np.cumsum(s_length)
    seen = []
    for i in range(len(index)):
        if predictor.schema.exclude_seen:
            both = [items[h_end[i] - h_length[i] : h_end[i]], older[s_end[i] - s_length[i] : s_end[i]]]
            seen.append(np.unique(np.concatenate(both)).astype(np.int64))
        else:
            seen.append(np.zeros(0, np.int64))
    last = np.array([items[e - 1] if n else -1 for e, n in zip(h_end, h_length, strict=True)], dtype=np.int64)
    t, t_length = cache.gather("target", index)
    return EncodedHistories(batch.history, seen, [[]] * len(index)), t, np.repeat(np.arange(len(index)), t_length), last


def evaluate_windows(predictor: Predictor, cache: WindowCache, index: IntArray, batch_windows: int) -> Records:
    """Records of some moments. Each is predicted from its own history, encoded afresh."""
    if not len(index):
        return _evaluate_batch(predictor, cache, index)
    pieces = np.array_split(index, max(1, -(-len(index) // batch_windows)))
    return Records.merge([_evaluate_batch(predictor, cache, piece) for piece in pieces])


def _evaluate_batch(predictor: Predictor, cache: WindowCache, index: IntArray) -> Records:
    columns, tasks = cache.columns, predictor.config.tasks
    encoded, target, row, last = moments_of(predictor, cache, index)
    B, length_B = len(index), encoded.batch.length_B
    state_BD = predictor.encode_state(encoded.batch)
    item = columns["target_item"][target].astype(np.int64)
    positive = columns["target_positive"][target].astype(bool)

    score_BN, _ = predictor.retrieval_scores(state_BD, length_B)
    score_BN = mask_items(score_BN, encoded.seen)
    relevant_row, relevant_item = m.relevant_items(row, item, positive)
    p_row, p_item = torch.from_numpy(relevant_row), torch.from_numpy(relevant_item)
    rank = m.pessimistic_rank(score_BN, p_row, p_item)
    retrieval = m.ranking_metrics(relevant_row, rank, B)
    context = {
        c.name: torch.from_numpy(columns[f"target_context_{c.name}"][target].astype(np.int64)) for c in predictor.schema.context
    }
    first_target = torch.from_numpy(np.searchsorted(row, np.arange(B)))
    moment_context = {n: v[first_target] for n, v in context.items()}
    final_rank = _final_rank(predictor, encoded, state_BD, moment_context, p_row, p_item, rank)
    predictions = predictor.score(state_BD[torch.from_numpy(row)], torch.from_numpy(item)[:, None], context)
    points = {}
    for name, task in tasks.items():
        if isinstance(task, RegressionTask | BinaryTask):
            label = columns[f"label_{task.label}"][target].astype(np.float64)
            points[name] = m.Points(label, predictions[name][:, 0].numpy().astype(np.float64))
    probability = predictor.profile_probabilities(state_BD)
    profile = {
        name: (columns[f"profile_{task.attribute}"][index].astype(np.int64), probability[name].numpy().astype(np.float64))
        for name, task in predictor.model.profiles.items()
    }
    similarity: dict[str, NDArray[np.float64]] = {}
    if any(isinstance(t, SimilarityTask) for t in tasks.values()):
        similarity = _similarity(predictor, encoded, row[positive], item[positive], last)
    trained = np.zeros(B, bool)
    np.logical_or.at(trained, row[positive], item[positive] >= predictor.schema.n_train_items)
    return Records(
        user=np.array(cache.user_ids.take(pa.array(index)).to_pylist(), dtype=object),
        retrieval=retrieval,
        final=m.ranking_metrics(relevant_row, final_rank, B),
        similarity=similarity,
        points=points,
        point_moment=row,
        profile=profile,
        fold=columns["fold"][index].astype(np.int64),
        slices={"cold_item": trained, "no_history": (length_B == 0).numpy()},
    )


def _final_rank(
    predictor: Predictor,
    encoded: EncodedHistories,
    state_BD: torch.Tensor,
    context: dict[str, torch.Tensor],
    row: torch.Tensor,
    item: torch.Tensor,
    retrieval_rank: IntArray,
) -> IntArray:
    """Ranks in the final order: a retrieved target ranks among the K candidates, all others keep their place."""
    if all(not w for n, w in predictor.final_weights.items() if n != predictor.retrieval_name):
        return retrieval_rank
    candidates = predictor.retrieve(state_BD, encoded.batch.length_B, encoded.seen, predictor.config.ranking.candidates)
    ranked = predictor.finalise(candidates, predictor.score(state_BD, candidates.item_BK, context), candidates.item_BK.shape[1])
    place = ranked.item_BK[row] == item[:, None]
    own = torch.where(place, ranked.score_BK[row], float("-inf")).amax(1)
    among = (ranked.score_BK[row] >= own[:, None]).sum(1).numpy()
    return np.where(place.any(1).numpy(), among, retrieval_rank)


def _similarity(
    predictor: Predictor, encoded: EncodedHistories, row: IntArray, item: IntArray, last: IntArray
) -> dict[str, NDArray[np.float64]]:
    """hit@10 of the target among the items most like the last history item; seen items and the query removed."""
    hit = np.full(len(last), np.nan)
    usable = np.flatnonzero(last >= 0)
    banned = [np.union1d(encoded.seen[i], last[i]) for i in usable]
    if len(usable):
        item_BK, _ = top_k(mask_items(predictor.similar_scores(last[usable]), banned), 10)
        found = np.full((len(last), item_BK.shape[1]), -2)
        found[usable] = item_BK.numpy()
        for r, i in zip(row, item, strict=True):
            if last[r] >= 0:
                hit[r] = float(np.nan_to_num(hit[r]) or i in found[r])
    return {"hit@10": hit}


def summarise(
    predictor: Predictor, records: Records, folds: tuple[int, ...], select: NDArray[np.bool_] | None = None
) -> dict[str, dict[str, float]]:
    """Records -> {task: {metric: value}}. folds: the folds whose users judge profiles."""
    keep = np.ones(len(records.user), bool) if select is None else select
    _, user = np.unique(records.user, return_inverse=True)
    point_keep = keep[records.point_moment]
    out: dict[str, dict[str, float]] = {}
    for name, task in predictor.config.tasks.items():
        if task.kind == "retrieval":
            summary = m.ranking_summary(user[keep], {n: v[keep] for n, v in records.retrieval.items()})
            final = m.ranking_summary(user[keep], {n: v[keep] for n, v in records.final.items()})
            summary |= {f"final_{n}": final[n] for n in ("ndcg@10", "hr@10") if n in final}
        elif task.kind == "similarity":
            hit = records.similarity["hit@10"][keep]
            valid = ~np.isnan(hit)
            summary = {"hit@10": float(m.user_means(user[keep], hit).mean()), "n": float(valid.sum())} if valid.any() else {}
        elif task.kind == "profile":
            label, probability = records.profile[name]
            judged = keep & (label >= 0) & np.isin(records.fold, folds)
            _, first = np.unique(records.user[judged][::-1], return_index=True)  # each user once: at the last moment
            pick = np.flatnonzero(judged)[::-1][first]
            summary = m.class_summary(label[pick], probability[pick])
        else:
            p = records.points[name]
            valid = point_keep & ~np.isnan(p.label)
            points = m.Points(p.label[valid], p.prediction[valid])
            summary = m.regression_summary(points) if task.kind == "regression" else m.binary_summary(points)
        out[name] = summary
    return out
