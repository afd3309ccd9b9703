#!/usr/bin/env bash
# The whole pipeline: backbone, locate, replace, generate, convert, compare, evaluate. Offline and on a CPU by default:
# seven to ten minutes on two idle cores; a real model of 135M 33 (BLOCKS_STEPS=150). Run it again and it resumes, or
# prints the finished results in seconds. Budgets follow the model's size (--preset auto); times shown are the toy's.
#
#   bash run_all.sh
#   PRESET=tiny bash run_all.sh                                             # every stage in half a minute
#   DATA=notes/ OUT=out/notes bash run_all.sh                               # other text, other folder
#   MODEL=HuggingFaceTB/SmolLM2-135M DATA=notes/ OUT=out/smollm2 bash run_all.sh    # a folder or a Hub id, on a CPU
#   MODEL=Qwen/Qwen3-0.6B DATA=Salesforce/wikitext:wikitext-103-raw-v1 OUT=out/qwen3 bash run_all.sh       # one GPU
set -euo pipefail
MODEL=${MODEL:-toy} DATA=${DATA:-stdlib} LAYER=${LAYER:-auto} BLOCKS_LAYER=${BLOCKS_LAYER:-auto} PRESET=${PRESET:-}
BLOCKS_STEPS=${BLOCKS_STEPS:-}                                 # of the bridge that draws blocks of tokens
OUT=${OUT:-$([ "$PRESET" = tiny ] && echo out/tiny || echo out)}
tiny=$([ "$PRESET" != tiny ] || echo --preset tiny)            # for what knows no other preset
default() { [ "$MODEL$PRESET" != toy ] || echo "$@"; }         # budgets of the default run
common="--model \"$MODEL\" --data \"$DATA\" ${PRESET:+--preset $PRESET}"
convert=$(default --batch_size 8 --steps 120 --eval_every 40)

# What follows prints a plan that core/stages.py runs: titles at the margin, commands indented; a minus: it may refuse.
{
if [ "$MODEL" = toy ]; then cat <<END                          # toy.py writes the shards too: they share its vocabulary
BACKBONE: tokenize $DATA, train the toy causal LM $(default '(130 s)')
    toy.py --data "$DATA" $tiny --eval_every 500 --out "$OUT/toy"
END
else cat <<END
DATA: tokenize $DATA for $MODEL
    data.py --data "$DATA" --model "$MODEL" --out "$OUT/data"
END
fi
cat <<END
LOCATE: score every layer $(default '(10 s)')
    geometry.py $common --out "$OUT/geometry"
REPLACE: train the diffusion bridge $(default '(30 s)')
    bridge.py $common --layer $LAYER $(default --steps 300 --nfes 1,4) --out "$OUT/bridge"
REPLACE, control: the same network by plain regression $(default '(20 s)')
    bridge.py $common --layer $LAYER $(default --steps 300 --nfes 1,4) --objective regression --out "$OUT/regression"
HYBRID: join the bridge to the upper blocks $(default '(10 s)')
    hybrid.py --data "$DATA" --bridge "$OUT/bridge" $tiny $(default --eval_batches 128) --out "$OUT/hybrid"
CONVERT: masked diffusion without alignment, then with $(default '(60 s)')
    repr_align.py $common --align_weight 0 $convert --out "$OUT/repr_align/w0"
    repr_align.py $common --align_weight 10 $convert --out "$OUT/repr_align/w10"
CONVERT: to blocks of tokens, one after another $(default '(20 s)')
    repr_align.py $common --align_weight 0 --attention block $convert --out "$OUT/repr_align/block"
GENERATE: train a bridge that meets unknown tokens $(default '(70 s)')
    bridge.py $common --layer $BLOCKS_LAYER --visible mix --bidirectional --self_condition --cooldown 1 --nfes 8 \
        --out "$OUT/blocks" $(default --blocks 4 --batch_size 8 --steps 800 --noise_seeds 1 --eval_batches 64 \
        --head_start none --calibration 64) ${BLOCKS_STEPS:+--steps $BLOCKS_STEPS}
GENERATE: text drawn in hidden space beside its rivals $(default '(3 min)')
    generate.py --data "$DATA" --bridges "$OUT/blocks" --twin "$OUT/repr_align/w0,$OUT/repr_align/block" $tiny \
        $(default --alphas 0.6 --betas 0.6 --tune_texts 4) --out "$OUT/generate"
END
if [ "$MODEL" = toy ]; then cat <<END   # its text poses no task that both models solve, so a smaller one learns some
COMPARE: a small LM on text that holds the tasks $(default '(75 s)')
    data.py --data "$DATA" --tasks 0.8 --max_tokens 1200000 --out "$OUT/tasks/data"
    toy.py --data "$DATA" --tasks 0.8 $tiny --vocab 2048 --out "$OUT/tasks/toy" \
        $(default --layers 4 --width 64 --heads 2 --seq_len 64 --batch_size 16 --steps 1000)
COMPARE: its masked twin $(default '(40 s)')
    repr_align.py --data "$DATA" $tiny --align_weight 0 --out "$OUT/tasks/repr_align/w0" \
        $(default --seq_len 64 --steps 500 --eval_every 250 --eval_batches 16)
COMPARE: circuits before and after conversion $(default '(15 s)')
    circuits.py --model "$OUT/tasks/toy" --twins "$OUT/tasks/repr_align/w0" $tiny --out "$OUT/tasks/circuits"
END
else cat <<END                                                 # not every architecture can be analysed
COMPARE: circuits before and after conversion
    -circuits.py --model "$MODEL" --twins "$OUT/repr_align/w0,$OUT/repr_align/w10" --out "$OUT/tasks/circuits"
END
fi
cat <<END
EVALUATE: speed, zero-shot, report and figures $(default '(30 s)')
    evaluate.py --runs "$OUT" $tiny --out "$OUT/evaluate"
END
} | python "$(dirname "$0")/core/stages.py"
