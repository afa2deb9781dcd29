"""pepnet: gates personalised by features (Chang et al. 2023, PEPNet, arXiv 2302.01115)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtrec_ray.config import ModelConfig
from mtrec_ray.models.sharing.base import Inputs, Sharing, StackedLinear, divide


class GateUnit(nn.Module):
    """Gate NU: δ = 2 · sigmoid(W' relu(W z + b) + b'), in (0, 2); 1 leaves what it multiplies as it is."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, hidden), nn.Linear(hidden, out)

    def forward(self, first: Tensor) -> Tensor:
        """W z + b (..., hidden) -> δ (..., out)."""
        return 2 * torch.sigmoid(self.second(F.relu(first)))


class PEPNet(Sharing):
    """EPNet scales the input, PPNet scales the hidden layers of each task's tower:

    e = U_e([sg(state), sg(item), sg(state) · sg(item), context]) · x
    h_t⁰ = e;  h_tˡ = U_tˡ([prior, sg(e)]) · gelu(W_tˡ h_tˡ⁻¹ + b_tˡ), l = 1, 2
    prior = [sg(state), sg(item), context]

    sg is the stop-gradient. What stands for what: the paper's general embedding E is x; its domain feature is the request
    context; its prior (user, item and author ids) is the state, the item vector and the request context. The paper's ids have
    embeddings of their own for the gates. Here state and item vector are the trunk's and the item tower's, so the gates
    read them under the stop-gradient that the paper puts on E: gates choose, they do not teach the trunk. Embeddings of
    the context are trained through the gates too, as in the paper. The gates of one layer share their hidden layer among
    tasks, as in the paper.
    """

    def __init__(self, config: ModelConfig, tasks: Sequence[str], context_width: int) -> None:
        super().__init__(config, tasks, context_width)
        D, H, T = config.width, config.sharing_width, len(tasks)
        width, prior = 3 * D + context_width, 2 * D + context_width
        self.input_gate = GateUnit(width, H, width)
        self.gate_1, self.gate_2 = GateUnit(prior + width, H, T * H), GateUnit(prior + width, H, T * H)
        self.tower_1, self.tower_2 = nn.Linear(width, T * H), StackedLinear(T, H, H)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, state: Tensor, item: Tensor, context: Tensor) -> dict[str, Tensor]:
        x = Inputs(state, item, context).joined()
        fixed = Inputs(state.detach(), item.detach(), context)
        e = self.input_gate(fixed.linear(self.input_gate.first)) * x
        leading = e.shape[:-1]
        prior = [state.detach().expand(*leading, -1), item.detach(), context.expand(*leading, -1)]
        z, T = torch.cat([*prior, e.detach()], dim=-1), len(self.tasks)
        delta_1, delta_2 = (divide(gate(gate.first(z)), T) for gate in (self.gate_1, self.gate_2))
        hidden = delta_1 * F.gelu(divide(self.tower_1(e), T))
        return self.by_task(delta_2 * F.gelu(self.tower_2(self.dropout(hidden))))
