"""The version of this package, for reports and files that record what made them."""

__version__ = "0.1.0"
