"""Every figure of the study: a function from the tidy rows of ``results/<profile>/metrics`` to a matplotlib figure."""

from meteora.study.figures_benchmark import benchmark_over, benchmark_ratios, figure5_total_time
from meteora.study.figures_diagrams import figure1_framework, figure2_module
from meteora.study.figures_model import model_speed
from meteora.study.figures_results import composite_summary, figure3_dots, figure3_radar
from meteora.study.figures_roofline import roofline
from meteora.study.figures_tokens import figure4_html, figure4_tokens
from meteora.study.figures_training import adapter_curves, gate_curves, routing_heatmaps

__all__ = [
    "adapter_curves",
    "benchmark_over",
    "benchmark_ratios",
    "composite_summary",
    "figure1_framework",
    "figure2_module",
    "figure3_dots",
    "figure3_radar",
    "figure4_html",
    "figure4_tokens",
    "figure5_total_time",
    "gate_curves",
    "model_speed",
    "roofline",
    "routing_heatmaps",
]
