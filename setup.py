"""Installation: `pip install -e .[demo,dev]`; exact tested versions are in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="entprune_ds",
    version="0.1.0",
    description="Prunes whole transformer blocks of diffusion and flow transformers while they train under DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["entprune_ds", "entprune_ds.*"]) + ["entprune_ds.ds_configs"],
    package_dir={"entprune_ds.ds_configs": "ds_configs"},
    package_data={"entprune_ds": ["presets/*.yaml", "estimate.json"], "entprune_ds.ds_configs": ["*.json"]},
    install_requires=[
        "torch>=2.6",
        "torchvision",
        "deepspeed>=0.19.8,<0.20",  # live resizing relies on private attributes, see engine/state.py
        "ninja",
        "webdataset>=1.0",
        "wandb>=0.31",
        "omegaconf>=2.4",
        "clean-fid>=0.1.35",
        "scipy<1.18",  # clean-fid calls sqrtm(disp=)
        "safetensors>=0.4",
        "numpy>=1.26",
        "psutil>=5.9",
        "pillow>=10",
        "rich>=13",
        "matplotlib>=3.8",
        "pyyaml",
    ],
    extras_require={
        "vae": ["diffusers>=0.30"],
        "demo": ["scikit-learn>=1.4"],
        "dev": [
            "pytest>=8",
            "pytest-timeout",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "diffusers>=0.30",
            "torchdiffeq>=0.2.4",  # what dopri5 is compared with
        ],
    },
    entry_points={"console_scripts": ["entprune-ds=entprune_ds.cli.main:run"]},
)
