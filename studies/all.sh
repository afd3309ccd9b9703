#!/usr/bin/env bash
# The studies behind docs/findings.md, to run after run_all.sh. They train everything with three
# seeds, train a bridge at every layer, and ask which tasks a converted model still solves. All are
# ordinary commands: they resume, and a finished one only prints its result. About two hours on two
# idle cores.
#
#   bash studies/all.sh
#   DATA=notes/ OUT=out/notes bash studies/all.sh           # as given to run_all.sh
set -euo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-stdlib}
OUT=${OUT:-out}
toy=(--model "$OUT/toy" --data "$DATA")
layer=$(python -c "import json; print(json.load(open('$OUT/geometry/result.json'))['best_layer'])")

echo "=== REPLACE, GENERATE and CONVERT with three training seeds (80 min)"
for seed in 0 1 2; do
    bridge=(python bridge.py "${toy[@]}" --seed $seed)
    "${bridge[@]}" --layer "$layer" --out "$OUT/seeds/bridge_$seed"
    "${bridge[@]}" --layer "$layer" --objective regression --out "$OUT/seeds/regression_$seed"
    for l in 0 1 2 4 7; do
        "${bridge[@]}" --layer $l --generate --out "$OUT/seeds/generator_l${l}_$seed"
    done
    convert=(python repr_align.py "${toy[@]}" --seed $seed --steps 800)
    causal=(--align_weight 0 --attention block --context causal)
    "${convert[@]}" --align_weight 0 --out "$OUT/seeds/w0_$seed"
    "${convert[@]}" --align_weight 10 --out "$OUT/seeds/w10_$seed"
    "${convert[@]}" --align_weight 0 --attention block --out "$OUT/seeds/block_$seed"
    "${convert[@]}" "${causal[@]}" --out "$OUT/seeds/causal_$seed"
    "${convert[@]}" "${causal[@]}" --ar_weight 1 --out "$OUT/seeds/ar_$seed"
done
python -m studies.compare "$OUT"/seeds/{bridge,regression}_?
python -m studies.compare "$OUT"/seeds/generator_l?_?
python -m studies.compare "$OUT"/seeds/{w0,w10,block,causal,ar}_?
python generate.py --data "$DATA" --bridges "$OUT"/seeds/generator_l?_? \
    --converted "$OUT"/seeds/{w0,block}_? --texts 32 --out "$OUT/generate_seeds"

echo "=== COMPARE: what does conversion do to circuits? Five twin seeds, three AR models (80 min)"
shift=$OUT/shift
tasks=(--preset tasks --data "$DATA")
twin=(python repr_align.py "${tasks[@]}" --steps 4000)
python data.py --data "$DATA" --tasks 0.8 --max_tokens 1200000 --out "$shift/data"
for a in 0 1 2; do              # three AR models
    python toy.py "${tasks[@]}" --tasks 0.8 --seed $a --out "$shift/toy_$a"
    seeds=$([ $a = 0 ] && echo 0 1 2 3 4 || echo 0 1)
    for seed in $seeds; do for w in 0 10; do
        "${twin[@]}" --model "$shift/toy_$a" --align_weight $w --seed $seed \
            --out "$shift/ar${a}_w${w}_$seed"
    done; done
    python circuits.py --model "$shift/toy_$a" --converted "$shift"/ar${a}_w*_? \
        --out "$shift/circuits_$a"
done
"${twin[@]}" --model "$shift/toy_0" --align_weight 0 --mask_max 1 --out "$shift/wide_0"
python circuits.py --model "$shift/toy_0" --converted "$shift/wide_0" --out "$shift/circuits_wide"
python -m studies.shift "$shift"/circuits_? --out "$shift/verdict"
python -m studies.induction --model "$shift/toy_0" --converted "$shift"/ar0_w0_?

echo "=== LOCATE: does the score foretell the best layer? (25 min)"
python -m studies.sweep --model "$OUT/toy" --data "$DATA" --out "$OUT/sweep"
echo "=== What should diffusion produce? (12 min)"
python -m studies.interfaces --model "$OUT/toy" --data "$DATA" --out "$OUT/interfaces"
