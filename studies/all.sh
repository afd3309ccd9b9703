#!/usr/bin/env bash
# The full study behind the report, after run_all.sh: every layer with three seeds, seven more backbones, the interfaces
# with three seeds. About an hour on two cores; run it again and it resumes. run_all.sh holds a quick layer sweep.
#
#   bash study.sh
#   DATA=notes/ OUT=out/notes bash study.sh                                 # the same two settings as run_all.sh
set -euo pipefail
DATA=${DATA:-stdlib} OUT=${OUT:-out}
here=$(dirname "$0")

printf '\n=== The score against depth: every layer of eight backbones (40 min)\n'
python "$here/sweep.py" --model "$OUT/toy" --data "$DATA" --pool --out "$OUT/sweep"
printf '\n=== Four layers again, each bridge as deep as the blocks it replaces (5 min)\n'
python "$here/sweep.py" --model "$OUT/toy" --seeds 1 --blocks 0 --layers 1,3,5,7 --out "$OUT/sweep_matched"
printf '\n=== What should diffusion produce? (12 min)\n'
python "$here/interfaces.py" --data "$DATA" --out "$OUT/interfaces"
printf '\n=== The report, now with these tables\n'
python "$here/evaluate.py" --runs "$OUT" --out "$OUT/evaluate"
