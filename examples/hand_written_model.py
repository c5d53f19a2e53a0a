"""A model of your own with streamed blocks: TransformerBlockList in place of ModuleList.

Run: python examples/hand_written_model.py
"""

import torch

import bminf


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inner = torch.nn.functional.gelu(self.up(self.norm(hidden_states)))
        return hidden_states + self.down(inner)


class Model(torch.nn.Module):
    def __init__(self, width: int, num_blocks: int, memory_limit: str) -> None:
        super().__init__()
        # memory_limit is for the blocks; modules outside the list are placed by hand.
        self.blocks = bminf.TransformerBlockList(
            [Block(width) for _ in range(num_blocks)], memory_limit=memory_limit
        )
        device = next(self.blocks.parameters()).device
        self.embed = torch.nn.Embedding(1000, width, device=device)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden_states = self.blocks(self.embed(input_ids))  # each block's output goes to the next
        return hidden_states @ self.embed.weight.T


def main() -> None:
    model = Model(width=256, num_blocks=12, memory_limit="12MB")
    print(bminf.plan_of(model.blocks))
    input_ids = torch.tensor([[1, 2, 3]], device=model.embed.weight.device)
    with torch.no_grad():
        print(model(input_ids).shape)
    print(bminf.stats_of(model.blocks))


if __name__ == "__main__":
    main()
