"""Products with weights of 8 and 4 bits as other libraries compute them on the CPU.

Each is given our codes and scales in its own layout, so that all compute the same product. torch
multiplies with what torchao calls for packed weights, with activations and scales in bfloat16: in
float32 it takes 16 and 57 times as long (2.13, AMD EPYC with AVX-512). onnxruntime runs a model of
one node on float32; at accuracy level 4 it rounds the activations to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple

import torch

from bminf.quantization.packed import PackedWeight

GROUP = 32  # columns of a scale of 4 bits
_SIGNS = 0x88  # turns the codes of a byte from -8..7 into 0..15
_OPSET = 21


class OtherWeight(NamedTuple):
    """A weight (N, K) that another library keeps.

    multiply: x (M, K) -> (M, N), both in the dtype of its OtherProduct.
    nbytes: of codes and scales in its layout.
    """

    multiply: Callable[[torch.Tensor], torch.Tensor]
    nbytes: int


@dataclass(frozen=True)
class OtherProduct:
    """A product of another library.

    dtype: of activations.   format: of the weight that it is given: "int8", with a scale a row, or
        "int4-g32", with a float16 scale for 32 columns.
    multiple: of which N and K are; of others torch reads beyond the end.
    copies: the weight, and how many -> so many, each in memory of its own.
    kept: how often each is in memory: onnxruntime holds on to what it repacks.
    """

    library: str
    title: str
    dtype: torch.dtype
    format: str
    multiple: int
    copies: Callable[[PackedWeight, int], list[OtherWeight]]
    kept: int = 1

    @property
    def name(self) -> str:
        """Such as "onnxruntime 1.32.0 MatMulNBits"."""
        number = version(self.library).partition("+")[0]
        return f"{self.library} {number} {self.title}"

    def obstacle(self, shape: tuple[int, int]) -> str | None:
        """Why a weight (N, K) cannot be multiplied so here; None where it can."""
        missing = [name for name in _NEEDED[self.library] if find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        if any(side % self.multiple for side in shape):
            return f"{shape[0]}x{shape[1]} is in no whole blocks of {self.multiple}"
        return None


def _torch_int8(weight: PackedWeight, count: int) -> list[OtherWeight]:
    return _of_torch(
        torch._weight_int8pack_mm, [weight.qweight, weight.scale.bfloat16().flatten()], count
    )


def _torch_int4(weight: PackedWeight, count: int) -> list[OtherWeight]:
    packed = torch._convert_weight_to_int4pack_for_cpu(codes_of(weight).int(), 1)
    scale = weight.scale.bfloat16().t()
    both = torch.stack([scale, torch.zeros_like(scale)], dim=-1)  # and what code 8 stands for
    product = torch._weight_int4pack_mm_for_cpu
    return _of_torch(lambda x, *own: product(x, own[0], GROUP, own[1]), [packed, both], count)


def _of_torch(
    product: Callable[..., torch.Tensor], parts: list[torch.Tensor], count: int
) -> list[OtherWeight]:
    copies = [[part.clone() for part in parts] for _ in range(count)]
    nbytes = sum(part.nbytes for part in parts)
    return [OtherWeight(lambda x, own=own: product(x, *own), nbytes) for own in copies]


def codes_of(weight: PackedWeight) -> torch.Tensor:
    """(N, K) uint8, 0..15: the codes of 4 bits plus 8, K a multiple of 32."""
    codes = weight.qweight ^ _SIGNS
    return torch.stack([codes >> 4, codes & 15], dim=-1).flatten(1)


def _onnxruntime(accuracy_level: int, weight: PackedWeight, count: int) -> list[OtherWeight]:
    import onnxruntime

    codes = codes_of(weight)
    packed, scale = codes[:, ::2] | codes[:, 1::2] << 4, weight.scale.float()
    model = _model(packed.view(*scale.shape, -1), scale, accuracy_level)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False

    def copy() -> OtherWeight:
        session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
        run = session.run
        return OtherWeight(
            lambda x: torch.from_numpy(run(None, {"x": x.numpy()})[0]), packed.nbytes + scale.nbytes
        )

    return [copy() for _ in range(count)]


def _model(packed: torch.Tensor, scale: torch.Tensor, accuracy_level: int) -> bytes:
    """A model of one product.   packed: (N, K / 32, 16), even columns in the low halves."""
    from onnx import TensorProto, helper, numpy_helper

    n, k = packed.shape[0], packed.shape[1] * GROUP
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scale"], ["y"], domain="com.microsoft",
        K=k, N=n, bits=4, block_size=GROUP, accuracy_level=accuracy_level,
    )  # fmt: skip
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])
        for name, width in (("x", k), ("y", n))
    )
    weights = [
        numpy_helper.from_array(tensor.numpy(), name)
        for tensor, name in ((packed, "codes"), (scale.flatten(), "scale"))
    ]
    domains = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "product", [x], [y], weights)
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    return bytes(model.SerializeToString())


_NEEDED = {"torch": ("torch",), "onnxruntime": ("onnxruntime", "onnx")}
OTHER_PRODUCTS = (
    OtherProduct("torch", "_weight_int8pack_mm", torch.bfloat16, "int8", 16, _torch_int8),
    OtherProduct(
        "torch", "_weight_int4pack_mm_for_cpu", torch.bfloat16, "int4-g32", GROUP, _torch_int4
    ),
    *(
        OtherProduct(
            "onnxruntime", f"MatMulNBits, accuracy level {level}", torch.float32, "int4-g32", GROUP,
            partial(_onnxruntime, level), kept=2,
        )
        for level in (0, 4)
    ),
)  # fmt: skip
