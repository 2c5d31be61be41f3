"""What to say when a package is missing: its name, what it is for, and how to install it."""

import re

DISTRIBUTION = "treg-losses"
# the extra `train` of pyproject.toml: package -> what it is for
TRAIN = {
    "transformers": "models, tokenizers and the training loop",
    "accelerate": "the training loop and several processes",
    "datasets": "data sets of the hub and saved ones",
    "pyarrow": "parquet files",
    "jinja2": "chat templates and the page of treg inspect",
    "pyyaml": "--config files",
    "tqdm": "progress bars",
    "rich": "the view of treg inspect in a terminal",
    "matplotlib": "training curves",
    "peft": "adapters (LoRA)",
    "httpx2": "treg annotate --server",
    "httpx": "treg annotate --server, with Python 3.10",
}
# the extra `evaluate`
EVALUATE = {"scikit-learn": "treg evaluate-credit"}
CORE = ("torch", "triton", "numpy")
OWN = ("treg", "treg_kernels")
# packages that are imported by another name
PACKAGES = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}
# how transformers says that the package of a --report_to is missing
REPORTER = re.compile(r"Callback requires (?P<name>[\w-]+) to be installed", re.IGNORECASE)


def advice(error: Exception) -> str | None:
    """One line on the package that an error says is missing; None if it says nothing of the kind.

    A package that is unknown here is named as it was imported, and no extra is promised for it.
    """
    reporter = REPORTER.search(str(error))
    if reporter:
        name = reporter["name"].lower()
        return (
            f"--report_to: {name} is not installed, and the training log was to go there; "
            f"install it with: pip install {name}; or leave it out: --report_to none"
        )
    if not isinstance(error, ImportError):
        return None
    module = (error.name or "").partition(".")[0]
    package = PACKAGES.get(module, module) or _named_in(str(error))
    for extra, packages in {"train": TRAIN, "evaluate": EVALUATE}.items():
        if package in packages:
            return (
                f"{error}; {package} is for {packages[package]}; "
                f"install it with: pip install '{DISTRIBUTION}[{extra}]'"
            )
    if package in CORE:
        return f"{error}; install it with: pip install {DISTRIBUTION}"
    if not isinstance(error, ModuleNotFoundError) or package in OWN:
        return None  # a fault, which the message alone does not explain
    return f"{error}; {package} is no part of {DISTRIBUTION}: install it, or put it on PYTHONPATH"


def _named_in(text: str) -> str:
    """The package that transformers asks for where it raises an ImportError of its own, or ""."""
    for package in TRAIN:
        if re.search(rf"\b{package}\b", text, re.IGNORECASE) and "pip install" in text:
            return package
    return ""
