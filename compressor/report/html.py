"""``report.html``: one page, no scripts, nothing loaded from anywhere. Everything it says comes from the schema."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from compressor.report.chain import chain_of
from compressor.report.differences import Marked, marked
from compressor.report.environment import environment
from compressor.report.footprint import footprint, has_products, stored_parameters
from compressor.report.kinds import kinds
from compressor.report.linear_page import linear_page
from compressor.report.plot_chain import chain_plots
from compressor.report.plot_heat import BITS, ERROR, SPARSITY, heat_map
from compressor.report.plot_layers import layer_panels, linear_axis, log_axis
from compressor.report.plot_treemap import treemap
from compressor.report.plots import ledger_plot, perplexity_panels
from compressor.report.schema import GROUPS, Expert, Layer, Report
from compressor.report.schema_use import Sample
from compressor.report.sentences import headline, kernels_told, leading_text, what_was_done
from compressor.report.shades import bits_css

TABLE_LIMIT = 1000
WORST_SHOWN = 300


def shown_layers(layers: list[Layer], limit: int = TABLE_LIMIT, worst: int = WORST_SHOWN) -> list[Layer]:
    """All layers up to ``limit``; beyond it the ``worst`` by error and all with something to say, in their order."""
    if len(layers) <= limit:
        return layers
    by_error = sorted(range(len(layers)), key=lambda index: -(layers[index].relative_error or 0.0))
    chosen = set(by_error[:worst])
    odd = [index for index, layer in enumerate(layers) if layer.fallback or layer.rungs or layer.notes]
    chosen.update(odd[:limit])
    return [layers[index] for index in sorted(chosen)]


def shown_experts(experts: list[Expert], limit: int = TABLE_LIMIT, fewest: int = WORST_SHOWN) -> list[Expert]:
    """All experts up to ``limit``; beyond it those with a fallback and the ``fewest`` by tokens, in their order."""
    if len(experts) <= limit:
        return experts
    by_tokens = sorted(range(len(experts)), key=lambda index: experts[index].tokens)
    chosen = {*by_tokens[:fewest], *(index for index, expert in enumerate(experts) if expert.fallback)}
    return [experts[index] for index in sorted(chosen)]


@dataclass(frozen=True)
class Said:
    """A sample with what differs marked; ``marks`` is None where the source was not asked."""

    sample: Sample
    marks: Marked | None


def said(sample: Sample) -> Said:
    """Mark the differences of a sample."""
    return Said(sample, None if sample.dense is None else marked(sample.dense, sample.compressed))


def corrected(value: float | None, chance: float | None) -> float | None:
    """A share of right answers with guessing at 0; ``None`` where one of the two is not known."""
    return None if value is None or chance is None or chance >= 1 else (value - chance) / (1 - chance)


def render_html(report: Report) -> str:
    """The whole page as text."""
    chain = chain_of(report)
    layers = report.layers
    errors = [layer.relative_error for layer in layers if layer.relative_error is not None]
    zeros = [layer.sparsity for layer in layers]
    shown = shown_layers(layers)
    shaded = (ERROR, BITS, SPARSITY) if any(zeros) else (ERROR, BITS)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            headline=headline(report),
            done=what_was_done(report),
            left=footprint(report),
            lead=leading_text(report.evaluation),
            ledger=(ledger_plot(report.size), ledger_plot(report.size, 400.0)),
            groups=GROUPS,
            parameters=stored_parameters(report),
            products=has_products(report),
            perplexities=perplexity_panels(report.evaluation),
            errors=layer_panels(layers, lambda layer: layer.relative_error, log_axis(errors), "Relative error", "err")
            if errors
            else [],
            sparsities=layer_panels(
                layers,
                lambda layer: layer.sparsity,
                linear_axis(max(zeros, default=1.0)),
                "Sparsity",
                "spa",
            )
            if any(zeros)
            else [],
            zeros=median(zeros) if zeros else 0.0,
            kinds=kinds(layers),
            shown=shown,
            left_out=len(layers) - len(shown),
            experts=shown_experts(report.experts),
            linear=linear_page(report.linearization),
            kernels=kernels_told(report),
            treemap=treemap(report),
            heat=[found for quantity in shaded if (found := heat_map(layers, quantity)) is not None],
            chain=chain,
            chain_plots=chain_plots(chain) if chain is not None and chain.texts else None,
            samples=[said(sample) for sample in report.samples],
            marked=marked,
            bits_css=bits_css,
            corrected=corrected,
        )
    )
