"""Access to the diffusion Fisher of pretrained diffusers checkpoints, without differentiating the denoiser.

Wang et al., Efficiently Access Diffusion Fisher: Within the Outer Product Span Space, ICML 2025, arXiv 2505.23264.

The public names and their homes are written once, in `__init__.pyi`: type checkers and editors read it, and from it
this module knows where to import a name at its first use, so that `import diffusers_fisher` loads neither diffusers'
models nor transformers.
"""

import ast
import importlib
from pathlib import Path

__version__ = "0.1.0"


def _homes() -> dict[str, str]:
    """Module of every public name, read from `__init__.pyi`."""
    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {name.name: "." * node.level + (node.module or "") for node in imports for name in node.names}


_HOMES = _homes()
__all__ = sorted(name for name, home in _HOMES.items() if home.startswith("."))


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        if name.startswith("Fisher") and (scheduler_class := _scheduler_by_name(name)) is not None:
            return scheduler_class
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def _scheduler_by_name(name: str) -> type | None:
    """Fisher schedulers outside of the catalog, by which diffusers loads and pickle restores them."""
    return importlib.import_module(".schedulers.catalog", __name__).fisher_scheduler_named(name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
