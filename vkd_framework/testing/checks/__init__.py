"""The checks, theme by theme, in the order in which they run and in which docs/conformance.md lists them."""

from vkd_framework.testing.checks import adapter, answers, layers, model, parts, rows, tokens

ADAPTER_CHECKS = adapter.CHECKS
"""Functions of an `Adapter`; they need no model."""

MODEL_CHECKS = (
    *model.CHECKS,
    *parts.CHECKS,
    *layers.CHECKS,
    *rows.CHECKS,
    *tokens.CHECKS,
    *answers.CHECKS,
)
"""Functions of a `Subject`."""
