"""The built-in workload `text`: a small byte-level transformer on English text.

The text is that of Python's own help topics (`pydoc_data.topics`), which every installation has and no download needs. It
differs between Python releases, so the founder's bytes are the run's data set (`dataset_bytes`) and joiners fetch them.
`--set text=FILE` on the founder trains on a file's bytes instead.

The model is a pre-norm decoder (as GPT-2, tied embeddings, learned positions): 2 layers of width 64 on 64 bytes of context
are about 120,000 parameters, small enough that four replicas train on two cores in minutes.
"""

from __future__ import annotations

import difflib
import math
from pathlib import Path
from typing import Any, ClassVar, Final

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from p2pcoord.errors import UserError
from p2pcoord.workload import Split, Workload

VALIDATION_SHARE: Final = 0.1
"""The last tenth of the text is never trained on."""

BYTE_VALUES: Final = 256

OPTIONS: Final = {
    "layers": (2, 64),
    "width": (64, 4096),
    "heads": (4, 64),
    "context": (64, 4096),
    "stride": (8, 4096),
}
"""[workload] of the run file: default and highest value. `stride` is the distance of training windows in bytes."""


class Windows(Dataset[torch.Tensor]):
    """All windows of `size` bytes of a text that begin at a multiple of `stride`: int64, shape (size,)."""

    def __init__(self, text: bytes, size: int, stride: int) -> None:
        self._bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._size = size
        self._stride = stride

    def __len__(self) -> int:
        return max(0, (len(self._bytes) - self._size) // self._stride + 1)

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self._stride
        return self._bytes[start : start + self._size].long()


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each behind a layer norm and beside a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.attention_in(self.attention_norm(x)).view(
            batch, length, 3, self.heads, width // self.heads
        )
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(mixed.transpose(1, 2).reshape(batch, length, width))
        fed: torch.Tensor = self.feed_out(F.gelu(self.feed_in(self.feed_norm(x))))
        return x + fed


class ByteTransformer(nn.Module):
    """Bytes, int64 of shape (batch, length), to logits of the next byte, shape (batch, length, 256)."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTE_VALUES, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, BYTE_VALUES, bias=False)
        self.output.weight = self.embedding.weight  # tied, as in GPT-2: 16,384 parameters less
        nn.init.normal_(self.embedding.weight, std=0.05)
        nn.init.normal_(self.position, std=0.02)

    def forward(self, octets: torch.Tensor) -> torch.Tensor:
        x = self.embedding(octets) + self.position[: octets.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.output(self.norm(x))
        return logits


class Text(Workload):
    """The workload: see the module and OPTIONS."""

    batch_size: ClassVar[int | None] = 16

    @classmethod
    def run_defaults(cls) -> dict[str, dict[str, Any]]:
        """Found by benchmarks/text_alone.py, which prints what they reach. DiLoCo's outer optimizer is the default anyway."""
        return {
            "strategy": {"local_steps": 50, "aggregation_rounds": 24},
            "local": {"optimizer": {"learning_rate": 2e-3}},
        }

    def _option(self, name: str) -> int:
        for given in self.options:
            if given not in OPTIONS:
                close = difflib.get_close_matches(given, OPTIONS, n=1)
                known = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(OPTIONS)}"
                raise UserError(f"[workload] {given}: unknown option; {known}", exit_code=2)
        default, highest = OPTIONS[name]
        value = self.options.get(name, default)
        if not isinstance(value, int) or not 1 <= value <= highest:
            raise UserError(
                f"[workload] {name}: a whole number from 1 to {highest}, not {value!r}", exit_code=2
            )
        return value

    def model(self) -> nn.Module:
        width, heads = self._option("width"), self._option("heads")
        if width % heads:
            raise UserError(f"[workload] width {width} is no multiple of heads {heads}", exit_code=2)
        return ByteTransformer(self._option("layers"), width, heads, self._option("context"))

    def dataset_bytes(self) -> bytes:
        if path := self.local.get("text"):
            try:
                return Path(path).read_bytes()
            except OSError as error:
                raise UserError(f"--set text={path}: {error}", exit_code=2) from None
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics)).encode()

    def data(self, split: Split) -> Windows:
        text = self.dataset if self.dataset is not None else self.dataset_bytes()
        border = int(len(text) * (1 - VALIDATION_SHARE))
        context = self._option("context")
        size = context + 1
        if split == "train":
            return Windows(text[:border], size, self._option("stride"))
        return Windows(text[border:], size, context)  # every byte is predicted once

    def loss(self, model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def metrics(self, model: nn.Module, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"bits_per_byte": self.loss(model, batch) / math.log(2)}
