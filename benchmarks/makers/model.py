"""A GPT of a given number of parameters, in as many layers as such models have, for the makers beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPT", "Block", "sized", "tokens"]

_LAYERS = 12
_VOCABULARY = 8192
_TOKENS = 32


class Block(nn.Module):
    """Attention and MLP, as in GPT-2: 12 tensors."""

    def __init__(self, width: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width)
        x = x + self.project(y)
        return x + self.narrow(F.gelu(self.widen(self.norm_mlp(x))))


class GPT(nn.Module):
    """As its users write it: embeddings, blocks, a head of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(_VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, _VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x)).float().flatten(0, 1)
        return F.cross_entropy(logits, ids.flatten())


def sized(parameters: float) -> GPT:
    """The model whose parameters come closest to that many."""

    def missing(width: int) -> float:
        return abs(_LAYERS * (12 * width + 13) * width + (2 * _VOCABULARY + 2) * width - parameters)

    width = min(range(32, 8192, 32), key=missing)
    torch.manual_seed(0)
    return GPT(width)


def tokens() -> Tensor:
    return torch.randint(_VOCABULARY, (1, _TOKENS))
