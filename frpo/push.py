"""`frpo push`: the policy of an arm, its card and how it was made, to a repository of the Hugging Face hub.

One commit of what the run measured, to the byte; nothing else of the run folder leaves this machine.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from frpo import hub, saved, tree
from frpo.config import Config, ConfigError
from frpo.content import MODEL_FILES
from frpo.disk import sha256_of_folder
from frpo.outline import list_stages
from frpo.recipe import checked
from frpo.report.card import CARD, Form, Place, make_card, policy_of, read_audit_lines
from frpo.report.origins import read_origins
from frpo.report.portable import strip_config, strip_report
from frpo.report.schema import Arm, Report

ANSWER_S = 60.0
"""How long the hub may be silent; the library's own client would wait for ever."""


@dataclass(frozen=True)
class Pushed:
    """What came of a push."""

    url: str
    commit: str
    private: bool
    changed: bool
    """False: the repository held all of it, and is as it was."""


def push_policy(run: Path, arm: str, repo: str, *, public: bool = False) -> Pushed:
    """Upload the policy of an arm of a finished run to `repo` (organisation/name), which is made, private
    unless `public`, where there is none.

    Raises ConfigError for a run that is not finished, an arm that it does not have, weights that are not
    those that it measured, a name or a token that the hub does not take, and a repository that everybody
    reads where that was not asked for.
    """
    report = read_finished(run)
    chosen = _find_arm(report, arm)
    token = _find_token(repo)
    policy = policy_of(run, arm)
    if sha256_of_folder(policy) != chosen.summary.weights_sha256:
        raise ConfigError(
            f"push: the weights in {policy} are not those that report.json measured; let `frpo run` come to "
            "its end there, or put the policy's own files back"
        )
    with _lay_out(policy) as (folder, form):
        audit, origins = read_audit_lines(run, chosen), read_origins(run, arm)
        card = make_card(report, chosen, Place(repo, form), audit, origins)
        files: dict[str, Path | bytes] = {**_list_model_files(folder)}
        files[CARD] = card.encode()
        files["config.yaml"] = strip_config(report.config).encode()
        files["report.json"] = strip_report(report).model_dump_json(indent=1).encode()
        if form == "adapter":
            files[saved.ADAPTER] = _name_base(policy)
        try:
            return _upload(repo, files, f"frpo: {report.name}, arm {arm}", token, public=public)
        except ConfigError:
            raise
        except Exception as error:  # the hub's, and those of the transport, which has its own kinds
            raise ConfigError(f"push: {_say_why(error, repo)}") from None


def read_finished(run: Path) -> Report:
    """The report of a run all of whose stages are finished. Raises ConfigError."""
    file = run / "report.json"
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"push: {run} is no run folder (no config.yaml); give one that `frpo run` wrote")
    try:
        report = Report.model_validate_json(file.read_text())
    except OSError:
        raise ConfigError(f"push: {run} has no report.json yet; `frpo run` writes it at its end") from None
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"push: {file}: no report ({reason}); `frpo report {run}` writes it again"
        ) from None
    with checked():
        config = Config.model_validate(tree.parse_yaml(report.config, str(run / "config.yaml")))
    left = [stage.name for stage in list_stages(config) if stage.name not in report.seconds]
    if left:
        raise ConfigError(
            f"push: {run} is not finished: {', '.join(left[:3])}{' and more' if left[3:] else ''} not done; "
            "`frpo run` on the same folder goes on"
        )
    return report


def _find_arm(report: Report, name: str) -> Arm:
    """Raises ConfigError naming those that there are."""
    arms = {arm.name: arm for arm in report.arms if arm.summary.num_steps}
    if name not in arms:
        known = f"choose {', '.join(arms)}" if arms else "it trained none"
        raise ConfigError(f"push: {report.name} has no arm {name!r}; {known}")
    return arms[name]


def _find_token(repo: str) -> str:
    """Raises ConfigError where there is none, or nothing may or can be sent to `repo`."""
    from huggingface_hub import get_token, is_offline_mode

    named = hub.HUB_NAME.fullmatch(repo)
    if named is None or named["revision"]:
        raise ConfigError(f"push: {repo!r} names no repository; write organisation/name")
    if is_offline_mode():
        raise ConfigError("push: HF_HUB_OFFLINE is set, so that nothing can be sent; unset it")
    token = get_token()
    if not token:
        raise ConfigError(
            "push: no token of the hub; set HF_TOKEN to one that may write, or log in with `hf auth login`"
        )
    return token


# ---- what is sent


@contextmanager
def _lay_out(policy: Path) -> Iterator[tuple[Path, Form]]:
    """The folder that is sent, and its form. An adapter on a model of the hub goes as it is; on a folder
    that nobody else has, it goes merged into the weights, float32."""
    if not saved.is_adapter(policy):
        yield policy, "full"
    elif _hub_parent(policy):
        yield policy, "adapter"
    else:
        with tempfile.TemporaryDirectory(dir=policy.parent, prefix=".push-") as aside:
            _merge(policy, Path(aside))
            yield Path(aside), "merged"


def _merge(policy: Path, folder: Path) -> None:
    from frpo.policies import read_policy, write_policy

    write_policy(read_policy(policy, dtype="float32"), folder, policy)
    for name, file in _list_model_files(policy).items():
        if name not in (saved.ADAPTER, saved.WEIGHTS):
            shutil.copyfile(file, folder / name)  # its tokenizer


def _hub_parent(policy: Path) -> str | None:
    """organisation/name@commit of the model that an adapter stands on, where that lies in a cache of the
    hub."""
    return hub.name_of(str(saved.read_json(policy / saved.ADAPTER).get("base_model_name_or_path")))


def _name_base(policy: Path) -> bytes:
    """The configuration of an adapter with its base by name and commit instead of by its place here."""
    name, _, revision = (_hub_parent(policy) or "").partition("@")
    settings = saved.read_json(policy / saved.ADAPTER)
    named = {**settings, "base_model_name_or_path": name, "revision": revision}
    return json.dumps(named, indent=2, sort_keys=True).encode()


def _list_model_files(folder: Path) -> dict[str, Path]:
    """Weights, configuration and tokenizer, by name."""
    files: dict[str, Path] = {}
    for pattern in MODEL_FILES:
        files |= {path.name: path for path in sorted(folder.glob(pattern)) if path.is_file()}
    return files


def _is_of_model(name: str) -> bool:
    """Whether a file of a repository is one that a model is loaded from."""
    return "/" not in name and any(fnmatch(name, pattern) for pattern in MODEL_FILES)


# ---- the hub


def _upload(
    repo: str, files: Mapping[str, Path | bytes], message: str, token: str, *, public: bool
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    _limit_waits()
    api = HfApi(token=token)
    url = api.create_repo(repo, private=not public, exist_ok=True)
    before = api.model_info(repo)
    if not (before.private or public):
        raise ConfigError(
            f"push: everybody can read {repo}; give --public if they may, or make it private on {url}"
        )
    operations: list[Any] = []
    for name, content in sorted(files.items()):
        operations.append(CommitOperationAdd(name, content))
    for there in before.siblings or ():
        if there.rfilename not in files and _is_of_model(there.rfilename):  # of what was pushed before
            operations.append(CommitOperationDelete(there.rfilename))
    commit = api.create_commit(repo, operations, commit_message=message)
    return Pushed(str(url), commit.oid, bool(before.private), changed=commit.oid != before.sha)


def _limit_waits() -> None:
    """Give the hub's client a limit for each answer, and all else that it had."""
    from huggingface_hub import get_session, set_client_factory

    session = get_session()
    kind, hooks = type(session), session.event_hooks
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=ANSWER_S))


def _say_why(error: Exception, repo: str) -> str:
    """What to say where the hub did not take it, with the remedy; never the token."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HFValidationError):
        return f"{repo!r} names no repository ({' '.join(str(error).split())}); choose another name"
    cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    if not isinstance(cause, HfHubHTTPError):
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return (
            f"{repo} was not reached ({reason[:300]}); look at the network and HF_ENDPOINT, then push again"
        )
    status = cause.response.status_code
    owner = repo.partition("/")[0]
    if status in (401, 403):
        return f"the hub refuses the token ({status}); set HF_TOKEN to one that may write to {owner}"
    return f"the hub refused {repo} ({status}: {cause.server_message or 'no reason given'}); push again later"
