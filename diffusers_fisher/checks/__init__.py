"""Checks of a checkpoint that the package has never seen: is it right, what does it cost, what may be expected?"""

from .lines import CheckLine, CheckReport
from .pipeline import LINES, check

__all__ = ["LINES", "CheckLine", "CheckReport", "check"]
