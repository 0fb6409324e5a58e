"""The commands on any saved policy: its certificate, its audit, and its way to the hub. Imports no ML library
before one needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from frpo.arguments import RunDir, Sets, expand_home, refuse_if_short
from frpo.config import ConfigError
from frpo.ending import resumable

if TYPE_CHECKING:
    from frpo.audit import AuditOptions

Arguments = Annotated[
    list[str],
    typer.Option(help="of the reward function, its value in YAML, as often as you like", metavar="key=value"),
]
Column = Annotated[str, typer.Option(help="column with the prompt")]
Chat = Annotated[bool, typer.Option(help="wrap string prompts as a user message")]
REWARD = "module:function, file.py:function, or the folder or hub name of a reward model"
POLICY = "Hugging Face or PEFT folder of the policy, or its hub name"


def certify(
    model: Annotated[str, typer.Argument(help=POLICY)],
    prompts: Annotated[str, typer.Argument(help=".jsonl, .csv or .parquet file, or a Hugging Face data set")],
    reward: Annotated[str, typer.Option(help=REWARD)],
    argument: Arguments = [],  # noqa: B006
    out: Annotated[
        Path,
        typer.Option(
            help="folder for certificate.json and certificate.png", parser=expand_home, metavar="DIR"
        ),
    ] = Path("certificate"),
    column: Column = "prompt",
    where: Annotated[
        list[str],
        typer.Option(
            help="keep only rows whose column equals the value, as often as you like", metavar="column=value"
        ),
    ] = [],  # noqa: B006
    heldout_share: Annotated[
        float,
        typer.Option(
            help="take only this share of the rows, by a hash of the prompt: those that a run with the same "
            "share holds out"
        ),
    ] = 0.0,
    chat: Chat = False,
    completions: Annotated[int, typer.Option(help="fresh completions of each prompt")] = 64,
    radius: Annotated[
        list[float],
        typer.Option(help="nats per completion, as often as you like; default: a grid from 0.05 to 2"),
    ] = [],  # noqa: B006
    floor: Annotated[float, typer.Option(help="least value that the reward can take")] = 0.0,
    max_prompt_tokens: Annotated[int, typer.Option(help="longer prompts are dropped and counted")] = 512,
    max_new_tokens: Annotated[int, typer.Option(help="length limit of a completion")] = 256,
    seed: Annotated[int, typer.Option(help="of the completions")] = 0,
) -> None:
    """Bound from below what a policy's reward can fall to inside a KL ball around it."""
    from frpo import certify as certifying
    from frpo import preflight
    from frpo.recipe import checked

    drawing = certifying.Drawing(max_prompt_tokens, max_new_tokens, seed, out)
    try:
        with checked():
            rows = certifying.rows_of(prompts, column, where, chat=chat, heldout_share=heldout_share)
            bounds = certifying.bounds_of(completions, floor, radius)
            by = certifying.parse_reward(reward, argument)
            config = preflight.make_ready(certifying.make_configuration(model, rows, by, bounds, drawing))
    except ConfigError as error:
        raise certifying.in_options(error) from None
    with resumable(config, lambda: f"certifying {model}"):
        print(certifying.run_certify(config))


def audit(
    model: Annotated[str | None, typer.Argument(help=f"{POLICY}; default: the one in --recipe")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="YAML file; options go over it", parser=expand_home, metavar="FILE"),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="whose reward is audited: a file or a Hugging Face data set")
    ] = None,
    reward: Annotated[str | None, typer.Option(help=REWARD)] = None,
    argument: Arguments = [],  # noqa: B006
    downstream: Annotated[
        str | None, typer.Option(help="examples to fine-tune on; without, the certificate alone")
    ] = None,
    harmful: Annotated[
        str | None, typer.Option(help="examples to mix in, with completions that the policy should not give")
    ] = None,
    column: Annotated[
        str, typer.Option(help="column with the prompt, or the conversation, of each file named here")
    ] = "prompt",
    completion: Annotated[
        str | None, typer.Option(help="column with the completion; default: a conversation's last turn")
    ] = None,
    chat: Chat = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="of each fine-tune; an interval takes 5")] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="print what it would do and what is missing (then exit code 3), and do nothing"
        ),
    ] = False,
    set: Sets = [],  # noqa: B006
    run_dir: RunDir = None,
) -> None:
    """Certify a policy, fine-tune it in many ways, and tell how much reward the worst useful one leaves."""
    from frpo.audit import AuditOptions

    asked = AuditOptions(
        model=model,
        recipe=recipe,
        prompts=prompts,
        column=column,
        reward=reward,
        arguments=tuple(argument),
        downstream=downstream,
        harmful=harmful,
        completion=completion,
        chat=chat,
        seeds=seeds,
    )
    _audit_as_asked(asked, set, run_dir, plan=plan)


def _audit_as_asked(asked: AuditOptions, assignments: list[str], run_dir: Path | None, *, plan: bool) -> None:
    from frpo import audit as auditing
    from frpo import preflight
    from frpo.certify import in_options

    try:
        config = auditing.make_recipe(asked, assignments)
        config = config.model_copy(update={"run_dir": run_dir or config.run_dir})
        if plan:
            raise SystemExit(0 if auditing.print_grid(config, Console()) else 3)
        config = preflight.make_ready(config)
    except ConfigError as error:
        raise in_options(error, auditing.name_options(asked)) from None
    print(f"frpo audit {config.name}: {auditing.count_runs(config)}, folder {config.folder}", flush=True)
    refuse_if_short(config)
    with resumable(config, lambda: f"in {config.folder}"):
        page = auditing.run_audit(config, config.folder)
        auditing.print_audit(config.folder, Console())
        print(f"Audit: {page}")


def push(
    run_dir: Annotated[
        Path, typer.Argument(help="folder of a finished run", parser=expand_home, metavar="RUN_DIR")
    ],
    arm: Annotated[str, typer.Argument(help="whose policy")],
    repo: Annotated[str, typer.Argument(help="organisation/name on the Hugging Face hub (HF_ENDPOINT)")],
    public: Annotated[bool, typer.Option("--public", help="everybody may read it; default: private")] = False,
) -> None:
    """Send the policy of an arm, its model card and how it was made to the Hugging Face hub; the token comes
    from HF_TOKEN or `hf auth login`."""
    from frpo.push import push_policy

    pushed = push_policy(run_dir, arm, repo, public=public)
    who = "private" if pushed.private else "public"
    what = "Pushed" if pushed.changed else "Nothing has changed, it was there already"
    print(f"{what}: {pushed.url} ({who}, commit {pushed.commit[:12]})")
