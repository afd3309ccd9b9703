#!/usr/bin/env bash
# The first minutes on a GPU, before anything else is run there: ceilings, every stage once, then the 8B shape with
# random weights: the bridge at two micro-batches and what --dry_run foretold, its kernels by time, a hybrid's tokens a
# second beside the intact model's, CONVERT and LOCATE at that width with few blocks. Nothing is downloaded. What was
# said, how long it took and the speed between the last lines of each log (those before hold compilation) is in
# $OUT/gpu.json, written anew after every step: at most ten minutes.
#
#   bash studies/gpu.sh
#   SHAPE=out/toy OUT=out/gpu_look bash studies/gpu.sh              # the same on a small shape, on a CPU: 2 minutes
set -uo pipefail
OUT=$(realpath -m "${OUT:-out/gpu}") LAYER=${LAYER:-6}
[ -z "${SHAPE:-}" ] || SHAPE=$(realpath -e "$SHAPE") || exit 2
cd "$(dirname "$0")/.."
mkdir -p "$OUT/data"                                        # or the shards beside OUT would be taken for ours
export TORCHINDUCTOR_CACHE_DIR=$OUT/inductor
: > "$OUT/steps.txt"

run() {  # run name seconds command...: never stops the others
    local began=$SECONDS code=0
    timeout "$2" "${@:3}" > "$OUT/$1.log" 2>&1 || code=$?
    echo "$1: exit $code after $((SECONDS - began)) s: $(tail -n 1 "$OUT/$1.log" | cut -c1-120)"
    echo "$1 $code $((SECONDS - began)) $(tr -d '\n' <<< "${*:3}")" >> "$OUT/steps.txt"
    python - "$OUT" <<'END'
import json, sys
from pathlib import Path
out, found = Path(sys.argv[1]), {}
for line in (out / "steps.txt").read_text().splitlines():
    name, code, seconds, command = line.split(" ", 3)
    log, steady = out / name / "log.jsonl", None
    rows = [row for row in map(json.loads, log.read_text().splitlines()) if "tok/s" in row] if log.exists() else []
    if len(rows) > 2:                                          # tokens a second, without the first steps
        a, b = ((row["step"], row["step"] / row["tok/s"]) for row in (rows[-3], rows[-1]))
        steady = (b[0] - a[0]) / (b[1] - a[1])
    found[name] = {"command": command, "exit": int(code), "seconds": int(seconds), "steady tok/s": steady, "log": rows,
                   "said": (out / f"{name}.log").read_text()[-12000:]}
(out / "gpu.json").write_text(json.dumps(found, indent=1))
END
}

run machine 20 python -c "import torch; print(torch.__version__, *map(torch.cuda.get_device_properties, range(
    torch.cuda.device_count())))"
run ceilings 40 python -m studies.bench --twin "" --device auto
run stages 85 env PRESET=tiny OUT="$OUT/tiny" bash run_all.sh
few=${SHAPE:-$OUT/llama_few} preset=tiny
if [ -z "${SHAPE:-}" ]; then
    SHAPE=$OUT/llama8b preset=8b
    python - "$OUT" <<'END'
import shutil, sys                                           # the shape of Llama 3.1 8B, the tiny toy's tokenizer
from pathlib import Path
from transformers import LlamaConfig
out = Path(sys.argv[1])
for name, blocks in (("llama8b", 32), ("llama_few", 4)):
    LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=blocks,
                num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5, max_position_embeddings=131072,
                architectures=["LlamaForCausalLM"]).save_pretrained(out / name)
    for file in (out / "tiny" / "toy").glob("tokenizer*"):
        shutil.copy(file, out / name)
END
fi
bridge=(bridge.py --layer "$LAYER" --preset $preset --model "$SHAPE" --random_init --batch_size 32 --steps 12
        --log_every 3 --eval_batches 8 --calibration 8)
for m in 8 32; do
    run "dry_$m" 20 python "${bridge[@]}" --micro_batch $m --dry_run
    run "bridge_$m" 75 python "${bridge[@]}" --micro_batch $m --out "$OUT/bridge_$m"
done
run profile 70 python - "${bridge[@]:1}" --steps 7 --micro_batch 8 --out "$OUT/profile" <<'END'
import sys
import torch
from torch.profiler import ProfilerActivity, profile, schedule
import bridge
from core import optim
cuda, step_all = torch.cuda.is_available(), optim.step_all
table = dict(sort_by="self_cuda_time_total" if cuda else "self_cpu_time_total", row_limit=25, max_name_column_width=60)
profiler = profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda, schedule=schedule(
    wait=4, warmup=1, active=1), on_trace_ready=lambda p: print(p.key_averages().table(**table)))
def stepped(*args):
    step_all(*args)
    profiler.step()                                            # the sixth step is the one that is shown
optim.step_all = stepped
with profiler:
    bridge.main(sys.argv[1:])
END
run hybrid 60 python - "$SHAPE" "$LAYER" <<'END'
import sys
import torch
from core import backbone, denoiser, hybrid_lm
from core.metrics import seconds_of
layer, device = int(sys.argv[2]), torch.device("cuda" if torch.cuda.is_available() else "cpu")
lm = backbone.load(sys.argv[1], device, torch.bfloat16 if device.type == "cuda" else torch.float32, random_init=True)
ids = torch.randint(1, lm.V, (1, 64), device=device)
how = dict(max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids))
stock = 64 / seconds_of(3, lambda: lm.model.generate(ids, **how))
print(f"intact model: {stock:.1f} tokens/s, batch 1")
for blocks in (1, layer):
    net = denoiser.Bridge(lm.D, lm.D, blocks, lm.D // (64 if lm.D >= 512 else 32)).to(device).eval()
    config = hybrid_lm.HybridConfig(layer=layer, bridge=net.settings)
    config.vocab_size, config.hidden_size, config.max_position_embeddings = lm.V, lm.D, 8192
    model = hybrid_lm.HybridForCausalLM(config, net, lm).to(device).eval()
    for nfe in (1, 4):
        model.set_nfe(nfe)
        speed = 64 / seconds_of(2, lambda: model.generate(ids, **how))
        print(f"hybrid at layer {layer}, {blocks} blocks, NFE {nfe}: {speed:.1f} tokens/s, {speed / stock:.2f}x")
END
run convert 70 python repr_align.py --preset $preset --model "$few" --random_init --data stdlib --seq_len 512 \
    --batch_size 4 --steps 8 --log_every 2 --eval_batches 4 --out "$OUT/convert"
run locate 60 python geometry.py --preset tiny --model "$few" --random_init --data stdlib --out "$OUT/locate"
python - "$OUT/gpu.json" <<'END'
import json, sys
found = json.load(open(sys.argv[1]))
print(f"{sys.argv[1]}: {sum(step['exit'] == 0 for step in found.values())} of {len(found)} steps ended well")
END
