#!/usr/bin/env bash
# The first ten minutes on a GPU, before anything else is run there: ceilings, every stage once, then the 8B shape with
# random weights: the bridge at two micro-batches, one step profiled, and what --dry_run foretold; LOCATE and CONVERT at
# that width. Nothing is downloaded. All that was said, and how long it took, is in $OUT/gpu.json.
#
#   bash studies/gpu.sh
#   SHAPE=out/toy OUT=out/gpu_look bash studies/gpu.sh              # the same commands on a small shape, on a CPU: 1 min
set -uo pipefail
OUT=$(realpath -m "${OUT:-out/gpu}") SHAPE=${SHAPE:+$(realpath "$SHAPE")} LAYER=${LAYER:-6}
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
export TORCHINDUCTOR_CACHE_DIR=$OUT/inductor

run() {  # run name seconds command...: never stops the others
    local began=$SECONDS code=0
    timeout "$2" "${@:3}" > "$OUT/$1.log" 2>&1 || code=$?
    echo "$1: exit $code after $((SECONDS - began)) s: $(tail -n 1 "$OUT/$1.log" | cut -c1-120)"
    echo "$1 $code $((SECONDS - began)) ${*:3}" >> "$OUT/steps.txt"
}
: > "$OUT/steps.txt"
run machine 10 python -c "import torch as t; print(t.__version__, *map(t.cuda.get_device_properties, range(t.cuda.device_count())))"
run ceilings 60 python -m studies.bench --twin "" --device auto
run stages 150 env PRESET=tiny OUT="$OUT/tiny" bash run_all.sh
[ -n "$SHAPE" ] || { SHAPE=$OUT/llama8b; python - "$SHAPE" "$OUT/tiny/toy" <<'END'
import shutil, sys                                                 # Llama 3.1 8B: its shape, the tiny toy's tokenizer
from pathlib import Path
from transformers import LlamaConfig
shape = dict(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8,
             rms_norm_eps=1e-5, max_position_embeddings=131072)
for folder, blocks in ((sys.argv[1], 32), (sys.argv[1] + "_shallow", 2)):
    LlamaConfig(**shape, num_hidden_layers=blocks, architectures=["LlamaForCausalLM"], rope_parameters={
        "rope_type": "default", "rope_theta": 500000.0}).save_pretrained(folder)
    for file in Path(sys.argv[2]).glob("tokenizer*"):
        shutil.copy(file, folder)
END
}
shallow=$([ -d "${SHAPE}_shallow" ] && echo "${SHAPE}_shallow" || echo "$SHAPE")
big=$([ "$SHAPE" = "$OUT/llama8b" ] && echo "--preset 8b" || echo "--preset tiny")
bridge="bridge.py --layer $LAYER $big --model $SHAPE --random_init --batch_size 32 --steps 12 --log_every 3 --eval_batches 8 --calibration 8"
for m in 8 32; do
    run "dry_$m" 60 python $bridge --micro_batch $m --dry_run
    run "bridge_$m" 150 python $bridge --micro_batch $m --out "$OUT/bridge_$m"
done
run convert 90 python repr_align.py $big --model "$shallow" --random_init --data README.md --batch_size 4 --steps 6 --log_every 2 \
    --eval_batches 4 --out "$OUT/convert"
run locate 60 python geometry.py --preset tiny --model "$SHAPE" --random_init --data README.md --out "$OUT/locate"
python - "$OUT" <<'END'
import json, sys
from pathlib import Path
out, found = Path(sys.argv[1]), {}
for line in (out / "steps.txt").read_text().splitlines():
    name, code, seconds, command = line.split(" ", 3)
    log = out / name / "log.jsonl"
    rows = [json.loads(row) for row in log.read_text().splitlines()] if log.exists() else []
    found[name] = {"command": command, "exit": int(code), "seconds": int(seconds), "log": rows,
                   "said": (out / f"{name}.log").read_text()[-6000:]}
(out / "gpu.json").write_text(json.dumps(found, indent=1))
print(f"{out}/gpu.json: {sum(step['exit'] == 0 for step in found.values())} of {len(found)} steps ended well")
END
