"""A GPT with AdamW whose whole state has a given size and number of tensors, and its training step."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .makers.model import Block

__all__ = ["Training"]

_PER_LAYER, _OUTSIDE = 12, 4
"""Parameters; AdamW keeps two moments and a step for each, so the state has four times as many tensors."""

_HEAD_DIM = 64
_CONTEXT = 128
_EMBEDDING_STD = 0.02
"""As GPT-2 begins. With torch's own 1.0 the logits saturate, and what is propagated back becomes subnormal: after some
steps the backward pass takes five times as long, and differs by as much."""


class Training:
    """
    Model and optimizer, with all optimizer state there; `step` is a real one.

    592 tensors are 12 layers, 10,000 are 208. The width follows from the bytes, the vocabulary takes up the rest.
    wrap: shards the model in place, before there is an optimizer. sequences: of 128 tokens each, in a batch.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        tensors: int = 592,
        threads: int = 0,
        seed: int = 0,
        wrap: Callable[[nn.Module], object] = lambda model: None,
        device: str = "cpu",
        sequences: int = 1,
    ) -> None:
        layers = (tensors // 4 - _OUTSIDE) // _PER_LAYER
        if layers < 1 or tensors != 4 * (layers * _PER_LAYER + _OUTSIDE):
            raise ValueError(f"{tensors} tensors cannot be: 4 * (12 * layers + 4) can, as 592 or 10000")
        torch.set_num_threads(threads or os.cpu_count() or 1)
        torch.manual_seed(seed)
        width, vocabulary = _shape(nbytes // 12, layers)
        with torch.device(device):
            self.model = _GPT(layers, width, vocabulary)
        wrap(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.tokens = torch.randint(vocabulary, (sequences, _CONTEXT + 1), device=device)
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self) -> float:
        """Forward and backward; returns the loss."""
        loss = self.loss()
        loss.backward()
        return loss.item()

    def loss(self) -> Tensor:
        """Forward."""
        logits = self.model(self.tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self) -> float:
        """A whole step; returns the loss."""
        loss = self.backward()
        self.update()
        return loss

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the state: parameters, then the optimizer's."""
        parameters = [parameter.detach() for parameter in self.model.parameters()]
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*parameters, *kept]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class _GPT(nn.Module):
    def __init__(self, layers: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(_CONTEXT, width)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=_EMBEDDING_STD)
        heads = width // _HEAD_DIM if width % _HEAD_DIM == 0 else 4
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x) @ self.token.weight.T


def _shape(parameters: int, layers: int) -> tuple[int, int]:
    """The width and the vocabulary that come to that many parameters; the blocks have at most 7/8 of them."""
    step = _HEAD_DIM if _blocks(8 * _HEAD_DIM, layers) < parameters * 7 // 8 else 8
    width = step
    while _blocks(width + step, layers) < parameters * 7 // 8:
        width += step
    rest = parameters - _blocks(width, layers) - (_CONTEXT + 2) * width
    return width, max(256, rest // width)


def _blocks(width: int, layers: int) -> int:
    return layers * (12 * width * width + 13 * width)
