from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "astrolabe_jax/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="astrolabe_jax",
    version=VERSION,
    description=(
        "Reinforcement learning of few-step autoregressive video models on the forward process, "
        "in JAX"
    ),
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.13",
    packages=find_packages(include=["astrolabe_jax", "astrolabe_jax.*"]),
    package_data={"astrolabe_jax.worlds.moving_shapes": ["base/*"]},
    install_requires=[
        "jax>=0.10.2,<0.12",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "chex>=0.1.92",
        "transformers>=5.17",
        "tensorflow-datasets>=4.9.10",
        "ml_collections>=1.1.0",
        "absl-py",
        "array_record>=0.8.6",  # the file format of tensorflow-datasets that needs no TensorFlow
        "av>=18",  # mp4
        "ftfy>=6.3",  # part of the published tokenizer: without it token ids differ
        "jaxtyping>=0.3.11",  # shapes by name in signatures; checked in tests only
        "matplotlib",  # curves
        "numpy>=2",
        "pillow",  # contact sheets
        "safetensors>=0.8",
        "sentencepiece",  # tokenizers that ship spiece.model only
        "tensorboardX>=2.6",  # event files without TensorFlow
        "tokenizers",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        # torch, diffusers and peft are oracles: what they compute with our files is compared with
        # what we do. beartype checks the shapes that jaxtyping names.
        "test": [
            "beartype>=0.23",
            "hypothesis",
            "pyright[nodejs]",
            "pytest",
            "pytest-xdist",
            "ruff",
            "torch==2.13.0",
            "diffusers==0.42.1",
            "peft==0.21.2",
        ],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.8", "mkdocstrings-python>=2.0.11"],
    },
)
