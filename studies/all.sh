#!/usr/bin/env bash
# The full study behind the report, after run_all.sh: every layer with three seeds, more backbones, the interfaces,
# diffusion against regression where nothing is hidden and where something is. Two hours on two idle cores, by estimate;
# run it again and it resumes, or prints what is finished.
#
#   bash studies/all.sh
#   DATA=notes/ OUT=out/notes bash studies/all.sh                           # as given to run_all.sh
#   JUDGE=HuggingFaceTB/SmolLM2-135M bash studies/all.sh                    # gen-PPL by a second judge as well
#   python -m studies.ablate                                                # half an hour more: rates for both
#   python -m studies.ablate --study arms                                   # a quarter: what to convert to, which loss
set -euo pipefail
DATA=${DATA:-stdlib} OUT=$(realpath -m "${OUT:-out}")
[ -e "$DATA" ] && DATA=$(realpath "$DATA")
cd "$(dirname "$0")/.."

study() {  # study "what it asks and how long it takes" name flags...
    printf '\n=== %s\n' "$1"
    python -m "studies.$2" --model "$OUT/toy" --data "$DATA" "${@:3}" || {
        printf '\nstudies/all.sh stopped: %s failed\n' "${*:2}" >&2; exit 1; }
}

printf '\n=== GENERATE and its twins with three training seeds, then at other layers and in a gap (55 min)\n'
best=$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['layer'])" "$OUT/blocks/bridge.json")
blocks() {  # blocks layer seed folder: a bridge like out/blocks
    python bridge.py --model "$OUT/toy" --data "$DATA" --layer "$1" --visible mix --bidirectional --self_condition \
        --cooldown 1 --nfes 8 --blocks 4 --batch_size 8 --steps 800 --noise_seeds 1 --eval_batches 64 \
        --head_start none --calibration 64 --seed "$2" --out "$3"
}
bridges="" twins="" layers=""       # all at 800 steps of 8 x 128 tokens; the default run's twins have had 120 only
for seed in 0 1 2; do
    for arm in twin block; do    # all masks at once; block after block
        python repr_align.py --model "$OUT/toy" --data "$DATA" --align_weight 0 --batch_size 8 --steps 800 \
            --eval_every 100 --seed $seed --out "$OUT/generate_seeds/${arm}_$seed" \
            $([ $arm = twin ] || echo --attention block)
        twins+="${twins:+,}$OUT/generate_seeds/${arm}_$seed"
    done
    [ $seed = 0 ] || blocks "$best" $seed "$OUT/generate_seeds/blocks_$seed"
    bridges+="${bridges:+,}$OUT/$([ $seed = 0 ] && echo blocks || echo generate_seeds/blocks_$seed)"
    for layer in 0 1 2 4 7; do
        [ $layer = "$best" ] && continue
        blocks $layer $seed "$OUT/layers/cell_${layer}_$seed"
        layers+=",$OUT/layers/cell_${layer}_$seed"
    done
done
python generate.py --data "$DATA" --bridges "$bridges" --twin "$twins" --texts 32 --alphas 0.6 --betas 0.6 \
    ${JUDGE:+--second_judge "$JUDGE"} --out "$OUT/generate_seeds/equal"
python generate.py --data "$DATA" --bridges "$bridges$layers" --methods blocks,jacobi --alphas 0.6 --betas 0.6 \
    --texts 70 --tune_texts 0 --temperatures 0.64,0.8 --out "$OUT/layers/text"
for gap in "gap" "lines --lines"; do    # any eight tokens, then whole lines of eight
    python generate.py --data "$DATA" --bridges "$bridges" --twin "$twins" --prefix 56 --new 8 --suffix 64 --texts 64 \
        --tune_texts 16 --out "$OUT/generate_seeds/"$gap
done
printf '\n=== COMPARE: what twins of every kind still solve (9 min); an aligned one, and by which circuits (2 min)\n'
python -m studies.ablate --study arms --model "$OUT/tasks/toy" --data "$OUT/tasks/data" --steps 500 --batch_size 16 \
    --flags "--seq_len 64 --eval_every 250 --eval_batches 64" --out "$OUT/tasks/arms"
python repr_align.py --data "$DATA" --align_weight 10 --seq_len 64 --steps 500 --eval_every 250 --eval_batches 16 \
    --out "$OUT/tasks/repr_align/w10"
python circuits.py --model "$OUT/tasks/toy" --twins "$OUT/tasks/repr_align/w0,$OUT/tasks/repr_align/w10" \
    --out "$OUT/tasks/circuits_aligned"
printf '\n=== LOCATE while the toy learns: when does its layer appear? (3 min; a report of its own)\n'
for steps in 25 50 100 200 400 1000; do
    [ -s "$OUT/growth/geometry_$steps/result.json" ] && continue    # delete it whole, never a part: a toy only grows
    python toy.py --data "$DATA" --steps $steps --cooldown 0 --keep_state --eval_every 1000 --out "$OUT/growth/toy"
    python geometry.py --data "$DATA" --out "$OUT/growth/geometry_$steps"
done
python geometry.py --data "$DATA" --random_init --out "$OUT/growth/geometry_0"
python evaluate.py --runs "$OUT/growth" --out "$OUT/growth/evaluate"
study "Where can diffusion win? Tokens that are hidden (8 min)" span --out "$OUT/span"
study "The score against depth, and diffusion against regression, at every layer (27 min)" \
    sweep --pool --steps 200 --eval_batches 256 --out "$OUT/sweep"
study "What should diffusion produce? (12 min)" interfaces --out "$OUT/interfaces"
printf '\n=== The report, now with these sections\n'
python evaluate.py --runs "$OUT" --out "$OUT/evaluate"
