"""Builds the Grafana board: python deploy/grafana/board.py > deploy/grafana/frpo.json

Every query stands on metrics that a run exports (ray_frpo_*), that Ray exports (ray_node_*, ray_actors) or
that vLLM exports through Ray (ray_vllm_*). tests/ray/test_dashboards.py evaluates all of them against a live
run.
"""

from __future__ import annotations

from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement
from grafana_foundation_sdk.models.dashboard import DataSourceRef

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RUN = 'run=~"$run"'


@dataclass(frozen=True)
class Plot:
    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    """PromQL, and the legend of its series."""
    about: str = ""


def gauge_of(name: str, legend: str = "{{stage}}") -> tuple[str, str]:
    return f"ray_frpo_{name}{{{RUN}}}", legend


def rate_of(name: str, legend: str | None = None) -> tuple[str, str]:
    """Of a counter; the legend of a phase, whose counter ends in _s, is its name."""
    query = f"rate(ray_frpo_{name}_total{{{RUN}}}[$__rate_interval])"
    return query, legend or name.removesuffix("_s")


ROWS: dict[str, tuple[Plot, ...]] = {
    "Learning": (
        Plot("Reward", "none", (gauge_of("reward"),), "Mean of each batch."),
        Plot("KL to the reference", "none", (gauge_of("kl"),), "Nats per completion."),
        Plot("Entropy", "none", (gauge_of("entropy"),), "Nats per token."),
        Plot("Groups of equal rewards", "percentunit", (gauge_of("equal_groups"),), "They have no gradient."),
        Plot("Completion length", "none", (gauge_of("length"),), "Tokens."),
        Plot("Completions cut at the limit", "percentunit", (gauge_of("cut_share"),)),
    ),
    "Is it sound": (
        Plot(
            "Mismatch KL",
            "none",
            (gauge_of("mismatch_kl"),),
            "Between the engines' and the learner's log-probs: near 0, or the engines run other weights.",
        ),
        Plot("Failed rewards", "none", (gauge_of("failed_rewards"),), "Of a step; None, never 0."),
        Plot("Gradient norm", "none", (gauge_of("grad_norm"),)),
        Plot("Clipped tokens", "percentunit", (gauge_of("clip_share"),)),
    ),
    "Where the time goes": (
        Plot("Step", "none", (gauge_of("step"),)),
        Plot(
            "Seconds of each phase per second",
            "s",
            (rate_of("generate_s"), rate_of("score_s"), rate_of("update_s"), rate_of("publish_s")),
            "What is missing to 1 is evaluation and checkpoints.",
        ),
        Plot("Tokens drawn per second", "none", (rate_of("num_tokens", "{{stage}}"),)),
        Plot(
            "Groups that wait when generation ends",
            "none",
            (gauge_of("waiting_rewards", "for rewards"), gauge_of("waiting_reference", "for the reference")),
        ),
    ),
    "vLLM": (
        Plot(
            "Requests",
            "none",
            (
                ("sum(ray_vllm_num_requests_running)", "running"),
                ("sum(ray_vllm_num_requests_waiting)", "waiting"),
            ),
        ),
        Plot("KV cache in use", "percentunit", (("max(ray_vllm_kv_cache_usage_perc)", "fullest engine"),)),
    ),
    "Ray": (
        Plot("CPUs", "percent", (("ray_node_cpu_utilization", "{{instance}}"),)),
        Plot("Memory", "bytes", (("ray_node_mem_used", "{{instance}}"),)),
        Plot("Object store", "bytes", (("sum(ray_object_store_memory)", "used"),)),
        Plot("Actors", "none", (("sum by (State) (ray_actors)", "{{State}}"),)),
        Plot(
            "GPUs",
            "percent",
            (("ray_node_gpus_utilization", "{{instance}} {{GpuIndex}}"),),
            "Empty without GPUs.",
        ),
    ),
}


def panel_of(plot: Plot) -> timeseries.Panel:
    built = (
        timeseries.Panel()
        .title(plot.title)
        .description(plot.about)
        .unit(plot.unit)
        .datasource(SOURCE)
        .height(8)
        .span(8)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs([])
        )
    )
    for i, (query, legend) in enumerate(plot.queries):
        built.with_target(prometheus.Dataquery().expr(query).legend_format(legend).ref_id(chr(ord("A") + i)))
    return built


def board_json() -> str:
    built = (
        dashboard.Dashboard("frpo")
        .uid("frpo")
        .tags(["frpo", "ray"])
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("run")
            .label("Run")
            .datasource(SOURCE)
            .query("label_values(ray_frpo_step, run)")
            .multi(True)
            .include_all(True)
        )
    )
    for title, plots in ROWS.items():
        built.with_row(dashboard.Row(title))
        for plot in plots:
            built.with_panel(panel_of(plot))
    return JSONEncoder(sort_keys=True, indent=1).encode(built.build())


if __name__ == "__main__":
    print(board_json())
