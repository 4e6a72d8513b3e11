"""Veneer: parameter-efficient fine-tuning on one small engine."""

__version__ = "0.1.0"
