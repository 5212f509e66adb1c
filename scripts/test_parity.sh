#!/usr/bin/env bash
# Published families beside transformers and peft, in an environment of their own (2 GB, made on the first call):
# ./scripts/test_parity.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment "${RL_JAX_PARITY_ENVIRONMENT:-.venv-parity}" tasks,dev,hf "${RL_JAX_PYTHON:-}" \
  torch==2.13.0 transformers==5.24.0 peft==0.21.2
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu} HF_HUB_OFFLINE=1
exec "${RL_JAX_PARITY_ENVIRONMENT:-.venv-parity}/bin/python" -m pytest -m parity tests/parity "$@"
