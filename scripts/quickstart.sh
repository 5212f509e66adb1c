#!/usr/bin/env bash
# From a clean clone to a trained policy: environment, training, evaluation, a table and two paths.
#   ./scripts/quickstart.sh [WORKDIR] [--config.section.field=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
workdir=runs/quickstart
if [ $# -gt 0 ] && [[ $1 != -* ]]; then workdir=$1; shift; fi
make_environment .venv tasks
python=.venv/bin/python

"$python" scripts/train.py --config=configs/quickstart.py --workdir="$workdir" "$@"
"$python" scripts/evaluate.py --workdir="$workdir" --checkpoint=sft,best --problems=512 --samples=8 --ks=1,8
