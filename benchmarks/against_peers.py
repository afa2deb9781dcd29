"""Quality beside time and memory, here and in other systems: `python -m benchmarks.against_peers`; writes docs/peers.md.

ML-100K, leave-one-out of the main job: the same training events, valid and test moments for all. Every system is trained in its
own environment with one thread by its own loop (benchmarks/peers), tells ten items or predictions for each user's valid and
test event, and is judged by this project's metrics. Settings are tried at the first seed (SYSTEMS), the best on valid goes on
with three seeds; the epoch is chosen on valid too. Whatever learns no sequence answers test from a model that was fitted on
the valid events as well; the others read the valid event as history.

Seconds are those of the processor for one training, up to the point that was chosen; memory is the process's peak. Every
training is a file below runs/bench/against_peers, so a killed benchmark goes on with what is missing. `--page` only writes the
page from the committed results.

Value: the model of the main job's NDCG@10 over the best peer's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.environments import ONE_THREAD, SCRIPTS, environment, run_script
from benchmarks.logs import write_logs
from benchmarks.peers.common import peak_rss_mib
from benchmarks.peers_page import write_page
from benchmarks.report import RESULTS, finish
from benchmarks.timed import prepared
from mtrec_ray import storage
from mtrec_ray.config import RunConfig, load_config, parse_config
from mtrec_ray.encoders.cache import load_text_vectors
from mtrec_ray.evaluation.evaluate import MODEL, difference, evaluate_part
from mtrec_ray.evaluation.measure import FloatArray, Model, Moments, System
from mtrec_ray.evaluation.reduce import WHOLE, Summary, summarise
from mtrec_ray.evaluation.statistics import Resampler, interval
from mtrec_ray.multitask.objective import mean_gain
from mtrec_ray.predictor import Predictor
from mtrec_ray.training.worker import build_model, load_schema, mapped_windows, run_worker, tell_items

ROOT, RUN = Path("runs/bench/against_peers"), Path("runs/bench/ml100k")
SEEDS = (0, 1, 2)
METRICS = {"retrieval": "ndcg@10", "rating": "rmse", "like": "auc"}
FLAT = {"rating": 1.0, "like": 0.5}
"""Task -> what about a constant prediction reaches: the reference of the mean gain that chooses epoch and settings."""
SASREC = {"width": 64, "layers": 2, "heads": 2, "inner": 64, "window": 100, "learning_rate": 1e-3, "every": 20.0, "lists": True,
          "warm_up": False, "test": True, "precision": "32-true", "pre_norm": False}  # fmt: skip
CLICKS = {"embedding": 16, "batch": 512, "learning_rate": 1e-3, "dropout": 0.2}
Setting = Mapping[str, Any]


@dataclass(frozen=True)
class Peer:
    """One model of another system, or of this one."""

    system: str
    model: str
    script: str
    """In benchmarks/peers; `ours` for this project."""
    tasks: tuple[str, ...]
    settings: Sequence[Setting]
    fixed: Setting = field(default_factory=dict)
    """What is the same in all settings."""
    seeds: tuple[int, ...] = SEEDS

    @property
    def name(self) -> str:
        return f"{self.system}: {self.model}"


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{}]
    for name, options in values.items():
        found = [f | {name: option} for f in found for option in options]
    return found


def options(settings: Sequence[Setting], **same: Any) -> list[dict[str, Any]]:
    return [{"options": same | dict(s)} for s in settings]


LISTS, RATING, CLICK, ALL = ("retrieval",), ("rating",), ("rating", "like"), ("retrieval", "rating", "like")
ALONE = {"encoder": None, "tasks": {"retrieval": {"kind": "retrieval", "weight": 1.0}}}
SYSTEMS = [
    Peer("mtrec_ray", "main job, seven tasks", "ours", ALL, [{"config": "jobs/configs/ml100k.yaml"}]),
    Peer("mtrec_ray", "ids and retrieval alone", "ours", LISTS, [{"config": "jobs/configs/ml100k.yaml", "change": ALONE}]),
    Peer("RecTools", "SASRec", "rectools_sasrec", LISTS, grid(dropout=(0.2, 0.3)), SASREC | {"seconds": 240.0, "batch": 32}),
    Peer("RecBole", "SASRec", "recbole_sasrec", LISTS, [{"dropout": 0.3, "batch": 2048, "window": 50}],
         SASREC | {"seconds": 900.0, "every": 90.0}, (0,)),
    Peer("implicit", "ALS", "implicit_lists", LISTS,
         options(grid(factors=(32, 64, 128), regularization=(0.1, 1.0, 10.0)), alpha=1.0, iterations=15), {"model": "als"}),
    Peer("implicit", "BPR", "implicit_lists", LISTS, options(grid(factors=(63, 127), iterations=(100, 300))), {"model": "bpr"}),
    Peer("implicit", "BM25 neighbours", "implicit_lists", LISTS, options(grid(K=(50, 200), B=(0.2, 0.8))), {"model": "bm25"}, (0,)),
    Peer("Surprise", "SVD++", "surprise_ratings", RATING,
         options(grid(n_factors=(20, 50), reg_all=(0.02, 0.1)), n_epochs=30), {"model": "svdpp"}),
    Peer("Surprise", "SVD", "surprise_ratings", RATING,
         options(grid(n_factors=(50, 100), n_epochs=(20, 60), reg_all=(0.02, 0.1))), {"model": "svd"}),
    Peer("Surprise", "KNNBaseline", "surprise_ratings", RATING,
         options([{"sim_options": {"name": "pearson_baseline", "user_based": b}} for b in (False, True)]), {"model": "knn"}, (0,)),
]  # fmt: skip
for kind in ("mmoe", "ple"):
    SYSTEMS += [
        Peer("torch-rechub", kind.upper().replace("MMOE", "MMoE"), "torch_rechub_tasks", CLICK,
             options(grid(weight_decay=(1e-5, 1e-4, 1e-3)), **CLICKS), {"model": kind, "epochs": 6}),
        Peer("DeepCTR-Torch", kind.upper().replace("MMOE", "MMoE"), "deepctr_torch_tasks", CLICK,
             options(grid(l2=(1e-5, 1e-4, 1e-3)), **CLICKS), {"model": kind, "epochs": 6}),
    ]  # fmt: skip


class Told(System):
    """What a script told of the users of one split."""

    def __init__(self, users: Mapping[str, int], answers: Mapping[str, Any]) -> None:
        self.users, self.answers = users, answers

    def scores(self, moments: Moments) -> Tensor | None:
        """Listed items by their places, all others below them."""
        if "lists" not in self.answers:
            return None
        score_BN = torch.zeros(len(moments), moments.schema.n_items)
        for row, user in enumerate(moments.user_ids):
            told = self.answers["lists"][str(self.users[user])]
            score_BN[row, told] = torch.arange(len(told), 0, -1, dtype=torch.float32)
        return score_BN

    def predictions(self, moments: Moments) -> dict[str, FloatArray]:
        users = [str(self.users[u]) for u in moments.user_ids[moments.row]]
        return {t: np.array([self.answers[t][u] for u in users]) for t in ("rating", "like") if t in self.answers}


class Bench:
    """The data, and what judges every system on them."""

    def __init__(self, folder: Path) -> None:
        self.run, self.folder = prepared(RUN, ("prepare", "encode")), folder
        write_logs(self.run, folder)
        self.config = load_config("jobs/configs/ml100k.yaml")
        self.config = self.config.model_copy(update={"tasks": {n: self.config.tasks[n] for n in METRICS}})
        self.data = storage.Directory(self.run / "data")
        self.caches = {split: mapped_windows(self.data.prefix, split) for split in ("valid", "test")}
        self.users = {u: place for place, u in enumerate(self.caches["valid"].user_ids.to_pylist())}
        self.judge = predictor_of(self.config, self.run, None)
        self.resampler = Resampler(self.config.evaluation.bootstrap, self.config.evaluation.seed)

    def judged(self, system: System, split: str) -> Summary:
        """Metrics of a system, in every resample of users."""
        found = evaluate_part({MODEL: system}, self.judge, self.caches[split], set(), self.resampler, ())[MODEL][WHOLE]
        return summarise(found, dict(self.config.tasks), self.resampler)

    def of(self, summary: Summary, tasks: Sequence[str]) -> dict[str, list[float]]:
        return {t: [float(f"{v:.7g}") for v in summary[t][METRICS[t]]] for t in tasks}


def predictor_of(config: RunConfig, run: Path, state: dict[str, Tensor] | None) -> Predictor:
    data, text = storage.Directory(run / "data"), storage.Directory(run / "text")
    schema, catalogue = load_schema(data.prefix), storage.read_table(data.path("catalogue.parquet"))
    model = build_model(config, schema, None if config.encoder is None else load_text_vectors(text.prefix, catalogue))
    tell_items(model, catalogue)
    if state is not None:
        model.load_state_dict(state)
    with torch.no_grad():
        return Predictor(config, schema, catalogue, model, model.eval().item_vectors(), "benchmark")


def own_config(setting: Setting, seed: int) -> RunConfig:
    raw = load_config(setting["config"], [f"seed={seed}"]).model_dump(mode="json") | setting.get("change", {})
    raw["train"] |= {"workers": 0}
    return parse_config(raw)


def train_own(setting: Setting, seed: int, out: Path) -> None:
    """One training of this project in this process -> the weights of its best epoch, and what it cost."""
    torch.set_num_threads(1)
    config = own_config(setting, seed)
    data, text = storage.Directory(RUN / "data"), storage.Directory(RUN / "text")
    begun, ended = (time.process_time(), time.perf_counter()), []
    fitted = run_worker(config, data.prefix, None if config.encoder is None else text.prefix,
                        lambda *_: ended.append((time.process_time(), time.perf_counter())))  # fmt: skip
    processor, wall = (b - a for a, b in zip(begun, ended[fitted.best_epoch], strict=True))
    cost = {"seconds": processor, "wall": wall, "peak_rss_mib": peak_rss_mib()}
    torch.save({"state": fitted.best_state, "cost": cost | {"point": fitted.best_epoch + 1, "points": len(ended)}}, out)


def answered(bench: Bench, peer: Peer, setting: Setting, seed: int) -> list[tuple[dict[str, Any], dict[str, System]]]:
    """One training -> its points along the way: (what it cost, split -> what it answers)."""
    if peer.script == "ours":
        out = bench.folder / "own.pt"
        command = [sys.executable, "-m", "benchmarks.against_peers", "--child", json.dumps([dict(setting), seed, str(out)])]
        subprocess.run(command, env=os.environ | ONE_THREAD, check=True)
        found = torch.load(out, weights_only=True)
        own = Model(predictor_of(own_config(setting, seed), bench.run, found["state"]))
        return [(found["cost"], {"valid": own, "test": own})]
    sizes = {"users": len(bench.users), "items": bench.judge.schema.n_items, "folder": str(bench.folder), "seed": seed}
    settings = dict(peer.fixed) | dict(setting) | sizes
    package = {"implicit_lists": "implicit", "surprise_ratings": "surprise"}.get(peer.script, peer.script.rpartition("_")[0])
    told = run_script(peer.name, [environment(package), str(SCRIPTS.absolute() / f"{peer.script}.py"), json.dumps(settings)],
                      str(bench.folder))  # fmt: skip
    told = [p for p in told if p["valid"] is not None]
    return [
        ({k: p[k] for k in ("seconds", "wall", "peak_rss_mib")} | {"point": n + 1, "points": len(told)},
         {split: Told(bench.users, p[split]) for split in ("valid", "test")})
        for n, p in enumerate(told)
    ]  # fmt: skip


def gain(peer: Peer, values: Mapping[str, float]) -> float:
    """What settings and epochs are chosen by: the one metric, or the mean gain over a constant prediction."""
    if peer.tasks[0] == "retrieval":
        return values["retrieval"]
    return mean_gain(dict(values), FLAT, {t: METRICS[t] for t in peer.tasks}) or 0.0


def trained(bench: Bench, peer: Peer, setting: Setting, seed: int) -> dict[str, Any]:
    """One training, at the point that is best on valid; read from its file where it was done."""
    key = {"setting": dict(setting), "fixed": dict(peer.fixed), "seed": seed, "data": bench.data.prefix, "peer": peer.name}
    path = ROOT / f"{storage.fingerprint(key)[:20]}.json"
    if path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    best: tuple[float, dict[str, Any], dict[str, Any], dict[str, System]] | None = None
    for cost, systems in answered(bench, peer, setting, seed):
        valid = {t: v[0] for t, v in bench.of(bench.judged(systems["valid"], "valid"), peer.tasks).items()}
        if best is None or gain(peer, valid) > best[0]:
            best = gain(peer, valid), cost, valid, systems
    assert best is not None, f"{peer.name} told nothing"
    found: dict[str, Any] = {"setting": dict(setting), "seed": seed, "gain": best[0], "cost": best[1], "valid": best[2],
             "test": bench.of(bench.judged(best[3]["test"], "test"), peer.tasks)}  # fmt: skip
    ROOT.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".draft").write_text(json.dumps(found), encoding="utf-8")
    path.with_suffix(".draft").rename(path)
    values = {t: round(v[0], 4) for t, v in found["test"].items()}
    print(f"{peer.name}, {dict(setting)}, seed {seed}: {found['valid']} -> {values}, {best[1]['seconds']:.0f} s", flush=True)
    return found


def row(peer: Peer, tried: Sequence[Mapping[str, Any]], seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is told of a peer. Metrics and their resamples are means over the seeds."""
    whole = {t: np.mean([s["test"][t] for s in seeds], axis=0) for t in peer.tasks}
    test = {t: {"mean": float(v[0]), "seeds": [s["test"][t][0] for s in seeds], "interval": interval(v)} for t, v in whole.items()}
    costs = {k: [s["cost"][k] for s in seeds] for k in ("seconds", "wall", "peak_rss_mib", "point", "points")}
    return {
        "system": peer.system, "model": peer.model, "tasks": list(peer.tasks), "settings_tried": len(tried), "seeds": len(seeds),
        "setting": dict(peer.fixed) | dict(seeds[0]["setting"]), "cost": costs,
        "seconds_of_all_settings": sum(t["cost"]["seconds"] for t in tried),
        "test": test,
        "valid": {t: [s["valid"][t] for s in seeds] for t in peer.tasks},
    }  # fmt: skip


def measure(bench: Bench, wanted: Sequence[tuple[Peer, int]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Peers with so many seeds at most -> (rows, errors). The others are compared with the first, paired over users."""
    rows, errors, own = [], [], dict[str, FloatArray]()
    for peer, most in wanted:
        try:
            tried = [trained(bench, peer, setting, peer.seeds[0]) for setting in peer.settings]
            best = max(tried, key=lambda found: float(found["gain"]))
            seeds = [best, *[trained(bench, peer, best["setting"], seed) for seed in peer.seeds[1:most]]]
        except (RuntimeError, subprocess.CalledProcessError) as error:  # the others go on
            errors.append(f"{peer.name}: {error}")
            print(errors[-1], file=sys.stderr, flush=True)
            continue
        found = row(peer, tried, seeds)
        whole = {t: np.mean([s["test"][t] for s in seeds], axis=0) for t in peer.tasks}
        if peer is SYSTEMS[0]:
            own = whole
        else:
            found["ours_minus_this"] = {t: difference(own[t], v) for t, v in whole.items() if t in own}
        rows.append(found)
    return rows, errors


def kept(there: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the committed result for the systems that are not measured now."""
    path = RESULTS / "against_peers.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["detail"]["rows"] if path.exists() else []
    return [r for r in rows if r["system"] + r["model"] not in there]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_peers")
    parser.add_argument("--only", help="systems by comma; the others' rows are kept")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="at most; what was trained before is not trained again")
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page from the committed results")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        setting, seed, out = args.child
        train_own(setting, seed, Path(out))
        return 0
    if args.page:
        write_page()
        return 0
    started = time.perf_counter()
    only = {p.system for p in SYSTEMS} if args.only is None else {*args.only.split(",")}
    wanted = [(p, args.seeds if p.system in only else 1) for p in SYSTEMS if p.system in only or p is SYSTEMS[0]]
    with tempfile.TemporaryDirectory() as name:
        rows, errors = measure(Bench(Path(name)), wanted)
    if not rows or rows[0]["model"] != SYSTEMS[0].model:
        return 2  # there is nothing to compare with; why was said
    rows = [*rows, *kept([r["system"] + r["model"] for r in rows])] if args.only else rows
    rows.sort(key=lambda r: [(p.system, p.model) for p in SYSTEMS].index((r["system"], r["model"])))
    lists = {r["system"] + ": " + r["model"]: r["test"]["retrieval"]["mean"] for r in rows if "retrieval" in r["tasks"]}
    own = lists[SYSTEMS[0].name]
    best = max((v for n, v in lists.items() if not n.startswith(SYSTEMS[0].system)), default=float("nan"))
    detail = {"rows": rows, "errors": errors, "minutes": (time.perf_counter() - started) / 60}
    code = finish("against_peers", own / best, "NDCG@10 over the best peer's", "told, whoever is better", not errors, detail)
    write_page()
    return code


if __name__ == "__main__":
    sys.exit(main())
