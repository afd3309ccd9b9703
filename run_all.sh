#!/usr/bin/env bash
# The whole pipeline: backbone, locate, replace, generate, convert, compare, evaluate. Offline and on a CPU by default:
# about seven minutes on two idle cores; a real model of 135M parameters about an hour. Run it again and it resumes, or prints
# the finished results in seconds. Budgets follow the model's size (--preset auto); times shown are the toy's.
#
#   bash run_all.sh
#   PRESET=tiny bash run_all.sh                                             # every stage in half a minute
#   DATA=notes/ OUT=out/notes bash run_all.sh                               # other text, other folder
#   MODEL=HuggingFaceTB/SmolLM2-135M DATA=notes/ OUT=out/smollm2 bash run_all.sh    # a folder or a Hub id, on a CPU
#   MODEL=Qwen/Qwen3-0.6B DATA=Salesforce/wikitext:wikitext-103-raw-v1 OUT=out/qwen3 bash run_all.sh       # one GPU
set -euo pipefail
MODEL=${MODEL:-toy} DATA=${DATA:-stdlib} LAYER=${LAYER:-auto} BLOCKS_LAYER=${BLOCKS_LAYER:-2} PRESET=${PRESET:-}
BLOCKS_STEPS=${BLOCKS_STEPS:-}                                 # of that bridge (empty: the preset's)
OUT=${OUT:-$([ "$PRESET" = tiny ] && echo out/tiny || echo out)}
sized=${PRESET:+--preset $PRESET}                              # for what scales with the model
small=$([ "$PRESET" != tiny ] || echo --preset tiny)           # for what only knows tiny
toy() { [ "$MODEL$PRESET" != toy ] || echo "$@"; }             # budgets of the default run
on="--model \"$MODEL\" --data \"$DATA\" $sized"

{
if [ "$MODEL" = toy ]; then cat <<END                          # shards and toy share the vocabulary
BACKBONE: tokenize $DATA, train the toy causal LM $(toy '(130 s)')
    toy.py --data "$DATA" $small --eval_every 500 --out "$OUT/toy"
END
else cat <<END
DATA: tokenize $DATA for $MODEL
    data.py --data "$DATA" --model "$MODEL" --out "$OUT/data"
END
fi
cat <<END
LOCATE: score every layer $(toy '(10 s)')
    geometry.py $on --out "$OUT/geometry"
REPLACE: train the diffusion bridge $(toy '(30 s)')
    bridge.py $on --layer $LAYER $(toy --steps 300 --nfes 1,4) --out "$OUT/bridge"
REPLACE, control: the same network by plain regression $(toy '(20 s)')
    bridge.py $on --layer $LAYER $(toy --steps 300 --nfes 1,4) --objective regression --out "$OUT/regression"
HYBRID: join the bridge to the upper blocks $(toy '(10 s)')
    hybrid.py --data "$DATA" --bridge "$OUT/bridge" $small $(toy --eval_batches 128) --out "$OUT/hybrid"
CONVERT: masked diffusion without alignment, then with $(toy '(60 s)')
    repr_align.py $on --align_weight 0 $(toy --batch_size 8 --steps 120 --eval_every 40) --out "$OUT/repr_align/w0"
    repr_align.py $on --align_weight 10 $(toy --batch_size 8 --steps 120 --eval_every 40) --out "$OUT/repr_align/w10"
GENERATE: train a bridge that meets unknown tokens $(toy '(90 s)')
    bridge.py $on --layer $BLOCKS_LAYER --visible mix --bidirectional --self_condition --t_mean 0.7 --nfes 8 \
        ${BLOCKS_STEPS:+--steps $BLOCKS_STEPS} --out "$OUT/blocks" \
        $(toy --blocks 4 --batch_size 8 --steps 400 --noise_seeds 1 --eval_batches 64)
GENERATE: text drawn in hidden space beside its rivals $(toy '(3 min)')
    generate.py --data "$DATA" --bridges "$OUT/blocks" --twin "$OUT/repr_align/w0" $small \
        $(toy --alphas 0.8 --betas 0.8 --tune_texts 4) --out "$OUT/generate"
END
if [ "$MODEL" = toy ]; then cat <<END    # its own text poses no task that both models solve, so a smaller one learns some
COMPARE: a small LM on text that holds the tasks $(toy '(75 s)')
    data.py --data "$DATA" --tasks 0.8 --max_tokens 1200000 --out "$OUT/tasks/data"
    toy.py --data "$DATA" --tasks 0.8 $small --vocab 2048 --out "$OUT/tasks/toy" \
        $(toy --layers 4 --width 64 --heads 2 --seq_len 64 --batch_size 16 --steps 1000)
COMPARE: its masked twin $(toy '(40 s)')
    repr_align.py --data "$DATA" $small --align_weight 0 --out "$OUT/tasks/repr_align/w0" \
        $(toy --seq_len 64 --steps 500 --eval_every 250 --eval_batches 16)
COMPARE: circuits before and after conversion $(toy '(15 s)')
    circuits.py --model "$OUT/tasks/toy" --twins "$OUT/tasks/repr_align/w0" $small --out "$OUT/tasks/circuits"
END
else cat <<END                                                 # not every architecture can be analysed
COMPARE: circuits before and after conversion
    -circuits.py --model "$MODEL" --twins "$OUT/repr_align/w0,$OUT/repr_align/w10" --out "$OUT/tasks/circuits"
END
fi
cat <<END
EVALUATE: speed, zero-shot, report and figures $(toy '(30 s)')
    evaluate.py --runs "$OUT" $small --out "$OUT/evaluate"
END
} | python "$(dirname "$0")/core/stages.py"
