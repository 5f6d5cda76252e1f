"""Discover adapters, load exactly one, and ask it through a facade that checks every answer.

One `PluginManager` a run holds two plugins: `generic`, registered first, and the adapter, registered last so that its
answer wins. Adapters that no recipe names are never imported by a run.
"""

from vkd_framework.plugins.adapter import GENERIC, Adapter
from vkd_framework.plugins.installed import (
    Installed,
    adapter_for_model_type,
    check_installed,
    installed_adapters,
    load_adapter,
    the_one,
    working_adapters,
)
from vkd_framework.plugins.model import MLLM, Anatomy, partition, trainable

__all__ = [
    "GENERIC",
    "MLLM",
    "Adapter",
    "Anatomy",
    "Installed",
    "adapter_for_model_type",
    "check_installed",
    "installed_adapters",
    "load_adapter",
    "partition",
    "the_one",
    "trainable",
    "working_adapters",
]
