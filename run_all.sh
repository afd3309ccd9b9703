#!/usr/bin/env bash
# The whole pipeline: backbone, locate, replace, convert, generate, compare, evaluate. Offline and on a CPU by default:
# about 18 minutes on two cores. Run it again and it resumes, or prints the finished results in seconds.
#
#   bash run_all.sh
#   DATA=notes/ OUT=out/notes bash run_all.sh                               # other text, other folder
#   MODEL=Qwen/Qwen3-0.6B DATA=Salesforce/wikitext:wikitext-103-raw-v1 bash run_all.sh   # a GPU, the Hub
set -euo pipefail
MODEL=${MODEL:-toy} DATA=${DATA:-stdlib} LAYER=${LAYER:-auto} BLOCKS_LAYER=${BLOCKS_LAYER:-2} OUT=${OUT:-out}
here=$(dirname "$0")

stage() {  # stage "what it is about to do and how long it takes" file.py flags...
    printf '\n=== %s\n' "$1"
    shift
    python "$here/$1" "${@:2}" || { printf '\nrun_all.sh stopped: %s failed\n' "$*" >&2; exit 1; }
}

if [ "$MODEL" = toy ]; then
    stage "DATA: tokenize $DATA (15 s)" data.py --data "$DATA" --out "$OUT/data"
    stage "BACKBONE: train the toy causal LM (3 min)" backbone.py --data "$DATA" --out "$OUT/toy"
else
    stage "DATA: tokenize $DATA for $MODEL" data.py --data "$DATA" --model "$MODEL" --out "$OUT/data"
fi
stage "LOCATE: score every layer (10 s)" geometry.py --model "$MODEL" --data "$DATA" --out "$OUT/geometry"
stage "REPLACE: train the diffusion bridge (40 s)" \
    bridge.py --model "$MODEL" --data "$DATA" --layer "$LAYER" --out "$OUT/bridge"
stage "REPLACE, control: the same network by plain regression (30 s)" \
    bridge.py --model "$MODEL" --data "$DATA" --layer "$LAYER" --objective regression --out "$OUT/regression"
stage "HYBRID: join the bridge to the upper blocks (5 s)" \
    hybrid.py --data "$DATA" --bridge "$OUT/bridge" --out "$OUT/hybrid"
for w in 0 10; do
    stage "CONVERT: masked diffusion, alignment weight $w (70 s)" \
        repr_align.py --model "$MODEL" --data "$DATA" --align_weight $w --out "$OUT/repr_align/w$w"
done
stage "GENERATE: train a bridge that meets unknown tokens (60 s)" \
    bridge.py --model "$MODEL" --data "$DATA" --layer "$BLOCKS_LAYER" --preset blocks --blocks 4 --steps 400 \
    --out "$OUT/blocks"
stage "GENERATE: text drawn in hidden space beside its rivals (30 s)" \
    generate.py --data "$DATA" --bridges "$OUT/blocks" --twin "$OUT/repr_align/w10" --out "$OUT/generate"
if [ "$MODEL" = toy ]; then
    # the toy's own text poses no task that both models solve, so a smaller one learns four of them
    twins="$OUT/tasks/repr_align/w0,$OUT/tasks/repr_align/w10"
    stage "COMPARE: train a small LM whose text holds the tasks (70 s)" \
        backbone.py --data "$DATA" --layers 4 --tasks 0.6 --steps 700 --out "$OUT/tasks/toy"
    for w in 0 10; do
        stage "COMPARE: its masked twin, alignment weight $w (90 s)" \
            repr_align.py --data "$DATA" --align_weight $w --steps 400 --out "$OUT/tasks/repr_align/w$w"
    done
    stage "LOCATE, checked: a short bridge at every layer (2 min)" \
        sweep.py --model "$OUT/toy" --seeds 1 --steps 100 --eval_batches 16 --out "$OUT/sweep_quick"
    stage "COMPARE: circuits before and after conversion (15 s)" \
        circuits.py --model "$OUT/tasks/toy" --twins "$twins" --patch 50 --out "$OUT/tasks/circuits"
else
    printf '\n=== COMPARE: circuits before and after conversion\n'   # not every architecture can be analysed
    python "$here/circuits.py" --model "$MODEL" --twins "$OUT/repr_align/w0,$OUT/repr_align/w10" \
        --out "$OUT/tasks/circuits" || printf 'COMPARE is left out.\n'
fi
stage "EVALUATE: speed, zero-shot, report and figures (1 min)" evaluate.py --runs "$OUT" --out "$OUT/evaluate"
