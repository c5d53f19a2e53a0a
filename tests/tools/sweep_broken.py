"""Imported by the sweep's workers in test_sweep.py: classes that go wrong when wrapped."""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import transformers

import bminf

_like_bert = functools.wraps(transformers.BertModel.forward)  # inputs are made from its signature


class NotTheSame(transformers.BertModel):
    """Computes something else where it is wrapped."""

    @_like_bert
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        if bminf.plan_of(self) is not None:
            output.last_hidden_state[0, 0, 0] += 1
        return output


class ForeignError(transformers.BertModel):
    """Fails where it is wrapped, with an error that is not bminf's."""

    @_like_bert
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if bminf.plan_of(self) is not None:
            raise RuntimeError("no such luck")
        return super().forward(*args, **kwargs)


class EndsTheProcess(transformers.BertModel):
    @_like_bert
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if bminf.plan_of(self) is not None:
            os._exit(3)
        return super().forward(*args, **kwargs)


class Stateful(transformers.BertModel):
    """Copies a block, which bminf refuses while it streams."""

    @_like_bert
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        copy.deepcopy(self.encoder.layer[0])
        return super().forward(*args, **kwargs)
