"""Make a multimodal language model forget who somebody is, prove what changed, and attack the result."""

__version__ = "0.1.0"
