#!/usr/bin/env bash
# The full study behind the report, after run_all.sh: every layer with three seeds, more backbones, the interfaces,
# diffusion against regression where nothing is hidden and where something is. At most 75 minutes on two cores; run it
# again and it resumes, or prints what is finished.
#
#   bash studies/all.sh
#   DATA=notes/ OUT=out/notes bash studies/all.sh                           # the same two settings as run_all.sh
#   python -m studies.ablate --study regression                             # 60 minutes more: regression's own controls
set -euo pipefail
DATA=${DATA:-stdlib} OUT=$(realpath -m "${OUT:-out}")
[ -e "$DATA" ] && DATA=$(realpath "$DATA")
cd "$(dirname "$0")/.."

study() {  # study "what it asks and how long it takes" name flags...
    printf '\n=== %s\n' "$1"
    python -m "studies.$2" --model "$OUT/toy" --data "$DATA" "${@:3}" || {
        printf '\nstudies/all.sh stopped: %s failed\n' "${*:2}" >&2; exit 1; }
}

study "Where can diffusion win? Tokens that are hidden (8 min)" span --out "$OUT/span"
study "Where nothing is hidden: against regression, layers 1, 4, 7 (12 min)" ablate --out "$OUT/ablate/objective"
study "The score against depth: every layer of several backbones (35 min)" sweep --pool --out "$OUT/sweep"
study "Four layers again, each bridge as deep as the blocks it replaces (5 min)" \
    sweep --seeds 1 --blocks 0 --layers 1,3,5,7 --out "$OUT/sweep_matched"
study "What should diffusion produce? (12 min)" interfaces --out "$OUT/interfaces"
printf '\n=== The report, now with these sections\n'
python evaluate.py --runs "$OUT" --out "$OUT/evaluate"
