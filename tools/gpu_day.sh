#!/usr/bin/env bash
# bash tools/gpu_day.sh          nine minutes on a GPU, most valuable first: what to run, and what to
#                                send (out/gpu_day) when you report your figures
# TINY=1 bash tools/gpu_day.sh   the same lines in two minutes on a CPU: do they run through?
# DATA=data/hh bash tools/gpu_day.sh   trains GPT-2's size on real rows; else on data/toy's, which are
#                                short and have few words, so that only the bench's figures count
[ $# = 0 ] || { echo "error: gpu_day.sh takes no arguments; read its first lines" >&2; exit 2; }
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu_day}
python=$(command -v python3 || command -v python)
if [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
shape=gpt2 steps=12 stages=20
if [ "${TINY:-}" ]; then
    export PREFGPT_DEVICE=cpu FLAGS_SFT="--device=cpu --steps=20" FLAGS_RM="--device=cpu --steps=5" \
        FLAGS_PPO="--device=cpu --steps=1" FLAGS_DPO="--device=cpu --steps=5" \
        FLAGS_EVALUATE="--device=cpu --prompts=8"
    shape=toy steps=3 stages=2
fi
mkdir -p "$out"

# Each step is cut off after so many seconds, so that one that hangs does not cost the others
step() {
    echo "=== [$SECONDS s] $2"
    timeout "$1" bash -c "$2" 2>&1 | grep -v '^step' | tail -40
}

(
step 30 "nvidia-smi -L; nproc; $python -c 'import torch; print(torch.__version__, torch.version.cuda)'"
step 150 "$python -m pytest -q -s tests/test_cuda.py | grep -v '^ '"
# A seed that nobody uses, so that nothing of yours is in the way
export SEED=100
step 200 "rm -rf out/toy-100 out/*-gpt2-*-100; time bash run.sh; cp out/toy-100/evaluate.json '$out'"
step 150 "$python -m tools.bench --stage=all --shape=$shape --steps=$steps --json='$out/bench.json' \
    2>/dev/null"
if [ "${TINY:-}" ]; then FLAGS_SFT+=" --n_layer=1 --n_head=2 --n_embd=32"; fi
export DATA=${DATA:-data/toy-100} STEPS=$stages FLAGS_EVALUATE=${FLAGS_EVALUATE:---prompts=64}
step 200 "bash run.sh gpt2"
step 120 "$python -m tools.bench --stage=sft --shape=$shape --steps=16 --compile=True 2>/dev/null"
echo "=== done after $SECONDS s"
) | tee "$out/log"
