#!/usr/bin/env bash
# Installs frpo into a virtual environment: deploy/install.sh [VENV=.venv] [EXTRAS=eval,fetch,dev,docs]
# CPU or GPU is decided here, once: an NVIDIA driver means plain vllm and the torch it brings, else the CPU builds.
# EXTRAS=verl is an environment for frpo.integrations.verl: verl and what its trainer imports, frpo without its own dependencies.
# Does nothing when pyproject.toml and the extras are those of the last successful call.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
extras=${2:-eval,fetch,dev,docs}
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3

if [ -n "${FRPO_ACCELERATOR:-}" ]; then accelerator=$FRPO_ACCELERATOR
elif nvidia-smi -L >/dev/null 2>&1; then accelerator=gpu
else accelerator=cpu; fi

stamp="$accelerator $extras $(sha256sum pyproject.toml deploy/install.sh | sha256sum | cut -c1-16)"
if [ -f "$venv/.frpo-installed" ] && [ "$(cat "$venv/.frpo-installed")" = "$stamp" ]; then exit 0; fi

echo "Installing frpo[$accelerator,$extras] into $venv (a few minutes the first time)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade uv
uv() { "$venv/bin/python" -m uv pip install --python "$venv/bin/python" ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} "$@"; }
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"   # uv does not read pip's settings

if [ "$accelerator" = cpu ]; then
  # "+cpu" is never on PyPI, so the plain call fails at once where no local wheel has it; only then PyTorch's own CPU index.
  uv --quiet "torch==2.13.0+cpu" 2>/dev/null || uv --torch-backend cpu "torch==2.13.0"
fi
if [ "$extras" = verl ]; then
  uv verl==0.9.1 cachetools TransferQueue fastapi uvicorn pytest pytest-timeout
  uv --no-deps --editable .
else
  uv --editable ".[$accelerator,$extras]"
fi
# Every actor imports these libraries: compiled once here, an import takes half the time, also where PYTHONDONTWRITEBYTECODE is set.
"$venv/bin/python" -m compileall -qq -j 0 "$venv"/lib/python*/site-packages || true   # some ship templates that are no Python
echo "$stamp" >"$venv/.frpo-installed"
