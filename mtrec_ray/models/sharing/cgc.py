"""cgc: customized gate control, one level of PLE (Tang et al. 2020, section 4)."""

from __future__ import annotations

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.sharing.ple import PLE


class CGC(PLE):
    """h_t = Σ softmax(G_t x) · [P_t(x), S(x)]: each task weighs its private experts and the shared ones (`ple.Level`)."""

    def depth(self, config: ModelConfig) -> int:
        return 1
