#!/usr/bin/env bash
# bash run.sh          sets up, then runs the whole pipeline on data/toy into out/toy
# bash run.sh test     sets up, then runs the tests
# bash run.sh gpt2     the four stages at the size of GPT-2 (124M parameters) on data/hh, for a GPU
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

case "${1:-}" in
    '' | test | gpt2) ;;
    *) echo "error: bash run.sh, bash run.sh test or bash run.sh gpt2; not $1" >&2; exit 2 ;;
esac
if [ "${1:-}" = test ]; then
    # Two threads per process spin against each other on a busy machine: 73 minutes instead of 3
    export OMP_NUM_THREADS=1
    exec "$python" -m pytest -q tests
fi

seed=${SEED:-0}
suffix=$([ "$seed" = 0 ] || echo "-$seed")

# --- GPT-2's size: DATA=FOLDER for another folder than data/hh, STEPS=3 to try every line of it
if [ "${1:-}" = gpt2 ]; then
    data=${DATA:-data/hh}
    out=out/$(basename "$data")-gpt2${STEPS:+-$STEPS-steps}$suffix
    tokenizer=$([ "$data" = data/hh ] && echo gpt2 || cat "$data/tokenizer")
    if [ -f out/gpt2/ckpt.pt ] && [ "$tokenizer" = gpt2 ]; then
        echo "from GPT-2's weights in out/gpt2"
        init=--init=out/gpt2
    else
        echo "random weights, which prove speed and memory and nothing else: for GPT-2's, call" \
             "python -m tools.hf import gpt2 --out=out/gpt2, and take rows with its tokenizer"
        init="--n_layer=12 --n_head=12 --n_embd=768 --block_size=1024 --init_std=0.02"
    fi
    if [ "$data" = data/hh ] && [ "$(cat data/hh/tokenizer 2>/dev/null)" != gpt2 ]; then
        "$python" -m data.hh.prepare --tokenizer=gpt2
    fi
    # 16 rows of 1024 tokens at once fit on a GPU of 24 GB. The checkpoints take 16 GB of disk
    common="--data=$data --seed=$seed --resume --batch_size=32 --micro_batch_size=16 --eval_every=50"
    echo "== 1. supervised fine-tuning"
    "$python" train_sft.py $common $init --lr=3e-5 --steps="${STEPS:-500}" --out="$out/sft" \
        ${FLAGS_SFT:-}
    echo "== 2. reward model"
    "$python" train_rm.py $common --lr=1e-5 --steps="${STEPS:-350}" --init="$out/sft" \
        --out="$out/rm" ${FLAGS_RM:-}
    echo "== 3. PPO"
    "$python" train_ppo.py $common --lr=3e-6 --value_lr=1e-5 --beta=0.1 --steps="${STEPS:-200}" \
        --max_new_tokens=128 --init="$out/sft" --reward="$out/rm" --out="$out/ppo" ${FLAGS_PPO:-}
    echo "== 4. DPO"
    "$python" train_dpo.py $common --lr=2e-6 --beta=0.1 --steps="${STEPS:-350}" \
        --init="$out/sft" --out="$out/dpo" ${FLAGS_DPO:-}
    echo "== Before and after: the reward model is the judge, so PPO has an advantage"
    exec "$python" -m tools.evaluate "$out/sft" "$out/ppo" "$out/dpo" --judge="$out/rm" \
        --max_new_tokens=128 --json="$out/evaluate.json" ${FLAGS_EVALUATE:-}
fi

# --- Data, four stages, and what came of it
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}    # sums are rounded differently by two threads
name=toy$suffix
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
