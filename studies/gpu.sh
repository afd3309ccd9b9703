#!/usr/bin/env bash
# The first ten minutes on a GPU: the tiny pipeline, then a dozen steps of the 8b preset on the
# shape of Llama-3.1-8B with 8 blocks and random weights. Nothing is downloaded.
#
#   bash studies/gpu.sh
#   WIDTH=256 PRESET=tiny OUT=out/rehearsal bash studies/gpu.sh     # a small shape, for a CPU
#
# It writes $OUT/gpu.json: exit code, seconds and log of every step. A step that fails does not stop
# the others. In a log, mfu is the share of the GPU's peak. tokens_per_s includes the first training
# step, which compiles: compare two rows of a log.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/gpu}
WIDTH=${WIDTH:-4096}
PRESET=${PRESET:-8b}
mkdir -p "$OUT"
rows=()
failed=0

run() {     # run NAME COMMAND...: the folder of a training is $OUT/NAME
    local name=$1 start=$SECONDS code=0
    shift
    timeout 300 "$@" > "$OUT/$name.txt" 2>&1 || code=$?
    [ $code = 0 ] || failed=$((failed + 1))
    local took=$((SECONDS - start)) log
    log=$(grep -s tokens_per_s "$OUT/$name/log.jsonl" | paste -sd, -)
    rows+=("\"$name\": {\"exit\": $code, \"seconds\": $took, \"log\": [$log]}")
    (IFS=,; echo "{${rows[*]}}") > "$OUT/gpu.json"
    echo "$name: exit $code after $took s: $(tail -n 1 "$OUT/$name.txt")"
}

run pipeline env PRESET=tiny OUT="$OUT" bash run_all.sh
run shape python - "$OUT" "$WIDTH" <<'END'
import sys
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
out = sys.argv[1]
width = int(sys.argv[2])                            # 4096: all other sizes are that model's
config = LlamaConfig(
    vocab_size=128256 * width // 4096, hidden_size=width, intermediate_size=width * 7 // 2,
    num_hidden_layers=8, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
    max_position_embeddings=131072)
with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    LlamaForCausalLM(config).bfloat16().save_pretrained(f"{out}/llama")
AutoTokenizer.from_pretrained(f"{out}/toy").save_pretrained(f"{out}/llama")     # same shards
END
few=(--preset "$PRESET" --model "$OUT/llama" --steps 12)
bridge=(python bridge.py "${few[@]}" --layer 6 --batch_size 32 --log_every 3 --eval_batches 8
        --calibration 8)
run dry_run "${bridge[@]}" --micro_batch 8 --dry_run
run bridge_8 "${bridge[@]}" --micro_batch 8 --out "$OUT/bridge_8"
run bridge_32 "${bridge[@]}" --micro_batch 32 --out "$OUT/bridge_32"
run hybrid_8 python hybrid.py --preset "$PRESET" --bridge "$OUT/bridge_8" --eval_batches 8 \
    --out "$OUT/hybrid_8"
run convert_8 python repr_align.py "${few[@]}" --batch_size 4 --eval_batches 4 \
    --out "$OUT/convert_8"
run locate_8 python geometry.py --preset "$PRESET" --model "$OUT/llama" --tokens 8192 \
    --out "$OUT/locate_8"
echo "$OUT/gpu.json: $((${#rows[@]} - failed)) of ${#rows[@]} steps ended well"
