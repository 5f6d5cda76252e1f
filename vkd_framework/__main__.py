"""`python -m vkd_framework`, also for launchers such as `accelerate launch -m vkd_framework`."""

from vkd_framework.cli import entry_point

entry_point()
