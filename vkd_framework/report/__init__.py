"""What a run leaves for people to read: the report, its plain-text twin, the model card, the closing table."""

from vkd_framework.report.html import render_html
from vkd_framework.report.markdown import render_markdown
from vkd_framework.report.model_card import render_model_card
from vkd_framework.report.people import people_rows
from vkd_framework.report.samples import pick_samples
from vkd_framework.report.table import terminal_table
from vkd_framework.report.terminal import paragraph, relearn_table, trials_table, verdict_text

__all__ = [
    "paragraph",
    "people_rows",
    "pick_samples",
    "relearn_table",
    "render_html",
    "render_markdown",
    "render_model_card",
    "terminal_table",
    "trials_table",
    "verdict_text",
]
