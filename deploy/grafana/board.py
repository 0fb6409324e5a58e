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


def gauge(name: str) -> tuple[str, str]:
    return f"ray_frpo_{name}{{{RUN}}}", "{{stage}}"


def phase(name: str) -> tuple[str, str]:
    return f"rate(ray_frpo_{name}_s_total{{{RUN}}}[$__rate_interval])", name


ROWS: dict[str, tuple[Plot, ...]] = {
    "Learning": (
        Plot("Reward", "none", (gauge("reward"),), "Mean of each batch."),
        Plot("KL to the reference", "none", (gauge("kl"),), "Nats per completion."),
        Plot("Entropy", "none", (gauge("entropy"),), "Nats per token."),
        Plot("Groups of equal rewards", "percentunit", (gauge("equal_groups"),), "They have no gradient."),
        Plot("Completion length", "none", (gauge("length"),), "Tokens."),
        Plot("Completions cut at the limit", "percentunit", (gauge("cut_share"),)),
    ),
    "Is it sound": (
        Plot("Mismatch KL", "none", (gauge("mismatch_kl"),), "Between the engines' and the learner's log-probs: near 0, or the engines run other weights."),
        Plot("Failed rewards", "none", (gauge("failed_rewards"),), "Of a step; None, never 0."),
        Plot("Gradient norm", "none", (gauge("grad_norm"),)),
        Plot("Clipped tokens", "percentunit", (gauge("clip_share"),)),
    ),
    "Where the time goes": (
        Plot("Step", "none", ((f"ray_frpo_step{{{RUN}}}", "{{stage}}"),)),
        Plot("Seconds of each phase per second", "s", tuple(map(phase, ("generate", "score", "update", "publish"))), "What is missing to 1 is evaluation and checkpoints."),
        Plot("Tokens drawn per second", "none", ((f"rate(ray_frpo_num_tokens_total{{{RUN}}}[$__rate_interval])", "{{stage}}"),)),
        Plot("Groups that wait when generation ends", "none", ((f"ray_frpo_waiting_rewards{{{RUN}}}", "for rewards"), (f"ray_frpo_waiting_reference{{{RUN}}}", "for the reference"))),
    ),
    "vLLM": (
        Plot("Requests", "none", (("sum(ray_vllm_num_requests_running)", "running"), ("sum(ray_vllm_num_requests_waiting)", "waiting"))),
        Plot("KV cache in use", "percentunit", (("max(ray_vllm_kv_cache_usage_perc)", "fullest engine"),)),
    ),
    "Ray": (
        Plot("CPUs", "percent", (("ray_node_cpu_utilization", "{{instance}}"),)),
        Plot("Memory", "bytes", (("ray_node_mem_used", "{{instance}}"),)),
        Plot("Object store", "bytes", (("sum(ray_object_store_memory)", "used"),)),
        Plot("Actors", "none", (("sum by (State) (ray_actors)", "{{State}}"),)),
        Plot("GPUs", "percent", (("ray_node_gpus_utilization", "{{instance}} {{GpuIndex}}"),), "Empty without GPUs."),
    ),
}  # fmt: skip


def panel(plot: Plot) -> timeseries.Panel:
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


def board() -> str:
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
            built.with_panel(panel(plot))
    return JSONEncoder(sort_keys=True, indent=1).encode(built.build())


if __name__ == "__main__":
    print(board())
