#!/usr/bin/env bash
# Runs the tests in an environment of their own, made on the first call: ./scripts/test.sh [pytest arguments]
# Without arguments all but the slow ones, a process per core.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment "${RL_JAX_TEST_ENVIRONMENT:-.venv-test}" tasks,dev "${RL_JAX_PYTHON:-}"
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
[ $# -gt 0 ] || set -- -n logical --maxprocesses 8
exec "${RL_JAX_TEST_ENVIRONMENT:-.venv-test}/bin/python" -m pytest "$@"
