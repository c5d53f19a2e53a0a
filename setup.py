"""The one build file; settings of the development tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def version() -> str:
    """The version that bminf/__init__.py names; importing it would need what is yet to install."""
    text = (HERE / "bminf" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('bminf/__init__.py has no line of the form __version__ = "1.2.3"')
    return match[1]


# The CUDA 12 wheels exist for these two platforms; elsewhere the library runs on the CPU.
HAS_CUDA_WHEELS = (
    'platform_system == "Linux" and platform_machine == "x86_64"'
    ' or platform_system == "Windows" and platform_machine == "AMD64"'
)
RUNTIME = [
    "torch>=2.4",
    "numpy",
    "tqdm",
    # The tokenizers of the zoo, and hub ids. jieba's dictionary decides the ids of a text.
    "jieba==0.42.1",
    "sentencepiece",
    "tokenizers",
    "huggingface_hub",
    f"cupy-cuda12x; {HAS_CUDA_WHEELS}",
    # The compiler: a GPU works with no CUDA toolkit on the machine. The kernels need no headers.
    f"nvidia-cuda-nvrtc-cu12; {HAS_CUDA_WHEELS}",
]
# transformers reads a GGUF file only where gguf and accelerate are there too.
DEMO = ["transformers>=4.56", "safetensors", "gguf", "accelerate"]
# GLM-130B's tokenizer as the authors ship it; no hard need, because it asks for an old protobuf and
# for torchvision. Our own reads the same file.
ICETK = ["icetk"]
# bminf serve.
SERVE = ["fastapi", "uvicorn", "prometheus-client"]
TEST = [
    *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "accelerate", "peft", "openai"),
    *(*DEMO[:2], *SERVE),
]

setup(
    name="bminf",
    version=version(),
    description="Run a model bigger than its memory limit: what does not fit is streamed.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=RUNTIME,
    extras_require={"demo": DEMO, "icetk": ICETK, "serve": SERVE, "test": TEST},
    packages=[*find_packages(include=["bminf", "bminf.*"]), "bminf.kernels"],
    package_dir={"bminf.kernels": "kernels"},
    package_data={
        "bminf": ["py.typed", "server/page.html", "cli/tables/published.json"],
        "bminf.kernels": ["*.cu", "*.cuh"],
    },
    entry_points={"console_scripts": ["bminf = bminf.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
