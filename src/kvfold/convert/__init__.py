"""One conversion: read a group of sites, let the method make their new roles, write; copy every other tensor."""

from kvfold.convert.conversion import ConvertSettings, convert

__all__ = ["ConvertSettings", "convert"]
