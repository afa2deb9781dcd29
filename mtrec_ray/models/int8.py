"""Eight bits for CPUs: linear layers and embeddings of a transformer with int8 weights, activations rounded per token.

W8A8 with a scale for every output channel and every token (the per-token scheme of LLM.int8(), Dettmers et al. 2022, arXiv
2208.07339, without its outlier columns). torch's own dynamic quantization has one scale for all tokens of a batch, which one
large activation spoils.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

LEVELS = 127
SMALL_TABLE = 4096
"""Rows of an embedding up to which it stays float32: positions and types."""
NATIVE = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_vnni", "amx_int8"))
"""Whether this CPU multiplies int8 by itself. Elsewhere `torch._int_mm` takes some 30 times as long as a product of float32."""


def product(a_RI: Tensor, b_IO: Tensor) -> Tensor:
    """int8 times int8 -> float32 (R, O). Without VNNI a product of float32, exact up to 1,040 terms and to 1e-7 beyond."""
    return torch._int_mm(a_RI, b_IO).float() if NATIVE else a_RI.float() @ b_IO.float()


def rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """-> (int8 weight, scale of every row (O, 1))."""
    scale_O1 = weight_OI.abs().amax(1, keepdim=True).clamp(min=1e-12) / LEVELS
    return (weight_OI / scale_O1).round().to(torch.int8), scale_O1


class Int8Linear(nn.Module):
    """x W^T + b from int8 weights; no gradients."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight_OI, scale_O1 = rounded(linear.weight.detach().float())
        self.register_buffer("weight_IO", weight_OI.t().contiguous())
        self.register_buffer("scale_O", scale_O1[:, 0].contiguous())
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach().float()
        self.register_buffer("bias_O", bias)

    @property
    def weight(self) -> Tensor:
        """(O, I) as the eight bits say, for layers that are folded (sharing/base.py)."""
        return (self.weight_IO.float() * self.scale_O).t()  # type: ignore[operator, union-attr]

    @property
    def bias(self) -> Tensor:
        return self.bias_O  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        x_RI = x.reshape(-1, x.shape[-1])
        scale_R1 = x_RI.abs().amax(1, keepdim=True).clamp(min=1e-12) / LEVELS
        product_RO = product((x_RI / scale_R1).round().to(torch.int8), self.weight_IO)  # type: ignore[arg-type]
        return (product_RO * self.scale_O * scale_R1 + self.bias_O).view(*x.shape[:-1], -1)  # type: ignore[operator]


class Int8Embedding(nn.Module):
    """Rows of an embedding from int8 weights with a scale each."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        weight_VE, scale_V1 = rounded(embedding.weight.detach().float())
        self.register_buffer("weight_VE", weight_VE)
        self.register_buffer("scale_V1", scale_V1)

    def forward(self, token: Tensor) -> Tensor:
        return self.weight_VE[token].float() * self.scale_V1[token]  # type: ignore[index]


def to_int8(model: nn.Module) -> nn.Module:
    """Replace, in place, linear layers and the token embedding; small tables (positions, types) and norms stay float32."""
    for name, child in model.named_children():
        if isinstance(child, nn.Linear):
            setattr(model, name, Int8Linear(child))
        elif type(child).__name__ == "Conv1D":  # GPT-2's linear layer with its weight the other way round
            setattr(model, name, Int8Linear(_linear(child)))
        elif isinstance(child, nn.Embedding) and child.num_embeddings > SMALL_TABLE:
            setattr(model, name, Int8Embedding(child))
        else:
            to_int8(child)
    return model


def _linear(conv: nn.Module) -> nn.Linear:
    inputs, outputs = conv.weight.shape  # type: ignore[union-attr, misc]
    linear = nn.Linear(inputs, outputs)
    linear.weight.data, linear.bias.data = conv.weight.detach().t(), conv.bias.detach()  # type: ignore[operator, union-attr]
    return linear


def size_bytes(model: nn.Module) -> int:
    """Bytes of the weights as they are kept."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
