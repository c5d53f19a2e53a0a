"""Relative position bias: a number a head for each bucket of distances between query and key."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache, cached_property

import torch

from bminf.ops.attention import Buckets


def buckets(
    distances: torch.Tensor, num_buckets: int, max_distance: int, is_bidirectional: bool
) -> torch.Tensor:
    """The bucket of each distance, position of the key minus position of the query; int64.

    Small distances have a bucket each; larger ones share buckets that grow with the logarithm, up
    to max_distance, from where on all share the last. With is_bidirectional, half of the buckets
    are for keys that come later; without it, later keys are in bucket 0.
    Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1.
    """
    offset = torch.zeros_like(distances)
    if is_bidirectional:
        num_buckets //= 2
        offset = (distances > 0) * num_buckets
        distances = distances.abs()
    else:
        distances = (-distances).clamp(min=0)
    num_exact = num_buckets // 2
    # In this order: where the quotient is a whole number, another rounding is another bucket.
    logarithm = torch.log(distances.clamp(min=1).float() / num_exact)
    share = logarithm / math.log(max_distance / num_exact) * (num_buckets - num_exact)
    shared = (num_exact + share.long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distances < num_exact, distances, shared)


@cache
def buckets_back(num_buckets: int, max_distance: int, device: torch.device) -> torch.Tensor:
    """(max_distance + 1,) int32: the bucket of each distance back to an earlier key, in a decoder.
    All that are farther are in the last of these."""
    with torch.inference_mode(False):
        distances = -torch.arange(max_distance + 1, device="cpu")
        found = buckets(distances, num_buckets, max_distance, is_bidirectional=False)
        return found.to(device, torch.int32)


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """What attention() adds to the scores of a decoder, in place of a bias: it is causal.

    weight: (num_buckets, H), for each bucket of distances back.   max_distance: see buckets().
    """

    weight: torch.Tensor
    max_distance: int
    made: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, repr=False)

    def tensor(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """(1, H, T, S): of the last queries to all keys, later ones too."""
        return position_bias(self.weight, num_queries, num_keys, self.max_distance, False)

    @cached_property
    def added(self) -> Buckets:
        """The same for a kernel."""
        num_buckets, device = self.weight.shape[0], self.weight.device
        return Buckets(self.weight, buckets_back(num_buckets, self.max_distance, device))


class RelativePositionBias(torch.nn.Module):
    """weight: (num_buckets, num_heads)."""

    def __init__(
        self, num_buckets: int, num_heads: int, max_distance: int, is_bidirectional: bool
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(num_buckets, num_heads))
        self.max_distance = max_distance
        self.is_bidirectional = is_bidirectional

    def forward(self, num_queries: int, num_keys: int) -> torch.Tensor:
        """(1, H, T, S): of the last `num_queries` of `num_keys` positions to all of them."""
        return position_bias(
            self.weight, num_queries, num_keys, self.max_distance, self.is_bidirectional
        )

    def of_decoder(self) -> RelativeBias:
        """The same by its parameters, with later keys masked, for one pass."""
        return RelativeBias(self.weight, self.max_distance)


def position_bias(
    weight: torch.Tensor,
    num_queries: int,
    num_keys: int,
    max_distance: int,
    is_bidirectional: bool,
) -> torch.Tensor:
    """(1, H, T, S): of the last `num_queries` of `num_keys` positions to all of them."""
    positions = torch.arange(num_keys, device=weight.device)
    distances = positions - positions[num_keys - num_queries :].unsqueeze(1)
    if is_bidirectional:
        chosen = buckets(distances, weight.shape[0], max_distance, True)
    else:  # for each token of a decoder: what is known of each distance takes a third of the time
        known = buckets_back(weight.shape[0], max_distance, weight.device)
        chosen = known[distances.neg_().clamp_(0, max_distance)]
    # In order: attention would copy it in every layer otherwise.
    return weight[chosen].permute(2, 0, 1).unsqueeze(0).contiguous()
