"""The plan of GLM-130B on a GPU with 24 GB, and the least time of a token; needs no weights.

python examples/glm_24gb.py --memory-limit 21.6GiB --host-memory 64GB --link 25
"""

import argparse

import bminf

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--memory-limit", default="21.6GiB", help="default: 90 percent of 24 GiB")
parser.add_argument("--host-memory", default=None, help="for what is streamed; default: all of it")
parser.add_argument("--quantization", default="int4-row", choices=["int4-row", "int4", "int8"])
parser.add_argument("--max-length", type=int, default=512, help="tokens of text and answer")
parser.add_argument("--link", type=float, default=25, help="GB/s from host to card; PCIe 4: 25")
parser.add_argument("--disk", type=float, default=3, help="GB/s, for what host memory cannot hold")
arguments = parser.parse_args()

plan = bminf.models.plan_glm(
    "GLM-130B",
    arguments.memory_limit,
    arguments.quantization,
    max_length=arguments.max_length,
    head_quantization="int8",
    host_memory=arguments.host_memory,
)
print(plan)
seconds = {
    "link": plan.streamed_bytes / (arguments.link * 1e9),
    "disk": plan.disk_bytes / (arguments.disk * 1e9),
}
slowest = max(seconds, key=seconds.__getitem__)
if plan.streamed:
    speed = f"{1 / seconds[slowest]:.2f} tokens a second"
    print(f"a token takes at least {seconds[slowest]:.2f} s on the {slowest}: {speed}")
