#!/usr/bin/env bash
# The whole pipeline: backbone, locate, replace, generate, convert, compare, evaluate. Offline and on a CPU by default:
# 15 to 20 minutes on two cores; a real model of 135M parameters about an hour. Run it again and it resumes, or
# prints the finished results in seconds. Budgets follow the model's size (--preset auto); times shown are the toy's.
#
#   bash run_all.sh
#   PRESET=tiny bash run_all.sh                                             # every stage in about three minutes
#   DATA=notes/ OUT=out/notes bash run_all.sh                               # other text, other folder
#   MODEL=HuggingFaceTB/SmolLM2-135M DATA=notes/ OUT=out/smollm2 bash run_all.sh    # a folder or a Hub id, on a CPU
#   MODEL=Qwen/Qwen3-0.6B DATA=Salesforce/wikitext:wikitext-103-raw-v1 OUT=out/qwen3 bash run_all.sh       # one GPU
set -euo pipefail
MODEL=${MODEL:-toy} DATA=${DATA:-stdlib} LAYER=${LAYER:-auto} BLOCKS_LAYER=${BLOCKS_LAYER:-2} PRESET=${PRESET:-}
BLOCKS_STEPS=${BLOCKS_STEPS:-}                                 # of that bridge (empty: the preset's)
OUT=${OUT:-$([ "$PRESET" = tiny ] && echo out/tiny || echo out)}
here=$(dirname "$0")
sized=(${PRESET:+--preset "$PRESET"}) small=()                # what scales with the model; what only knows tiny
[ "$PRESET" = tiny ] && small=(--preset tiny)
toy() { [ "$MODEL$PRESET" != toy ] || printf '%s\n' "$@"; }    # budgets of the default run

stage() {  # stage "what it is about to do and how long it takes" file.py flags...
    [ "$MODEL" = toy ] && printf '\n=== %s\n' "$1" || printf '\n=== %s\n' "${1% (*}"
    shift
    python "$here/$1" "${@:2}" || { printf '\nrun_all.sh stopped: %s failed\n' "$*" >&2; exit 1; }
}

if [ "$MODEL" = toy ]; then  # shards and toy share the vocabulary
    stage "BACKBONE: tokenize $DATA, train the toy causal LM (3 to 4 min)" \
        toy.py --data "$DATA" "${small[@]}" --eval_every 500 --out "$OUT/toy"
else
    stage "DATA: tokenize $DATA for $MODEL" data.py --data "$DATA" --model "$MODEL" --out "$OUT/data"
fi
stage "LOCATE: score every layer (10 s)" \
    geometry.py --model "$MODEL" --data "$DATA" "${sized[@]}" --out "$OUT/geometry"
stage "REPLACE: train the diffusion bridge (40 s)" \
    bridge.py --model "$MODEL" --data "$DATA" "${sized[@]}" --layer "$LAYER" $(toy --steps 300 --nfes 1,4) \
    --out "$OUT/bridge"
stage "REPLACE, control: the same network by plain regression (25 s)" \
    bridge.py --model "$MODEL" --data "$DATA" "${sized[@]}" --layer "$LAYER" $(toy --steps 300 --nfes 1,4) \
    --objective regression --out "$OUT/regression"
stage "HYBRID: join the bridge to the upper blocks (10 s)" \
    hybrid.py --data "$DATA" --bridge "$OUT/bridge" "${small[@]}" $(toy --eval_batches 128) --out "$OUT/hybrid"
for w in 0 10; do
    stage "CONVERT: masked diffusion, alignment weight $w (30 s)" \
        repr_align.py --model "$MODEL" --data "$DATA" "${sized[@]}" --align_weight $w \
        $(toy --batch_size 8 --steps 120 --eval_every 40) --out "$OUT/repr_align/w$w"
done
stage "GENERATE: train a bridge that meets unknown tokens (90 s)" \
    bridge.py --model "$MODEL" --data "$DATA" "${sized[@]}" --layer "$BLOCKS_LAYER" --visible mix --bidirectional \
    --self_condition --t_mean 0.7 --nfes 8 ${BLOCKS_STEPS:+--steps $BLOCKS_STEPS} \
    $(toy --blocks 4 --batch_size 8 --steps 400 --noise_seeds 1 --eval_batches 64) --out "$OUT/blocks"
stage "GENERATE: text drawn in hidden space beside its rivals (3 min)" \
    generate.py --data "$DATA" --bridges "$OUT/blocks" --twin "$OUT/repr_align/w0" "${small[@]}" \
    $(toy --alphas 0.8 --betas 0.8 --tune_texts 4) --out "$OUT/generate"
if [ "$MODEL" = toy ]; then
    # the toy's own text poses no task that both models solve, so a smaller one learns some
    text=(--data "$DATA" --tasks 0.8) tasks="$OUT/tasks"
    stage "COMPARE: text that holds the tasks (15 s)" data.py "${text[@]}" --max_tokens 1200000 --out "$tasks/data"
    stage "COMPARE: train a small LM on it (60 s)" toy.py "${text[@]}" "${small[@]}" --vocab 2048 \
        $(toy --layers 4 --width 64 --heads 2 --seq_len 64 --batch_size 16 --steps 1000) --out "$tasks/toy"
    stage "COMPARE: its masked twin (40 s)" repr_align.py --data "$DATA" "${small[@]}" --align_weight 0 \
        $(toy --seq_len 64 --steps 500 --eval_every 250 --eval_batches 16) --out "$tasks/repr_align/w0"
    stage "COMPARE: circuits before and after conversion (15 s)" circuits.py --model "$tasks/toy" \
        --twins "$tasks/repr_align/w0" "${small[@]}" --out "$tasks/circuits"
else
    printf '\n=== COMPARE: circuits before and after conversion\n'   # not every architecture can be analysed
    python "$here/circuits.py" --model "$MODEL" --twins "$OUT/repr_align/w0,$OUT/repr_align/w10" \
        --out "$OUT/tasks/circuits" || printf 'COMPARE is left out.\n'
fi
stage "EVALUATE: speed, zero-shot, report and figures (30 s)" \
    evaluate.py --runs "$OUT" "${small[@]}" --out "$OUT/evaluate"
