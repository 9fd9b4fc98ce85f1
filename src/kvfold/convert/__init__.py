"""One conversion: read a group of sites, let the method make their new roles, write; copy every other tensor."""

from kvfold.convert.conversion import convert
from kvfold.convert.settings import ConvertSettings

__all__ = ["ConvertSettings", "convert"]
