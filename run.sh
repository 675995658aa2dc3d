#!/usr/bin/env bash
# bash run.sh          sets up, then runs the whole pipeline on data/toy into out/toy
# bash run.sh test     sets up, then runs the tests
# SEED=3 bash run.sh   the same pipeline with another seed and the same held-out prompts, into out/toy-3
#
# Interrupted and called again, it keeps finished stages and resumes the unfinished one.
# FLAGS_SFT, FLAGS_RM, FLAGS_PPO, FLAGS_DPO and FLAGS_EVALUATE pass more flags to a stage:
# FLAGS_PPO="--beta=0" bash run.sh
set -euo pipefail
cd "$(dirname "$0")"

# --- The running Python if it has what requirements.txt names, else one of our own in .venv
has_packages() {
    "$1" - 2>/dev/null <<'PYTHON'
import sys
from importlib.metadata import version
import numpy, pytest, tiktoken, torch
release = tuple(int(part) for part in version('torch').split('+')[0].split('.')[:2])
sys.exit(not (2, 11) <= release <= (2, 13))
PYTHON
}
python=$(command -v python3 || command -v python)
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
if ! has_packages "$python"; then
    echo "installing requirements.txt into .venv"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    python=.venv/bin/python
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    has_packages "$python" || { echo "error: .venv still lacks a package; remove it, call again" >&2
                                exit 1; }
fi

if [ "${1:-}" = test ]; then
    # Two threads per process spin against each other on a busy machine: 73 minutes instead of 3
    export OMP_NUM_THREADS=1
    exec "$python" -m pytest -q tests
fi

# --- Data, four stages, and what came of it
seed=${SEED:-0}
name=toy$([ "$seed" = 0 ] || echo "-$seed")
data=data/$name
out=out/$name
common="--data=$data --seed=$seed --resume"
mkdir -p "$out"

echo "== data/toy"
"$python" -m data.toy.prepare --seed="$seed" --out="$data"     # seconds; the same bytes each time
echo "== 1. supervised fine-tuning"
"$python" train_sft.py $common --out="$out/sft" ${FLAGS_SFT:-}
echo "== 2. reward model"
"$python" train_rm.py $common --init="$out/sft" --out="$out/rm" ${FLAGS_RM:-}
echo "== 3. PPO"
# The judge is asked in evaluations alone: gold, beside the reward model's score
"$python" train_ppo.py $common --init="$out/sft" --reward="$out/rm" --judge=data/toy/reward.py \
    --out="$out/ppo" ${FLAGS_PPO:-}
echo "== 4. DPO"
"$python" train_dpo.py $common --init="$out/sft" --out="$out/dpo" ${FLAGS_DPO:-}
echo "== Before and after"
"$python" -m tools.evaluate "$out/sft" "$out/ppo" "$out/dpo" --judge=data/toy/reward.py \
    --json="$out/evaluate.json" ${FLAGS_EVALUATE:-}
"$python" -m tools.sample "$out/sft" "$out/ppo" "$out/dpo"
