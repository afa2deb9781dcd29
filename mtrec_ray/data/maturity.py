"""Labels that take time to come: the targets of a log's last hours may not have theirs yet.

An impression without a purchase teaches nothing while the purchase may still come. Targets that are younger than
`maturity_hours` at the log's end have the label masked, whatever it is: masking only those without a purchase would
teach that everybody buys. The history shows the label as it is, since at any time it showed what was observed by then.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtrec_ray.config import DataConfig
from mtrec_ray.expressions import Expression

HOUR_MS = 3_600_000


def maturity_hours(data: DataConfig) -> dict[str, float]:
    """Label -> hours, of those that must mature: a derived label as long as the slowest label that it reads."""
    own = {n: label.maturity_hours or 0.0 for n, label in data.labels.items()}
    out = {}
    for name, label in data.labels.items():
        inputs = Expression(label.expression).names if label.expression is not None else ()
        out[name] = max([own[name], *(own[i] for i in inputs)])
    return {n: hours for n, hours in out.items() if hours}


def mask_immature(
    labels: dict[str, NDArray[np.float64]], time: NDArray[np.int64], data: DataConfig, log_end: int
) -> dict[str, NDArray[np.float64]]:
    """Labels per event -> those that targets learn: missing where the event is too young at the log's end (ms)."""
    age = (log_end - time) / HOUR_MS
    return labels | {n: np.where(age < hours, np.nan, labels[n]) for n, hours in maturity_hours(data).items()}
