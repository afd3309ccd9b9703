#!/usr/bin/env bash
# The full study behind the report, after run_all.sh: every layer with three seeds, more backbones, the interfaces,
# diffusion against regression where nothing is hidden and where something is. At most 75 minutes on two cores; run it
# again and it resumes, or prints what is finished.
#
#   bash studies/all.sh
#   DATA=notes/ OUT=out/notes bash studies/all.sh                           # the same two settings as run_all.sh
#   python -m studies.ablate --study regression --steps 200                 # half an hour more: regression's own controls
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
study "The score against depth, and diffusion against regression, at every layer (45 min)" \
    sweep --pool --steps 200 --eval_batches 256 --out "$OUT/sweep"
study "What should diffusion produce? (17 min)" interfaces --out "$OUT/interfaces"
printf '\n=== The report, now with these sections\n'
python evaluate.py --runs "$OUT" --out "$OUT/evaluate"
