#!/usr/bin/env bash
# Did a change move a number? Runs the tiny preset of the second edition (commit d080e9e) and of this tree
# on this machine, one thread and seed 0, and compares weights bit for bit and numbers to eight digits.
# Stored numbers would differ from one CPU to the next, so both sides run here. Three minutes, two cores.
#
#   bash tests/golden.sh                   # all stages, in out/golden; the old side is kept for next time
#   REV=HEAD bash tests/golden.sh          # against another commit of this edition
set -euo pipefail
cd "$(dirname "$0")/.."

REV=$(git rev-parse --short=7 "${REV:-d080e9e}")      # HEAD moves; a kept old side does not
WORK=${WORK:-$PWD/out/golden/$REV}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$WORK"

tiny=(--preset tiny --data stdlib)
old=$WORK/old
new=$WORK/new

run_old() {     # the commands of the second edition
    model=("${tiny[@]}" --model "$old/toy")
    python toy.py "${tiny[@]}" --out "$old/toy"
    python geometry.py "${model[@]}" --out "$old/geometry"
    python bridge.py "${model[@]}" --layer 2 --head_start tokens --out "$old/bridge"
    python bridge.py "${model[@]}" --layer 2 --head_start tokens --objective regression \
        --out "$old/regression"
    python repr_align.py "${model[@]}" --align_weight 0 --out "$old/convert/w0"
    python repr_align.py "${model[@]}" --align_weight 10 --out "$old/convert/w10"
    python repr_align.py "${model[@]}" --align_weight 0 --attention block --out "$old/convert/block"
    python repr_align.py "${model[@]}" --align_weight 0 --attention block --context causal --ar_weight 1 \
        --out "$old/convert/causal"
    python bridge.py "${model[@]}" --layer 1 --visible mix --bidirectional --self_condition --cooldown 1 \
        --nfes 8 --out "$old/generator"
    python generate.py "${tiny[@]}" --bridges "$old/generator" --twin "$old/convert/w0,$old/convert/block" \
        --alphas 0.6 --betas 0.6 --tune_texts 0 --out "$old/generate"
    python data.py --data stdlib --tasks 0.8 --max_tokens 1200000 --out "$old/tasks/data"
    python toy.py "${tiny[@]}" --tasks 0.8 --vocab 2048 --out "$old/tasks/toy"
    python repr_align.py "${tiny[@]}" --model "$old/tasks/toy" --align_weight 0 --out "$old/tasks/w0"
    python circuits.py --preset tiny --model "$old/tasks/toy" --twins "$old/tasks/w0" --out "$old/circuits"
}

run_new() {     # the same in this edition's words
    model=("${tiny[@]}" --model "$new/toy")
    python toy.py "${tiny[@]}" --out "$new/toy"
    python geometry.py "${model[@]}" --out "$new/geometry"
    python bridge.py "${model[@]}" --layer 2 --head_start tokens --out "$new/bridge"
    python bridge.py "${model[@]}" --layer 2 --head_start tokens --objective regression \
        --out "$new/regression"
    python repr_align.py "${model[@]}" --align_weight 0 --out "$new/convert/w0"
    python repr_align.py "${model[@]}" --align_weight 10 --out "$new/convert/w10"
    python repr_align.py "${model[@]}" --align_weight 0 --attention block --out "$new/convert/block"
    python repr_align.py "${model[@]}" --align_weight 0 --attention block --context causal --ar_weight 1 \
        --out "$new/convert/causal"
    python bridge.py "${model[@]}" --layer 1 --generate --out "$new/generator"
    python generate.py "${tiny[@]}" --bridges "$new/generator" \
        --converted "$new/convert/w0" "$new/convert/block" --out "$new/generate"
    python data.py --data stdlib --tasks 0.8 --max_tokens 1200000 --out "$new/tasks/data"
    python toy.py "${tiny[@]}" --tasks 0.8 --vocab 2048 --out "$new/tasks/toy"
    python repr_align.py "${tiny[@]}" --model "$new/tasks/toy" --align_weight 0 --out "$new/tasks/w0"
    python circuits.py --preset tiny --model "$new/tasks/toy" --converted "$new/tasks/w0" \
        --out "$new/circuits"
}

if [ ! -f "$WORK/done" ]; then
    rm -rf "$WORK/tree" "$old"
    git clone --quiet . "$WORK/tree"
    git -C "$WORK/tree" checkout --quiet "$REV"
    side=run_old
    [ -f "$WORK/tree/core/draws.py" ] || { side=run_new; new=$old; }
    (cd "$WORK/tree" && $side) > "$WORK/old.log" 2>&1
    new=$WORK/new
    touch "$WORK/done"
fi
rm -rf "$new"
run_new > "$WORK/new.log" 2>&1
for side in "$WORK/tree $old" ". $new"; do      # edges of one circuit
    read -r tree runs <<< "$side"
    python tests/edges.py "$tree" "$runs/tasks/toy" "$runs/edges.safetensors"
done
python tests/golden.py "$old" "$new"
