"""Adds options to the config of a diffusers scheduler without repeating its constructor."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def add_config_options(cls: type, parent: Any, options: Mapping[str, Any], check: Callable[..., None]) -> None:
    """Gives `cls` the constructor of `parent` with more keywords, which `from_config` and `save_pretrained` know.

    Args:
        cls: the class, whose `__init__` is set.
        parent: a scheduler class of diffusers.
        options: defaults by name.
        check: called with the options as keywords before the parent's constructor.
    """

    @functools.wraps(parent.__init__)
    def __init__(self, *args, **kwargs):
        values = {name: kwargs.pop(name, default) for name, default in options.items()}
        check(**values)
        parent.__init__(self, *args, **kwargs)
        self.register_to_config(**values)

    # Diffusers reads a config by the signature of the constructor.
    signature, keyword = inspect.signature(parent.__init__), inspect.Parameter.KEYWORD_ONLY
    more = [inspect.Parameter(name, keyword, default=value) for name, value in options.items()]
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *more])  # type: ignore[attr-defined]
    cls.__init__ = __init__
