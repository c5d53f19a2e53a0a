"""Relative position bias: a number a head for each bucket of distances between query and key."""

from __future__ import annotations

import math

import torch


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
        positions = torch.arange(num_keys, device=self.weight.device)
        distances = positions - positions[num_keys - num_queries :].unsqueeze(1)
        chosen = buckets(distances, self.weight.shape[0], self.max_distance, self.is_bidirectional)
        # In order: attention would copy it in every layer otherwise.
        return self.weight[chosen].permute(2, 0, 1).unsqueeze(0).contiguous()
