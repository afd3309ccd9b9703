#!/usr/bin/env bash
# The whole pipeline, end to end, offline and on a CPU by default (about ten minutes on two cores).
# Every stage is an ordinary command: copy any line and run it alone. A finished stage only prints
# its result, an interrupted one resumes.
#
#   bash run_all.sh
#   PRESET=tiny bash run_all.sh                                    # every stage, in two minutes
#   DATA=notes/ OUT=out/notes bash run_all.sh                      # other text, other folder
#   MODEL=Qwen/Qwen3-0.6B DATA=Salesforce/wikitext:wikitext-103-raw-v1 OUT=out/qwen3 bash run_all.sh
set -euo pipefail
if [ $# -gt 0 ]; then sed -n '2,9s/^# \{0,1\}//p' "$0"; exit; fi
cd "$(dirname "$0")"

MODEL=${MODEL:-toy}             # toy, a model folder or a Hub id
DATA=${DATA:-stdlib}            # see data.py
PRESET=${PRESET:-auto}          # auto: by the size of the model; tiny: to try things
OUT=${OUT:-$([ "$PRESET" = tiny ] && echo out/tiny || echo out)}
common=(--model "$MODEL" --data "$DATA" --preset "$PRESET")
number=0
stage() { number=$((number + 1)); printf '\n=== [%d/12] %s\n' "$number" "$1"; }
python() { printf '$ python'; printf ' %q' "$@"; echo; command python "$@"; }   # shows what it runs

if [ "$MODEL" = toy ]; then
    stage "BACKBONE: train a small causal LM"
    python toy.py --preset "$PRESET" --data "$DATA" --out "$OUT/toy"
else
    stage "DATA: tokenize the text for this model"
    python data.py --model "$MODEL" --data "$DATA" --out "$OUT/data"
fi
stage "LOCATE: score every layer"
python geometry.py "${common[@]}" --out "$OUT/geometry"
stage "REPLACE: a diffusion bridge instead of the lower blocks"
python bridge.py "${common[@]}" --out "$OUT/bridge"
stage "REPLACE, control: the same network by plain regression"
python bridge.py "${common[@]}" --objective regression --out "$OUT/regression"
stage "HYBRID: bridge + upper blocks as one model"
python hybrid.py --preset "$PRESET" --data "$DATA" --bridge "$OUT/bridge" --out "$OUT/hybrid"
stage "CONVERT: a masked diffusion LM, without alignment"
python repr_align.py "${common[@]}" --align_weight 0 --out "$OUT/convert/w0"
stage "CONVERT: with alignment"
python repr_align.py "${common[@]}" --align_weight 10 --out "$OUT/convert/w10"
stage "CONVERT: to block diffusion"
python repr_align.py "${common[@]}" --align_weight 0 --attention block --out "$OUT/convert/block"
stage "GENERATE: a bridge that learns with hidden tokens"
python bridge.py "${common[@]}" --generate --out "$OUT/generator"
stage "GENERATE: text by diffusion in hidden space, compared with its rivals"
python generate.py --preset "$PRESET" --data "$DATA" --bridges "$OUT/generator" \
    --converted "$OUT/convert/w0" "$OUT/convert/block" --out "$OUT/generate"
stage "COMPARE: circuits before and after conversion"
if [ "$MODEL" = toy ]; then     # the toy knows no task: a smaller model is taught some
    tasks=$([ "$PRESET" = tiny ] && echo tiny || echo tasks)
    python data.py --data "$DATA" --tasks 0.8 --max_tokens 1200000 --out "$OUT/tasks/data"
    python toy.py --preset "$tasks" --data "$DATA" --tasks 0.8 --vocab 2048 --out "$OUT/tasks/toy"
    python repr_align.py --preset "$tasks" --model "$OUT/tasks/toy" --data "$DATA" \
        --align_weight 0 --out "$OUT/tasks/w0"
    python circuits.py --preset "$PRESET" --model "$OUT/tasks/toy" --converted "$OUT/tasks/w0" \
        --out "$OUT/circuits"
else                            # code 2: an architecture that circuits.py cannot analyse
    python circuits.py --preset "$PRESET" --model "$MODEL" \
        --converted "$OUT/convert/w0" "$OUT/convert/w10" --out "$OUT/circuits" || test $? = 2
fi
stage "EVALUATE: the report"
python evaluate.py --preset "$PRESET" --runs "$OUT" --out "$OUT/evaluate"

printf '\nDone. Open %s: the findings, then a section for every stage.\n' "$OUT/evaluate/report.md"
