"""Quantizes a checkpoint once, so that it loads faster.

python examples/convert.py cpm2 FOLDER DESTINATION --quantization int4
"""

import argparse

import bminf

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", choices=["cpm1", "cpm2", "eva"])
parser.add_argument("source", help="a folder, in any layout, or a hub id")
parser.add_argument("destination", help="a folder that does not exist yet")
parser.add_argument("--quantization", default="int8", choices=["int8", "int4"])
arguments = parser.parse_args()

folder = bminf.models.convert(
    arguments.source, arguments.destination, arguments.quantization, model=arguments.model
)
print(f"{sum(file.stat().st_size for file in folder.iterdir()) / 1e9:.2f} GB in {folder}")
