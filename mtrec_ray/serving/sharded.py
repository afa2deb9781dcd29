"""A catalogue in parts, each searched by a Ray actor of its own; their answers are merged exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec_ray import bundle
from mtrec_ray.retrieval.exact import ExactIndex, merge


@ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=-1)
class _Part:
    """The items from one position to another; it reads no others of the bundle."""

    def __init__(self, bundle_uri: str, begin: int, end: int) -> None:
        torch.set_num_threads(1)
        self.index = ExactIndex(bundle.item_vectors(bundle_uri, begin, end))

    def search(
        self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[Any]], allowed_N: NDArray[np.bool_] | None
    ) -> tuple[Tensor, Tensor]:
        return self.index.search(query_BD, k, exclude, allowed_N)


class ShardedIndex:
    """As ExactIndex, over actors that hold a part of the catalogue each. It can be sent to other processes."""

    kind = "exact"

    def __init__(self, bundle_uri: str, items: int, shards: int) -> None:
        """Starts the actors; they end with the process that started them, or with `close`."""
        self.bounds = np.linspace(0, items, min(shards, items) + 1).astype(np.int64)
        self.parts = [_Part.remote(bundle_uri, int(b), int(e)) for b, e in zip(self.bounds[:-1], self.bounds[1:], strict=True)]  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def search(
        self, query_BD: Tensor, k: int, exclude: Sequence[NDArray[Any]], allowed_N: NDArray[np.bool_] | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ExactIndex.search."""
        asked, query = [], ray.put(query_BD.cpu())
        for part, begin, end in zip(self.parts, self.bounds[:-1], self.bounds[1:], strict=True):
            own = [items[(items >= begin) & (items < end)] - begin for items in exclude]
            asked.append(part.search.remote(query, k, own, None if allowed_N is None else allowed_N[begin:end]))
        found = [
            (torch.where(item < 0, item, item + int(begin)), score)
            for (item, score), begin in zip(ray.get(asked), self.bounds[:-1], strict=True)
        ]
        return merge(found, min(k, len(self)))

    def close(self) -> None:
        for part in self.parts:
            ray.kill(part)
