"""report.html: one self-contained page about a run, readable by someone who does not know the metrics.

Everything on it comes from the run's own files. Needs the extra `report` (matplotlib, jinja2).
"""

from __future__ import annotations

import io
import logging
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mtrec_ray import bundle, storage
from mtrec_ray.evaluation import figures as f
from mtrec_ray.evaluation.metrics import LOWER_IS_BETTER
from mtrec_ray.evaluation.statistics import interval
from mtrec_ray.predictor import Predictor
from mtrec_ray.tasks import judges_of

TEMPLATE = Path(__file__).with_name("report.html.jinja")
PROTOCOLS = {
    "time": "the model was trained on the past and judged on the future",
    "leave_one_out": "each user's last item was hidden; training saw other users' later events, so time leaks",
    "user_holdout": "judged on users whose events were never trained on; time leaks between users",
    "item_holdout": "judged on items that training never saw; time leaks",
    "random": "judged on events hidden at random; the user's later events are known, so time leaks",
}
SPLITS = ("train", "valid", "test")
EXAMPLES, NEAREST = 6, 5


def write_report(run: str, data: str | None = None) -> str:
    """Write RUN/report.html -> its path. data: where its prepared data are, if not in RUN/data. Raises StorageError when the run
    has not been evaluated."""
    from jinja2 import Environment, FileSystemLoader, select_autoescape

    page = _Page(run, data or storage.join(run, "data"))
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=select_autoescape(["jinja"]))
    out = storage.join(run, "report.html")
    storage.write_bytes(out, environment.get_template(TEMPLATE.name).render(**page.content()).encode())
    return out


class _Page:
    """Collects what the template shows."""

    def __init__(self, run: str, data: str) -> None:
        self.run = run
        self.data, self.evaluation = storage.Directory(data), storage.Directory(storage.join(run, "evaluation"))
        self.metrics: dict[str, Any] = storage.read_json(self.evaluation.path("metrics.json"))
        with np.load(io.BytesIO(storage.read_bytes(self.evaluation.path("curves.npz")))) as curves:
            self.curves = {n: curves[n] for n in curves.files}
        with np.load(io.BytesIO(storage.read_bytes(self.evaluation.path("resamples.npz")))) as resamples:
            self.resamples = {n: resamples[n] for n in resamples.files}
        self.predictor: Predictor = bundle.load(storage.join(run, "bundle"))
        self.catalogue = storage.read_table(self.data.path("catalogue.parquet"))
        self.mains = {n: judge.main for n, judge in judges_of(self.predictor.config.tasks).items()}
        self.retrieval = self.predictor.retrieval_name
        self.splits = {s: _SplitFacts(self.data, s, self.predictor) for s in SPLITS}

    def content(self) -> dict[str, Any]:
        from markupsafe import Markup

        similar, mean = self.similar()
        column = next(iter(self.predictor.config.data.text.columns[-1:]), "") if self.predictor.config.data.text else ""
        pictures = {
            "ranking": f.dots(self.ranking_dots(), "NDCG@10") if self.retrieval is not None else "",
            "slices": f.dots(self.slice_dots(), "NDCG@10") if self.retrieval is not None else "",
            "calibration": self.calibration(),
            "confusion": self.confusion(),
            "activity": self.activity(),
            "popularity": f.popularity(self.catalogue["count"].to_numpy().astype(float)),
            "training": self.training(),
        }
        tables = {
            "ranking": "" if self.retrieval is None else self.ranking_table(), "tasks": self.task_table(),
            "data": self.data_table(), "drift": self.drift_table(),
            "dropped": self.dropped_table(), "slices": self.slice_table(),
        }  # fmt: skip
        return {
            "name": self.predictor.config.name,
            "protocol": self.metrics["protocol"],
            "protocol_words": PROTOCOLS[self.metrics["protocol"]],
            "bundle": self.metrics["bundle"],
            "date": datetime.now(UTC).date().isoformat(),
            "exclude_seen": self.metrics["exclude_seen"],
            "tiles": self.tiles(),
            "sentences": self.sentences(),
            "figures": {n: Markup(svg) for n, svg in pictures.items()},
            "tables": {n: Markup(table) for n, table in tables.items()},
            "similar": similar,
            "similar_mean": mean,
            "similar_column": column,
        }

    # -- what was measured

    def value(self, task: str | None, metric: str, system: str = "model") -> float | None:
        found = self.metrics["model"] if system == "model" else self.metrics["baselines"].get(system, {})
        value = found.get(task, {}).get(metric)
        return None if value is None else float(value)

    def ends(self, task: str | None, metric: str, system: str = "model") -> tuple[float, float] | None:
        found = self.metrics["intervals"] if system == "model" else self.metrics["baseline_intervals"].get(system, {})
        ends = found.get(task, {}).get(metric)
        return None if ends is None else (float(ends[0]), float(ends[1]))

    def rankers(self) -> list[str]:
        names = [n for n in self.metrics["baselines"] if self.value(self.retrieval, "ndcg@10", n) is not None]
        return sorted(names, key=lambda n: -(self.value(self.retrieval, "ndcg@10", n) or 0))

    def best_baseline(self, task: str, metric: str) -> str | None:
        names = [n for n in self.metrics["baselines"] if self.value(task, metric, n) is not None]
        sign = 1 if metric in LOWER_IS_BETTER else -1
        return min(names, key=lambda n: sign * (self.value(task, metric, n) or 0), default=None)

    def tiles(self) -> list[dict[str, str]]:
        out = []
        for task, metric in self.mains.items():
            value = self.value(task, metric)
            if value is not None:
                out.append({"value": f"{value:.3f}", "words": f"{task}: {metric}"})
        return out

    def sentences(self) -> list[str]:
        rows = self.metrics.get("rows", {}).get("data") or self.data.manifest["rows"]
        out = [
            f"{rows['events']:,} events of {rows['users']:,} users on {len(self.catalogue):,} items; "
            f"{rows['test_targets']:,} of them were kept for the test."
        ]
        hit = self.value(self.retrieval, "hr@10")
        if hit is not None:
            out.append(f"On average, {hit:.0%} of the lists of ten items contain something that the user then chose.")
        c = self.metrics["comparison"]
        if c and c["low"] is not None:
            sure = "better than" if c["low"] > 0 else "worse than" if c["high"] < 0 else "not clearly different from"
            out.append(
                f"In ranking (NDCG@10) the model is {sure} {c['baseline']}, the best baseline: {c['difference']:+.4f}, "
                f"95 % interval {c['low']:+.4f} to {c['high']:+.4f}."
            )
        weak = []
        for task, metric in self.mains.items():
            best, mine = self.best_baseline(task, metric), self.value(task, metric)
            if task != self.retrieval and best is not None and mine is not None:
                theirs = self.value(task, metric, best) or 0.0
                if (mine > theirs) == (metric in LOWER_IS_BETTER) and mine != theirs:
                    weak.append(f"{task} ({metric} {mine:.3f} against {theirs:.3f} of {best})")
        if weak:
            out.append("A simpler method does better at: " + "; ".join(weak) + ".")
        out += [f"{task} is not measured: {why}." for task, why in self.metrics["unmeasured"].items()]
        return out

    def ranking_dots(self) -> list[f.Dot]:
        systems = ["model", *self.rankers()]
        rows = [
            (n, self.value(self.retrieval, "ndcg@10", n), self.ends(self.retrieval, "ndcg@10", n), n == "model") for n in systems
        ]
        return [(n, v, e, own) for n, v, e, own in rows if v is not None]

    def ranking_table(self) -> str:
        names = (
            "ndcg@10",
            "hr@10",
            "recall@20",
            "precision@10",
            "mrr",
            "map",
            "coverage@10",
            "novelty@10",
            "diversity@10",
            "gini@10",
        )
        rows = []
        for system in ("model", *self.rankers()):
            values = [self.value(self.retrieval, n, system) for n in names]
            rows.append([system, *["–" if v is None else f"{v:.3f}" for v in values]])
        return f.html_table(["", *names], rows, own=0)

    def task_table(self) -> str:
        rows = []
        for task, found in self.metrics["model"].items():
            if task == self.retrieval:
                continue
            for metric, value in found.items():
                if metric == "n":
                    continue
                ends, best = self.ends(task, metric), self.best_baseline(task, metric)
                shown = "" if ends is None else f"[{ends[0]:.3f}, {ends[1]:.3f}]"
                beside = "" if best is None else f"{best} {self.value(task, metric, best):.3f}"
                rows.append([task, metric, f"{value:.3f}", shown, beside])
        return f.html_table(["task", "metric", "model", "95 % interval", "best baseline"], rows)

    def slice_dots(self) -> list[f.Dot]:
        out: list[f.Dot] = []
        for name in ["all", *sorted(self.metrics["slices"], key=_slice_order)]:
            values = self.resamples.get(f"{name}|{self.retrieval}|ndcg@10")
            attribute = _slice_order(name)[0] == 2
            if values is None or (attribute and len(self.metrics["slices"]) > 60):
                continue
            moments = self.metrics["slices"].get(name, self.metrics["model"].get(self.retrieval, {})).get("moments", 0)
            out.append((f"{name}  ({moments:,.0f})", float(values[0]), interval(values), name == "all"))
        return out

    def slice_table(self) -> str:
        """The main metric of every task on every slice."""
        shown = [(t, metric) for t, metric in self.mains.items() if self.value(t, metric) is not None]
        found = {"all": self.metrics["model"], **self.metrics["slices"]}
        rows = []
        for name in ["all", *sorted(self.metrics["slices"], key=_slice_order)]:
            values = [found[name].get(t, {}).get(metric) for t, metric in shown]
            if any(v is not None for v in values):
                rows.append([name, *["–" if v is None else f"{v:.3f}" for v in values]])
        return f.html_table(["", *[f"{t} {metric}" for t, metric in shown]], rows, own=0)

    def calibration(self) -> str:
        found = {t: self.curves.get(f"model|{t}|calibration") for t in self.mains}
        curves = {t: curve for t, curve in found.items() if curve is not None and curve[:, 0].any()}
        return f.calibration(curves) if curves else ""

    def confusion(self) -> str:
        tables = {}
        for name, task in self.predictor.model.profiles.items():
            counts = self.curves.get(f"model|{name}|confusion")
            if counts is not None and task.key not in self.predictor.schema.sensitive:
                tables[name] = (counts, task.classes)
        return f.confusion(tables) if tables else ""

    def similar(self) -> tuple[list[dict[str, Any]], str]:
        """Nearest items of popular items, with the overlap of the last text column's words, and the overlap's mean beside
        that of random pairs."""
        text = self.predictor.config.data.text
        if self.predictor.model.similarity is None:
            return [], ""
        words = [frozenset[str]()] * len(self.catalogue)
        if text is not None and text.columns:
            words = [frozenset(re.split(r"[\s|,;]+", v or "")) - {""} for v in self.catalogue[text.columns[-1]].to_pylist()]
        place = self.predictor.position
        blocks = []
        for item in np.argsort(-self.catalogue["count"].to_numpy(), kind="stable")[:EXAMPLES]:
            found = self.predictor.similar(self.predictor.item_ids[item], NEAREST)
            rows = [
                {"title": r["title"], "score": f"{r['score']:.2f}", "overlap": _overlap(words[item], words[place[r["item_id"]]])}
                for r in found
            ]
            blocks.append({"title": self.predictor.titles[item], "rows": rows})
        if not any(words):
            return blocks, ""
        rng = np.random.default_rng(0)
        trained = np.arange(min(self.predictor.schema.n_train_items, 500))
        near = [
            _jaccard(words[i], words[place[r["item_id"]]])
            for i in trained
            for r in self.predictor.similar(self.predictor.item_ids[i], NEAREST)
        ]
        far = [_jaccard(words[i], words[j]) for i, j in rng.integers(0, len(trained), (2000, 2))]
        return (
            blocks,
            f"Over {len(trained)} items, the nearest share {np.mean(near):.0%} of these words, random pairs {np.mean(far):.0%}.",
        )

    # -- the data

    def data_table(self) -> str:
        rows = []
        for name, split in self.splits.items():
            density = split.events / max(split.users * split.items, 1)
            labels = [f"{v:.3f}" for v in split.labels.values()]
            rows.append([name, f"{split.events:,}", f"{split.users:,}", f"{split.items:,}", f"{density:.2%}", *labels])
        header = ["", "events", "users", "items", "of all pairs", *[f"mean {n}" for n in self.splits["train"].labels]]
        return f.html_table(header, rows)

    def activity(self) -> str:
        days = sorted({d for s in self.splits.values() for d in s.days})
        counts = {n: np.array([s.days.get(d, 0) for d in days], dtype=np.int64) for n, s in self.splits.items()}
        return f.activity(np.array(days, dtype=np.int64), counts)

    def drift_table(self) -> str:
        train, test = self.splits["train"], self.splits["test"]
        total = max(test.item_count.sum(), 1)
        a, b = train.item_count / max(train.item_count.sum(), 1), test.item_count / total
        trained = self.predictor.schema.n_train_items
        rows = [
            ["test events on items without a training event", f"{test.item_count[trained:].sum() / total:.1%}"],
            ["test users without a training event", f"{len(test.user_ids - train.user_ids) / max(test.users, 1):.1%}"],
            ["distance of item popularity, train to test (total variation, 0 same, 1 disjoint)", f"{np.abs(a - b).sum() / 2:.2f}"],
        ]
        for name in train.labels:
            rows.append([f"mean {name}, train → test", f"{train.labels[name]:.3f} → {test.labels[name]:.3f}"])
        return f.html_table(["", ""], rows)

    def dropped_table(self) -> str:
        rows = self.data.manifest["rows"]
        out = [["rows read", f"{rows['read']:,}", ""], ["events kept", f"{rows['events']:,}", ""]]
        out += [["quarantined", f"{n:,}", why] for why, n in rows["reasons"].items()]
        out.append(["users without attributes", f"{rows['users_without_attributes']:,}", "they train everything but profiles"])
        training = (storage.Directory(storage.join(self.run, "train")).manifest)["training"]
        out.append(
            ["windows dropped in training", f"{training['rows_dropped']:,}", f"of {training['rows_read']:,} read over all epochs"]
        )
        out += [[f"baseline {n}", "skipped", why] for n, why in self.metrics["skipped"].items()]
        out += [[f"task {n}", "not measured", why] for n, why in self.metrics["unmeasured"].items()]
        return f.html_table(["what", "how many", "why"], out)

    def training(self) -> str:
        """Losses per epoch from TensorBoard's files; nothing where there are none."""
        folder = storage.join(storage.absolute(self.run), "train", "tensorboard")
        if not storage.is_local(folder) or not Path(folder).is_dir():
            return ""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it tells every file that it has read to its end
        newest = max(Path(folder).iterdir(), key=lambda p: p.stat().st_mtime, default=None)
        if newest is None:
            return ""
        events = EventAccumulator(str(newest))
        events.Reload()
        tags = set(events.Tags()["scalars"])
        losses = {t: [e.value for e in events.Scalars(f"train/{t}/loss")] for t in self.mains if f"train/{t}/loss" in tags}
        monitor = self.predictor.config.train.monitor
        if not losses or f"valid/{monitor}" not in tags:
            return ""
        watched = events.Scalars(f"valid/{monitor}")
        return f.training(losses, monitor, ([e.step for e in watched], [e.value for e in watched]))


class _SplitFacts:
    """Counts of one split, part by part."""

    def __init__(self, data: storage.Directory, split: str, predictor: Predictor) -> None:
        self.events, self.days, self.user_ids = 0, dict[int, int](), set[str]()
        self.item_count: NDArray[np.float64] = np.zeros(predictor.schema.n_items)
        names = [n for n in predictor.schema.labels if n not in predictor.schema.sensitive]
        sums: dict[str, NDArray[np.float64]] = {n: np.zeros(2) for n in names}
        columns = ["user_id", "target_item", "target_time", *[f"label_{n}" for n in names]]
        for part in storage.list_uris(data.path("windows", split), ".parquet"):
            table = storage.read_table(part, columns)
            has = pc.greater(pc.list_value_length(table["target_item"]), 0)
            self.user_ids |= set(table["user_id"].filter(has).to_pylist())
            item, time = (_flat(table[c]) for c in ("target_item", "target_time"))
            self.events += len(item)
            self.item_count += np.bincount(item, minlength=len(self.item_count))
            for day, count in zip(*np.unique(time // 86_400_000, return_counts=True), strict=True):
                self.days[int(day)] = self.days.get(int(day), 0) + int(count)
            for n in names:
                label = _flat(table[f"label_{n}"]).astype(np.float64)
                sums[n] += (np.nansum(label), (~np.isnan(label)).sum())
        self.users, self.items = len(self.user_ids), int((self.item_count > 0).sum())
        self.labels = {n: float(t / c) if c else float("nan") for n, (t, c) in sums.items()}


def _slice_order(name: str) -> tuple[int, str, float, str]:
    """Users and items first, then history length and popularity by number, then attributes."""
    kind, _, value = name.partition("=")
    number = re.match(r"\d+", value)
    place = 0 if not value else 1 if kind in ("history", "popularity_decile") else 2
    return place, kind, float(number[0]) if number and place == 1 else 0.0, value


def _flat(column: pa.ChunkedArray) -> NDArray[Any]:
    return np.asarray(column.combine_chunks().flatten().to_numpy(zero_copy_only=False))


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(len(a | b), 1)


def _overlap(a: frozenset[str], b: frozenset[str]) -> str:
    return f"{_jaccard(a, b):.0%}" if a | b else ""
