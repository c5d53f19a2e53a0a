"""The toy of toy_arch.py for users: all that models/ needs of one more."""

from __future__ import annotations

from toy_arch import TOY, Toy

from bminf.models.decoder_only import DecoderOnly


class ToyModel(DecoderOnly):
    """Goes on with a text."""

    _architectures = (TOY,)
    model: Toy

    def _end_ids(self) -> list[int]:
        return [self.tokenizer.token_id("<eod>")]
