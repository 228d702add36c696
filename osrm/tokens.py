"""Which positions of a module's input are real tokens: padding must not enter a covariance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from merge_algorithms.errors import UserError

# What models of Transformers that pad their input themselves, at its end, do that with -> which of
# their modules read (length, batch, d).
_PADDING = {
    # Longformer, LED
    "_pad_to_window_size": "query key value query_global key_global value_global",
    "_pad_to_block_size": "",  # BigBird, BigBird-Pegasus
    "_pad_to_mult_of_chunk_length": "",  # Reformer
}


@dataclass(frozen=True)
class _Mask:
    """One (batch, length) mask, with the flat indices of its real positions (None: all)."""

    shape: torch.Size
    rows: Tensor | None

    @classmethod
    def of(cls, mask: Tensor, name: str) -> _Mask:
        if mask.ndim != 2:
            raise UserError(
                f"'{name}' has shape {tuple(mask.shape)}: expected (batch, length), with 1 at real"
                " tokens and 0 at padding"
            )
        rows = mask.flatten().nonzero().squeeze(1)
        return cls(mask.shape, None if len(rows) == mask.numel() else rows)

    def select(self, x: Tensor) -> Tensor | None:
        """The rows of x, (..., d), at real positions: (n, d); None if x does not fit the mask."""
        flat = x.reshape(-1, x.shape[-1])
        per_sequence = x.ndim == 2 and len(x) == self.shape[0]
        if x.shape[:-1] == self.shape or (x.ndim == 2 and len(x) == self.shape.numel()):
            return flat if self.rows is None else flat.index_select(0, self.rows.to(x.device))
        dropped = self.rows is not None and x.ndim == 2 and len(x) == len(self.rows)
        return flat if per_sequence or dropped else None


class TokenSelector:
    """Selects the real tokens of any module's input while the model runs on one batch.

    In an encoder-decoder model two masks are in play. What the decoder and the heads after it read
    is masked by the decoder's mask, except the encoder's states, which cross-attention receives as
    the very tensor that the decoder is called with; comparing lengths would not do, they may be
    equal.
    """

    def __init__(self, model: nn.Module) -> None:
        self._decoder = _find_decoder(model)
        configs = [getattr(module, "config", None) for module in model.modules()]
        self._relative = any(getattr(config, "relative_attention", False) for config in configs)
        padding = [name for name in _PADDING if any(hasattr(m, name) for m in model.modules())]
        self._pads = bool(padding)
        self._length_first = " ".join(_PADDING[name] for name in padding).split()
        self._main: _Mask | None = None
        self._target: _Mask | None = None
        self._decoding = False
        self._encoder_states: Tensor | None = None

    def attach(self) -> list[RemovableHandle]:
        """Follow when the decoder begins. The caller removes the handles."""
        if self._decoder is None:
            return []
        return [self._decoder.register_forward_pre_hook(self._enter_decoder, with_kwargs=True)]

    def start(self, batch: Mapping[str, Any]) -> None:
        """Read the masks of the batch that the model is about to run on."""
        self._decoding, self._encoder_states = False, None
        mask, target = batch.get("attention_mask"), batch.get("decoder_attention_mask")
        inputs = batch.get("input_ids", batch.get("inputs_embeds"))
        if mask is not None:
            self._main = _Mask.of(mask, "attention_mask")
        else:  # every position is real
            self._main = None if inputs is None else _Mask(inputs.shape[:2], None)
        if target is not None:
            self._target = _Mask.of(target, "decoder_attention_mask")
        elif mask is None or "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch:
            self._target = None
        else:
            # The model makes the decoder's input from the encoder's: a start token in front, the
            # last real token dropped, so as many positions are real.
            self._target = self._main

    def select(self, x: Tensor, module: str, again: bool = False) -> Tensor | None:
        """The rows of `module`'s input x, (..., d), that are real tokens: (n, d).

        Args:
            x: The input.
            module: Its name.
            again: It has read tokens of this batch already. An input that does not fit the mask is
                no token then, but a table: DeBERTa projects its relative positions through the
                layers that project the tokens; that of a single text may even fit. The result is
                None.

        Raises:
            UserError: the input does not fit the mask.
        """
        if again and self._relative:
            return None
        decodes = self._decoding and x is not self._encoder_states
        mask = self._target if decodes else self._main
        if mask is None:
            return x.reshape(-1, x.shape[-1])
        tokens = mask.select(self._unpadded(x, module, mask.shape))
        if tokens is not None or again:
            return tokens
        if mask.rows is not None:
            raise UserError(
                f"{module} reads an input of shape {tuple(x.shape)}, the attention mask is"
                f" {tuple(mask.shape)}: cannot tell which positions are padding, leave this module"
                " out of the target modules or batch rows of equal length without a mask"
            )
        return x.reshape(-1, x.shape[-1])

    def _unpadded(self, x: Tensor, module: str, shape: torch.Size) -> Tensor:
        """The input as (batch, length, d) without what the model itself has padded it with."""
        if not self._pads or x.ndim != 3:
            return x
        if module.rpartition(".")[2] in self._length_first:
            x = x.transpose(0, 1)
        return x[:, : shape[1]] if len(x) == shape[0] else x

    def _enter_decoder(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._decoding = True
        self._encoder_states = kwargs.get("encoder_hidden_states")


def _find_decoder(model: nn.Module) -> nn.Module | None:
    for module in model.modules():
        if _has_encoder(module):
            decoder = _decoder_of(module)
            # What a vision-language model calls its decoder may hold an encoder as well.
            while _has_encoder(decoder) and (inner := _decoder_of(decoder)) not in (None, decoder):
                decoder = inner
            return decoder
    return None


def _has_encoder(module: nn.Module | None) -> bool:
    return bool(getattr(getattr(module, "config", None), "is_encoder_decoder", False))


def _decoder_of(module: nn.Module | None) -> nn.Module | None:
    decoder = getattr(module, "get_decoder", lambda: None)()
    return decoder if isinstance(decoder, nn.Module) else None
