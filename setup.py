"""Packaging of mmpt. `make install` shows the order that matters: torch first, then the rest, deepspeed last."""

from setuptools import find_packages, setup

setup(
    name="mmpt",
    version="0.1.0",
    description="Large-scale distributed image-text pretraining: CLIP, FILIP and their family on DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["mmpt*", "data_tools*", "launcher*"]),
    package_data={"mmpt.evals": ["*.html"], "mmpt.ops.late_interaction": ["*.cpp"]},
    install_requires=[
        "torch>=2.13",
        "braceexpand",
        "deepspeed>=0.19.6",
        "fsspec",
        "matplotlib",
        "numpy",
        "obstore",
        "pillow",
        "psutil",
        "pyarrow",
        "pyyaml",
        "rich",
        "safetensors",
        "simplejpeg",
        "submitit",
        "tensorboard",
        "tokenizers",
        "transformers",
        "urllib3",
        "webdataset",
    ],
    extras_require={
        "lmdb": ["lmdb", "msgpack"],
        "dev": [
            "flask",
            "flask-cors",
            "hypothesis",
            "lmdb",
            "moto",
            "prometheus-client",
            "pyright",
            "pytest",
            "ruff",
            "scipy",
            'triton; platform_system == "Linux" and platform_machine == "x86_64"',
        ],
    },
    entry_points={
        "console_scripts": [
            "mmpt=mmpt.cli:main",
            "mmpt-data=data_tools.__main__:main",
            "mmpt-launch=launcher.__main__:main",
        ]
    },
)
